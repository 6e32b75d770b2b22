"""Pictures to patches: the reference's numbers, every source, and every way a source can fail."""

from __future__ import annotations

import io
import json
import math
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from genlip_mlx.config import ConfigError
from genlip_mlx.processing import images
from genlip_mlx.processing.images import ImageError, ImageProcessor, list_images, open_image

if TYPE_CHECKING:
    from conftest import Golden

FIXED = {
    "image_processor_type": "SiglipImageProcessor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "size": {"height": 224, "width": 224},
}
NATIVE = FIXED | {
    "image_processor_type": "GenLIPNaViTImageProcessor",
    "size": {"shortest_edge": 4096, "longest_edge": 262144},
}


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    levels = np.add.outer(np.arange(size[1]) * 5, np.arange(size[0]) * 3).astype(np.uint8)
    return Image.fromarray(np.stack([levels, 255 - levels, levels // 2], -1)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- The reference's numbers ---


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.1, 0.2, 0.3)])
def test_cut_then_normalised_is_the_same_as_at_once(mean: tuple[float, float, float]) -> None:
    processor = ImageProcessor(native=True, image_mean=mean)
    image = picture(size=(170, 130))
    patches, grid = processor(image)
    cut, cut_grid = processor.cut(image)
    assert cut_grid == grid == (8, 11)
    assert cut.dtype == np.uint8
    out = np.empty((2 + len(cut), 768), np.float32)
    processor.normalise(cut, out[1:-1])
    np.testing.assert_array_equal(out[1:-1], patches)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_the_header_tells_the_size(kind: str, tmp_path: Path) -> None:
    whole = encoded(picture(size=(400, 300)), kind)
    path = tmp_path / "a"
    path.write_bytes(whole)
    for source in (path, str(path), whole, open_image(whole)):
        assert images.image_size(source) == (300, 400)
    if kind in ("JPEG", "PNG", "GIF"):
        assert images.image_size(whole[: len(whole) // 2]) == (300, 400)
    with pytest.raises(ImageError, match=r"a\.jpg: not an image of a known format"):
        images.image_size(b"text", "a.jpg")
    with pytest.raises(ImageError, match=r"gone\.jpg: no such file"):
        images.image_size(tmp_path / "gone.jpg")


def test_patches_equal_the_reference(case: Golden) -> None:
    processor = ImageProcessor.from_file(case.folder / "preprocessor_config.json")
    for index, sample in enumerate(case.samples):
        patches, grid = processor(open_image(case.image_path(index)))
        assert list(grid) == sample["grid"]
        assert patches.dtype == np.float32
        assert patches.flags.c_contiguous
        assert patches.shape == (math.prod(grid), 768)
        expected = case.expected(f"{index}.patches")
        np.testing.assert_allclose(case.rows(patches, f"{index}.patches"), expected, rtol=0, atol=1e-6)


def test_patches_are_row_major_and_channel_first() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    processor = ImageProcessor(native=True, min_pixels=256, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    patches, grid = processor(Image.fromarray(pixels))
    assert grid == (2, 3)
    block = pixels[16:32, 32:48].transpose(2, 0, 1) / 255  # row 1, column 2
    expected = (block - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / np.reshape([0.4, 0.5, 0.6], (3, 1, 1))
    np.testing.assert_allclose(patches[1 * 3 + 2], expected.ravel(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [
        (256, 340, (16, 21)),
        (3000, 4000, (27, 36)),  # beta of the original size, both sides rounded down
        (512, 512, (32, 32)),  # exactly max_pixels
        (520, 504, (32, 32)),  # 32.5 and 31.5 patches: a half goes to the even number
        (64, 64, (4, 4)),  # exactly min_pixels
        (1, 1, (4, 4)),
        (7, 7, (4, 4)),  # rounds to no patch at all
        (10, 30, (3, 7)),
        (1, 200, (1, 57)),  # the longest shape allowed
    ],
)
def test_native_grid(height: int, width: int, grid: tuple[int, int]) -> None:
    assert ImageProcessor(native=True).grid(height, width) == grid


@given(st.integers(1, 20000), st.integers(1, 20000))
def test_native_grid_holds_its_limits(height: int, width: int) -> None:
    processor = ImageProcessor(native=True)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ImageError, match="aspect ratio over 200"):
            processor.grid(height, width)
        return
    h, w = processor.grid(height, width)
    assert 16 <= h * w <= processor.max_patches == 1024
    assert processor.grid(width, height) == (w, h)


def test_fixed_grid_knows_no_aspect_ratio() -> None:
    assert ImageProcessor(native=False).grid(1, 1000) == (14, 14)
    assert ImageProcessor(native=False).max_patches == 196


def test_a_tiny_picture_is_scaled_up() -> None:
    patches, grid = ImageProcessor(native=True)(Image.new("RGB", (1, 1), (255, 0, 0)))
    assert grid == (4, 4)
    assert set(np.unique(patches[:, :256])) == {1.0}
    assert set(np.unique(patches[:, 256:])) == {-1.0}


def test_grid_names_what_is_wrong() -> None:
    with pytest.raises(ImageError, match="201 x 1 pixels has an aspect ratio over 200; crop it first"):
        ImageProcessor(native=True).grid(1, 201)
    with pytest.raises(ImageError, match="0 x 5 pixels is empty"):
        ImageProcessor(native=True).grid(5, 0)


# --- Colour ---


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    source = picture("L").convert("I").convert("I;16") if mode == "I;16" else picture().convert("RGB")
    if mode not in ("I;16", "LAB"):
        source = picture("L").convert(mode) if mode in ("I", "F") else picture(mode)
    if mode == "LAB":
        source = Image.new("LAB", (40, 30))
    image = open_image(source)
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_alpha_is_dropped_not_blended() -> None:
    image = open_image(encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0)), "PNG"))
    assert image.getpixel((0, 0)) == (10, 20, 30)


def test_palette_with_transparency() -> None:
    source = picture("P")
    image = open_image(encoded(source, "PNG", transparency=bytes(range(200))))
    assert image.tobytes() == source.convert("RGB").tobytes()


def test_16_bit_grey_is_clipped_like_the_reference() -> None:
    levels = np.array([[0, 255, 256, 65535]], np.uint16)
    image = open_image(encoded(Image.fromarray(levels), "PNG"))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 255, 255, 255]


def test_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert open_image(encoded(picture(), "JPEG", exif=exif)).size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    image = open_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert image.getpixel((4, 4)) == (255, 0, 0)


# --- Files ---


def test_open_image_takes_paths_bytes_and_pictures(tmp_path: Path) -> None:
    source = picture()
    path = tmp_path / "a.png"
    source.save(path)
    for given_as in (path, str(path), path.read_bytes(), source, Image.open(path)):
        assert open_image(given_as).tobytes() == source.tobytes()


def test_errors_start_with_the_name(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "half.jpg").write_bytes(encoded(picture(size=(400, 300)), "JPEG")[:2000])
    (tmp_path / "half.png").write_bytes(encoded(picture(), "PNG")[:100])
    for name, message in {
        "missing.jpg": "no such file",
        "": "is a folder, not an image",
        "text.jpg": "not an image of a known format (JPEG, PNG, WebP, GIF, TIFF, ...)",
        "empty.jpg": "not an image of a known format",
        "half.jpg": "the image is damaged or cut off (",
        "half.png": "the image is damaged or cut off (",
        "nul\0.jpg": "cannot be read (",
        "n" * 300: "cannot be read (File name too long)",
    }.items():
        with pytest.raises(ImageError) as caught:
            open_image(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {message}")
        assert "\n" not in str(caught.value)


def test_errors_of_nameless_sources() -> None:
    with pytest.raises(ImageError, match=r"^image data: not an image"):
        open_image(b"no picture")
    with pytest.raises(ImageError, match=r"^sample 7: not an image"):
        open_image(b"no picture", "sample 7")
    with pytest.raises(ImageError, match=r"^image: the image is damaged"):
        open_image(Image.open(io.BytesIO(encoded(picture(), "PNG")[:100])))


def test_files_that_run_programs_are_not_opened() -> None:
    with pytest.raises(ImageError, match="not an image of a known format"):
        open_image(encoded(picture(), "EPS"))


@pytest.mark.parametrize("size", [(12, 12), (15, 15)])  # Pillow warns of the first and refuses the second
def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    data = encoded(picture(size=size), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"^big.png: more than 100 pixels, which may be a decompression bomb"):
        open_image(data, "big.png")


def test_decompression_bomb_while_another_thread_holds_the_warning_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(size=(12, 12)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(record=True), monkeypatch.context() as patch:
        patch.setattr(warnings, "simplefilter", lambda *_: None)
        with pytest.raises(ImageError, match="decompression bomb"):
            open_image(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_raise_image_errors_only(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"]))
    file = bytearray(encoded(picture(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        outcome = open_image(bytes(file[: data.draw(st.integers(0, len(file)))])).mode
    except ImageError as error:
        outcome = str(error)
    assert outcome == "RGB" or (outcome.startswith("image data: ") and "\n" not in outcome)


# --- Lists of pictures ---


def test_list_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "sub/c.webp", "sub/.hidden.png", ".cache/d.png", "notes.txt", "data.h5", "e.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    notes = str(tmp_path / "notes.txt")
    inside = [str(tmp_path / name) for name in ("a.png", "b.JPG", "sub/c.webp")]
    url = "https://example.org/x"
    assert list_images([url, str(tmp_path), notes]) == [url, *inside, notes]


def test_list_images_errors(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=f"^{tmp_path}/no: no such file or folder$"):
        list_images([f"{tmp_path}/no"])
    with pytest.raises(ImageError, match=rf"^{tmp_path}: no images in this folder \(\.jpg, \.png"):
        list_images([str(tmp_path)])


# --- Addresses ---


class Pages(BaseHTTPRequestHandler):
    """A small web site of everything that can go right and wrong."""

    png = encoded(picture(), "PNG")

    def do_GET(self) -> None:
        page = self.path.partition("?")[0].strip("/").replace("-", "_")
        getattr(self, f"page_{page}", self.page_missing)()

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def page_picture(self) -> None:
        self.answer(200, {"Content-Length": str(len(self.png))}, self.png)

    def page_agent(self) -> None:
        is_ours = self.headers["User-Agent"].startswith("genlip-mlx/")
        self.answer(200, {}, self.png if is_ours else b"")

    def page_missing(self) -> None:
        self.answer(404, {})

    def page_html(self) -> None:
        self.answer(200, {"Content-Type": "text/html"}, b"<html>no picture</html>")

    def page_moved(self) -> None:
        self.answer(302, {"Location": "/picture"})

    def page_loop(self) -> None:
        self.answer(302, {"Location": "/loop"})

    def page_to_file(self) -> None:
        self.answer(302, {"Location": "file:///etc/hostname"})

    def page_to_ftp(self) -> None:
        self.answer(302, {"Location": "ftp://127.0.0.1/picture"})

    def page_big(self) -> None:
        self.answer(200, {}, b"x" * 5000)

    def page_broken(self) -> None:
        self.answer(200, {"Content-Length": "100"}, b"x" * 10)

    def page_silent(self) -> None:
        time.sleep(1.0)

    def page_slow(self) -> None:
        self.answer(200, {})
        for _ in range(15):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def page_nonsense(self) -> None:
        self.wfile.write(b"neither status nor header\r\n\r\n")


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up early is what some tests are about


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = QuietServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize("page", ["picture", "moved", "agent", "picture?a=b c&d=é#part"])
def test_url(site: str, page: str) -> None:
    assert open_image(f"{site}/{page}").tobytes() == picture().tobytes()


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("no-such-page", "the server answered 404 Not Found"),
        ("html", "not an image of a known format"),
        ("loop", "the server answered 302 .* infinite loop"),
        ("to-file", "the server answered 302 .*not allowed"),
        ("to-ftp", "cannot be fetched .*unknown url type: ftp"),
        ("broken", "the connection broke after 10 of 100 bytes; try again|cannot be fetched .*IncompleteRead"),
        ("nonsense", "cannot be fetched"),
    ],
)
def test_url_errors(site: str, page: str, message: str) -> None:
    with pytest.raises(ImageError, match=f"^{site}/{page}: ({message})") as caught:
        open_image(f"{site}/{page}")
    assert "\n" not in str(caught.value)


def test_url_over_the_size_limit(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "URL_BYTES_LIMIT", 4096)
    with pytest.raises(ImageError, match=f"^{site}/big: larger than 0.0039.* MB; download it yourself"):
        open_image(f"{site}/big")


@pytest.mark.parametrize("page", ["silent", "slow"])  # no answer at all; a byte now and then
def test_url_too_slow(site: str, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    monkeypatch.setattr(images, "URL_TIMEOUT", 0.3)
    start = time.monotonic()
    with pytest.raises(ImageError, match=f"^{site}/{page}: not fetched within 0.3 s; download it yourself"):
        open_image(f"{site}/{page}")
    assert time.monotonic() - start < 0.9


def test_url_without_a_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.png"
        with pytest.raises(ImageError, match=f"^{url}: cannot be fetched .*refused"):
            open_image(url)
    with pytest.raises(ImageError, match="cannot be fetched"):
        open_image("http://[::1/a.png")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://example.org/a.png", "s3://bucket/a.png"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(ImageError, match=f"^{url}: only http and https addresses are read; name a local file"):
        open_image(url)


# --- preprocessor_config.json ---


def test_published_configs_keep_every_field(case: Golden) -> None:
    path = case.folder / "preprocessor_config.json"
    processor = ImageProcessor.from_file(path)
    assert processor.to_dict() == json.loads(path.read_text())
    assert list(processor.to_dict()) == list(json.loads(path.read_text()))


@pytest.mark.parametrize("processor", [ImageProcessor(native=True, max_pixels=4096), ImageProcessor(False, size=384)])
def test_a_processor_made_here_is_written_in_the_published_layout(processor: ImageProcessor, golden_dir: Path) -> None:
    case = "tiny-navit" if processor.native else "tiny-224"
    config = processor.to_dict()
    assert ImageProcessor.from_dict(config) == processor
    published = json.loads((golden_dir / case / "preprocessor_config.json").read_text())
    assert published.keys() <= config.keys()
    assert config["image_processor_type"] == published["image_processor_type"]


def test_resized(golden_dir: Path) -> None:
    fixed = ImageProcessor.from_file(golden_dir / "tiny-224" / "preprocessor_config.json")
    assert fixed.resized(384).grid(10, 20) == (24, 24)
    assert fixed.resized(384).to_dict()["size"] == {"height": 384, "width": 384}
    assert fixed.resized(None).grid(256, 340) == (16, 21)
    assert fixed.resized(None).to_dict()["image_processor_type"] == "GenLIPNaViTImageProcessor"
    with pytest.raises(ConfigError, match="size 100 is not a multiple of patch_size 16"):
        fixed.resized(100)
    with pytest.raises(ConfigError, match="size must be a positive whole number, not 0"):
        fixed.resized(0)


def test_sizes_of_both_kinds() -> None:
    assert ImageProcessor.from_dict(FIXED | {"size": 384}).size == 384
    assert ImageProcessor.from_dict(FIXED | {"image_processor_type": "SiglipImageProcessorFast"}).size == 224
    native = ImageProcessor.from_dict(NATIVE)
    assert (native.native, native.min_pixels, native.max_pixels) == (True, 4096, 262144)
    assert ImageProcessor.from_dict(NATIVE | {"max_pixels": 65536}).max_pixels == 65536


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "image_processor_type is None; known are Siglip"),
        (FIXED | {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIPImageProcessor'; known"),
        (FIXED | {"resample": 3}, "resample is 3; only 2 .bilinear. is supported"),
        (FIXED | {"resample": None}, "resample is None; only 2"),
        (FIXED | {"do_normalize": False}, "do_normalize is False; only True is supported"),
        (NATIVE | {"merge_size": 2}, "merge_size is 2; only 1 is supported"),
        (FIXED | {"size": {"height": 224, "width": 448}}, "size 224 x 448 is not square"),
        (FIXED | {"size": {"shortest_edge": 224}}, "size must have a height and a width"),
        (FIXED | {"size": 225}, "size 225 is not a multiple of patch_size 16"),
        (FIXED | {"size": None}, "size must be a positive whole number, not None"),
        (FIXED | {"patch_size": "16"}, "patch_size must be a positive whole number, not '16'"),
        (FIXED | {"image_mean": 0.5}, "image_mean must be three numbers, not 0.5"),
        (FIXED | {"image_std": [0.5, 0.5]}, r"image_std must be three numbers, not \[0.5, 0.5\]"),
        (FIXED | {"image_std": [0.5, 0.5, 0]}, "image_std must be positive"),
        (FIXED | {"rescale_factor": "x"}, "rescale_factor must be a positive number, not 'x'"),
        (NATIVE | {"size": None}, "min_pixels must be a positive whole number, not None"),
        (NATIVE | {"min_pixels": 300000}, "min_pixels 300000 must lie between one patch .256 pixels. and max_pixels"),
    ],
)
def test_bad_configs_name_file_and_field(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"^{path}: {message}"):
        ImageProcessor.from_file(path)


def test_unreadable_configs(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(ConfigError, match=f"^{path}: no such file; copy it from the published checkpoint"):
        ImageProcessor.from_file(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match=f"^{path}: not valid JSON"):
        ImageProcessor.from_file(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=f"^{path}: expected a JSON object"):
        ImageProcessor.from_file(path)
