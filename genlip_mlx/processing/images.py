"""Pictures to patches: the pixels of the reference, from any source a user names.

The one idea: a picture becomes RGB bytes of whole patches first, and numbers last. A byte has 256 values, so
rescaling and normalising are one look-up in a table that was computed the way the reference computes them.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..config import ConfigError, read_json

# Raster formats only: others that Pillow reads run Ghostscript (EPS) or hold no picture (HDF5, MPEG). HEIF
# is there once the user's own code has registered a plugin for it.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000", "ICO", "ICNS"]
FORMATS += ["PCX", "QOI", "SGI", "TGA", "PSD", "SUN"]
URL_BYTES_LIMIT = 64 * 2**20  # bytes
URL_TIMEOUT = 30.0  # seconds, for the whole transfer
MAX_ASPECT_RATIO = 200

_NATIVE_TYPE = "GenLIPNaViTImageProcessor"
_BILINEAR = 2  # Pillow's number for it
# What the model was trained with and this package always does.
_FIXED_FIELDS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "merge_size": 1,
    "temporal_patch_size": 1,
}
# Pillow's decoders meet damaged data with any of these.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
T = TypeVar("T")

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageError(ValueError):
    """A picture that cannot be found, fetched, decoded or cut into patches; the message starts with its name."""


def open_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """Decode a picture and make it RGB.

    Palette pictures go through RGBA, every other mode straight to RGB, as in the reference: transparency is dropped,
    not blended, and 16-bit grey is clipped at 255, not scaled. The EXIF orientation is not applied, because
    the reference does not apply it. Of an animation, the first frame counts.

    Args:
        source: a path, an http(s) address (at most 64 MB, 30 s), the bytes of a file, or an open Pillow picture.
        name: what error messages call the picture; by default its path or address.

    Returns:
        The whole picture, decoded, mode RGB.

    Raises:
        ImageError: if it is missing, too large, damaged, or no picture at all.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, name or getattr(source, "filename", "") or "image")
    return _with_file(source, name, lambda file, name: _to_rgb(_open(file, name), name))


def image_size(source: str | Path | bytes | Image.Image, name: str | None = None) -> tuple[int, int]:
    """Height and width that a picture's header states, in pixels; nothing is decoded, so this takes some 40 us.

    Raises:
        ImageError: as `open_image`, except that damage behind the header is not seen.
    """
    if isinstance(source, Image.Image):
        return source.height, source.width

    def stated(file: Any, name: str) -> tuple[int, int]:
        image = _open(file, name)
        return image.height, image.width

    return _with_file(source, name, stated)


def _with_file(source: str | Path | bytes, name: str | None, use: Callable[[Any, str], T]) -> T:
    """What `use` makes of a picture's open file and its name, wherever the file is."""
    if isinstance(source, bytes):
        return use(io.BytesIO(source), name or "image data")
    name = name or str(source)
    if isinstance(source, str) and _url_scheme(source):
        return use(io.BytesIO(_download(source, name)), name)
    try:
        with open(source, "rb") as file:
            return use(file, name)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder, not an image") from None
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror or error})") from None
    except ImageError:
        raise
    except ValueError as error:  # a zero byte in the name
        raise ImageError(f"{name}: cannot be read ({error})") from None


def list_images(paths: Sequence[str]) -> list[str]:
    """Expand files, folders and addresses into picture names, in the order given.

    A folder is searched recursively, sorted by path, for files with a raster suffix; hidden files and folders
    are skipped. A file named outright is taken whatever its suffix, and addresses pass through.

    Raises:
        ImageError: if a path does not exist, or a folder holds no picture.
    """
    found: list[str] = []
    for path in map(str, paths):
        if _url_scheme(path) or os.path.isfile(path):
            found.append(path)
        elif not os.path.isdir(path):
            raise ImageError(f"{path}: no such file or folder")
        else:
            inside = _images_in(path)
            if not inside:
                raise ImageError(f"{path}: no images in this folder (.jpg, .png, .webp, .gif, .tiff, ...)")
            found.extend(inside)
    return found


@dataclass(frozen=True)
class ImageProcessor:
    """Resize, normalise and cut into patches, as a published preprocessor_config.json says.

    Raises:
        ConfigError: if a number is impossible, naming its field.
    """

    native: bool  # keep the aspect ratio (GenLIP's stage 2), or resize to size x size (stage 1)
    size: int = 224  # pixels a side; unused if native
    patch_size: int = 16  # pixels
    min_pixels: int = 4096  # pixels of the resized picture; native only
    max_pixels: int = 262144
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 0.00392156862745098  # 1 / 255
    published: dict[str, Any] = field(default_factory=dict, compare=False)  # the file this was read from

    def __post_init__(self) -> None:
        for name in ("size", "patch_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"{name} must be a positive whole number, not {value!r}")
        if not self.native and self.size % self.patch_size:
            raise ConfigError(f"size {self.size} is not a multiple of patch_size {self.patch_size}")
        if self.native and not self.patch_size**2 <= self.min_pixels <= self.max_pixels:
            raise ConfigError(
                f"min_pixels {self.min_pixels} must lie between one patch ({self.patch_size**2} pixels) "
                f"and max_pixels {self.max_pixels}"
            )
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(_is_number(x) for x in values):
                raise ConfigError(f"{name} must be three numbers, not {list(values)!r}")
        if not all(x > 0 for x in self.image_std):
            raise ConfigError(f"image_std must be positive, not {list(self.image_std)!r}")
        if not _is_number(self.rescale_factor) or self.rescale_factor <= 0:
            raise ConfigError(f"rescale_factor must be a positive number, not {self.rescale_factor!r}")

    @property
    def max_patches(self) -> int:
        """The most patches a picture can become."""
        return (self.max_pixels if self.native else self.size**2) // self.patch_size**2

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches a picture of height x width pixels becomes, as (h, w).

        A native side is rounded to whole patches (a half to the even number); if the area then leaves
        [min_pixels, max_pixels], both sides are scaled alike and rounded inwards.

        Raises:
            ImageError: native only, if one side is more than 200 times the other.
        """
        if not self.native:
            return self.size // self.patch_size, self.size // self.patch_size
        if min(height, width) < 1:
            raise ImageError(f"an image of {width} x {height} pixels is empty")
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ImageError(
                f"an image of {width} x {height} pixels has an aspect ratio over {MAX_ASPECT_RATIO}; crop it first"
            )
        p = self.patch_size
        h, w = round(height / p), round(width / p)
        if h * w * p * p > self.max_pixels:
            beta = math.sqrt(height * width / self.max_pixels)
            h, w = max(1, math.floor(height / beta / p)), max(1, math.floor(width / beta / p))
        elif h * w * p * p < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (height * width))
            h, w = math.ceil(height * beta / p), math.ceil(width * beta / p)
        return h, w

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Cut one picture into normalised patches.

        Args:
            image: any mode; `open_image`'s rule makes it RGB.

        Returns:
            patches [h*w, 3*patch_size**2] float32, row-major, each as (channel, row, column); and the grid (h, w).

        Raises:
            ImageError: if the picture is damaged, or too long for a native grid.
        """
        patches, grid = self.cut(image)
        out = np.empty(patches.shape, np.float32)
        self.normalise(patches, out)
        return out, grid

    def cut(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Resize one picture and cut it into patches of plain bytes, a quarter of the size of normalised ones.

        Args:
            image: any mode; `open_image`'s rule makes it RGB.

        Returns:
            patches [h*w, 3*patch_size**2] uint8, laid out as those of a call; and the grid (h, w).

        Raises:
            ImageError: as a call.
        """
        image = open_image(image)
        h, w = self.grid(image.height, image.width)
        p = self.patch_size
        pixels = np.asarray(image.resize((w * p, h * p), Image.Resampling.BILINEAR))  # [h*p, w*p, 3] uint8
        return pixels.reshape(h, p, w, p, 3).transpose(0, 2, 4, 1, 3).reshape(h * w, 3 * p * p), (h, w)

    def normalise(self, patches: np.ndarray, out: np.ndarray) -> None:
        """Write the normalised values of cut patches [P, 3*patch_size**2] uint8 into `out`, as many float32."""
        tables = self._tables()
        shape = (-1, 3, self.patch_size**2)
        # numpy widens indices to 8 bytes: in blocks that stay in the cache this takes a seventh of the time.
        for start in range(0, len(patches), 64):
            indices = patches[start : start + 64].reshape(shape)
            values = out[start : start + 64].reshape(shape)
            for channel, table in enumerate(tables):
                np.take(table, indices[:, channel], out=values[:, channel], mode="clip")

    def _tables(self) -> np.ndarray:
        """The normalised value of each byte, [3, 256] float32: rescaled in float64, then all in float32."""
        values = (np.arange(256) * self.rescale_factor).astype(np.float32)
        mean, std = np.array([self.image_mean, self.image_std], np.float32)[:, :, None]
        table: np.ndarray = (values - mean) / std
        return table

    def resized(self, size: int | None) -> ImageProcessor:
        """The same normalisation at another size: a fixed size x size, or native for None.

        Raises:
            ConfigError: if size is not a positive multiple of the patch size.
        """
        if size is None:
            return replace(self, native=True)
        return replace(self, native=False, size=size)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ImageProcessor:
        """Read a published preprocessor config: `Siglip*` is fixed, `GenLIPNaViTImageProcessor` native.

        Raises:
            ConfigError: naming the field, if it is missing, wrong, or asks for what the model does not do.
        """
        kind = config.get("image_processor_type")
        native = kind == _NATIVE_TYPE
        if not native and not (isinstance(kind, str) and kind.startswith("Siglip")):
            raise ConfigError(f"image_processor_type is {kind!r}; known are Siglip* (fixed size) and {_NATIVE_TYPE}")
        for name, only in _FIXED_FIELDS.items():
            if config.get(name, only) not in (only, None):
                raise ConfigError(f"{name} is {config[name]!r}; only {only!r} is supported")
        # Other programs put their own values where one of these is missing, so guessing would be silently wrong.
        if config.get("resample") != _BILINEAR:
            raise ConfigError(f"resample is {config.get('resample')!r}; only {_BILINEAR} (bilinear) is supported")
        known: dict[str, Any] = {name: config[name] for name in ("patch_size", "rescale_factor") if name in config}
        for name in ("image_mean", "image_std"):
            if not isinstance(config.get(name), (list, tuple)):
                raise ConfigError(f"{name} must be three numbers, not {config.get(name)!r}")
            known[name] = tuple(config[name])
        known.update(_native_size(config) if native else _fixed_size(config))
        return cls(native=native, **known, published=dict(config))

    @classmethod
    def from_file(cls, path: Path) -> ImageProcessor:
        """Read a preprocessor_config.json.

        Raises:
            ConfigError: naming the file, if it is missing, not JSON, or not understood.
        """
        config = read_json(path, "copy it from the published checkpoint this model comes from")
        try:
            return cls.from_dict(config)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The published layout: the very fields that were read, where nothing has changed since."""
        if self.published and ImageProcessor.from_dict(self.published) == self:
            return dict(self.published)
        config: dict[str, Any] = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.image_mean),
            "image_processor_type": _NATIVE_TYPE if self.native else "SiglipImageProcessor",
            "image_std": list(self.image_std),
            "patch_size": self.patch_size,
            "resample": _BILINEAR,
            "rescale_factor": self.rescale_factor,
        }
        if not self.native:
            return config | {"size": {"height": self.size, "width": self.size}}
        return config | {
            "max_pixels": self.max_pixels,
            "merge_size": 1,
            "min_pixels": self.min_pixels,
            "size": {"longest_edge": self.max_pixels, "shortest_edge": self.min_pixels},
            "temporal_patch_size": 1,
        }


def _fixed_size(config: dict[str, Any]) -> dict[str, Any]:
    size = config.get("size")
    if not isinstance(size, dict):
        return {"size": size}
    if "height" not in size or "width" not in size:
        raise ConfigError(f"size must have a height and a width, not {size!r}")
    if size["height"] != size["width"]:
        raise ConfigError(f"size {size['height']} x {size['width']} is not square; a fixed size is")
    return {"size": size["height"]}


def _native_size(config: dict[str, Any]) -> dict[str, Any]:
    # The edges of `size` are areas too, in spite of their names; the plain fields go before them.
    size = config.get("size")
    edges = size if isinstance(size, dict) else {}
    return {
        "min_pixels": config.get("min_pixels", edges.get("shortest_edge")),
        "max_pixels": config.get("max_pixels", edges.get("longest_edge")),
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        if image.mode == "P":
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")
    except _BOMBS:
        raise ImageError(_bomb(name)) from None
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name}: the image is damaged or cut off ({_one_line(error)})") from None


def _open(file: Any, name: str) -> Image.Image:
    """Read the header alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # odd EXIF, while the pixels are fine
            image = Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image of a known format (JPEG, PNG, WebP, GIF, TIFF, ...)") from None
    except _BOMBS:
        raise ImageError(_bomb(name)) from None
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name}: the image is damaged or cut off ({_one_line(error)})") from None
    # Warning filters belong to the whole process, so another thread may have lifted ours meanwhile.
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(_bomb(name))
    return image


def _bomb(name: str) -> str:
    return (
        f"{name}: more than {Image.MAX_IMAGE_PIXELS} pixels, which may be a decompression bomb; "
        "make the image smaller if you trust it"
    )


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@cache
def _formats() -> list[str]:
    """Those of FORMATS that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@cache
def _suffixes() -> frozenset[str]:
    known = {*_formats(), "MPO"}  # MPO is opened by the JPEG plugin
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in known)


def _images_in(folder: str) -> list[str]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = (name for name in files if not name.startswith("."))
        found += [os.path.join(root, name) for name in names if os.path.splitext(name)[1].lower() in _suffixes()]
    return sorted(found)


def _url_scheme(text: str) -> str | None:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    return match[1].lower() if match else None


def _download(url: str, name: str) -> bytes:
    """The body behind an http(s) address, within URL_BYTES_LIMIT and URL_TIMEOUT."""
    if _url_scheme(url) not in ("http", "https"):
        raise ImageError(f"{name}: only http and https addresses are read; name a local file by its path")
    # Imported here: most runs fetch nothing, and these take as long to import as the rest together.
    from http.client import HTTPException
    from urllib import error, request

    from .. import __version__

    # Only these handlers, so that a redirect cannot lead to ftp, file or data addresses.
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    late = f"{name}: not fetched within {URL_TIMEOUT:g} s; download it yourself and name the file"
    deadline = time.monotonic() + URL_TIMEOUT
    try:
        address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        asked = request.Request(address, headers={"User-Agent": f"genlip-mlx/{__version__}"})
        with opener.open(asked, timeout=URL_TIMEOUT) as response:
            promised = response.headers.get("Content-Length", "")
            data = bytearray()
            # The socket's timeout starts anew with every byte; the deadline does not.
            while len(data) <= URL_BYTES_LIMIT and (chunk := response.read1(1 << 16)):
                data += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError
    except error.HTTPError as problem:
        raise ImageError(f"{name}: the server answered {problem.code} {_one_line(problem.reason)}") from None
    except TimeoutError:
        raise ImageError(late) from None
    except error.URLError as problem:
        if isinstance(problem.reason, TimeoutError):
            raise ImageError(late) from None
        raise ImageError(f"{name}: cannot be fetched ({_one_line(problem.reason)})") from None
    except (OSError, HTTPException, ValueError) as problem:
        raise ImageError(f"{name}: cannot be fetched ({_one_line(problem)})") from None
    if len(data) > URL_BYTES_LIMIT:
        raise ImageError(f"{name}: larger than {URL_BYTES_LIMIT / 2**20:g} MB; download it yourself and name the file")
    if promised.isdigit() and len(data) < int(promised):
        raise ImageError(f"{name}: the connection broke after {len(data)} of {promised} bytes; try again")
    return bytes(data)
