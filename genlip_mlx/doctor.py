"""Is this machine fit, and does the package compute here what the reference computes?

Every question becomes a `Check` with a status, a line of what was measured, and a remedy where there is one.
Golden parity is the one that decides: two small checkpoints with what the reference made of them
come with the package (`golden/README.md`).
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from . import __version__, blas
from .checkpoint.hub import resolve
from .checkpoint.lazy import dtype_name
from .checkpoint.load import load, load_model
from .checkpoint.writing import Progress
from .generate import captions
from .info import FUSED_ENCODE_DIMS
from .model.cache import GROWTH, cache_head_dim
from .model.genlip import GenLIP
from .model.sequence import PackedSequence
from .processing.processor import Processor

Status = Literal["ok", "warning", "failed", "not applicable"]
Use = Literal["encode", "decode"]
Mask = Literal["none", "causal", "boolean"]

PACKAGES = ("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "numpy", "pillow", "tokenizers")
OPTIONAL_PACKAGES = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")  # MLX's back ends: one of them is there
CASES = ("tiny-224", "tiny-navit")

# Largest difference from the reference in float32. On a CPU only the order of sums differs.
CPU_TOLERANCES = {"patches": 1e-6, "hidden states": 5e-5, "features": 5e-5, "logits": 2e-4}
# A GPU's matrix units may round float32 inputs to TF32, 10 bits after the point instead of 23 (MLX allows it unless
# MLX_ENABLE_TF32=0). Rounding every product's inputs so gives 0.015, 0.008 and 0.017 on these cases; three times
# that passes. A wrong formula is further off: the reference's values have a spread of 1 to 3.
GPU_TOLERANCES = {"patches": 1e-6, "hidden states": 0.05, "features": 0.025, "logits": 0.05}
# bfloat16 has 7 bits: the mean cosine is 0.9999 on these cases.
BFLOAT16_COSINE = 0.999

SLOW_CPU = 20.0  # GFLOP/s in float32; on one two-core machine the reference BLAS reaches 6, OpenBLAS 150 to 320
KERNEL_TOLERANCE = 0.05  # bfloat16 attention outputs of size 1 to 4: 7 bits in weights, values and result
PROBE_TOKENS = 16  # tokens spoken to time decoding, at most
PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class Device:
    """Where MLX computes by default."""

    backend: Literal["Metal", "CUDA", "CPU"]
    name: str
    cores: int | None  # of the CPU; None for a GPU
    memory_bytes: int | None
    usable_bytes: int | None  # Metal: what the system recommends the GPU to use; CUDA: what is free


@dataclass(frozen=True)
class Product:
    """The rate of a product of two square matrices."""

    dtype: str
    size: int  # rows and columns
    gflops: float  # 10**9 operations a second; a product has 2 * size**3


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference from the reference over all samples and layers."""

    quantity: str
    value: float  # nan if the model gave one
    tolerance: float

    @property
    def within(self) -> bool:
        return self.value <= self.tolerance  # False for nan


@dataclass(frozen=True)
class Parity:
    """One golden case, computed here in float32."""

    case: str
    differences: tuple[Difference, ...]
    greedy_identical: int  # captions whose token ids are the reference's
    greedy_captions: int
    greedy_margin: float  # where ids first differ: how far apart the logits of the two choices are; 0 if none differ
    greedy_tolerance: float
    bfloat16_cosine: float | None  # mean over patches; None where it was not computed

    @property
    def within(self) -> bool:
        cosine = self.bfloat16_cosine is None or self.bfloat16_cosine >= BFLOAT16_COSINE
        return cosine and self.greedy_margin <= self.greedy_tolerance and all(d.within for d in self.differences)


@dataclass(frozen=True)
class Kernel:
    """Whether one attention call has a fused kernel on this GPU, and whether that gives the right numbers."""

    head_dim: int
    use: Use
    mask: Mask
    width: int  # of the arrays: decoding pads the head dim with zeros
    result: Literal["ok", "not served", "wrong"]  # a kernel that breaks off is wrong too
    difference: float | None  # from attention computed in float64; None if there are no numbers


@dataclass(frozen=True)
class ModelProbe:
    """A user's own model on one random picture of 224 x 224 pixels."""

    folder: str
    dtype: str
    load_seconds: float
    image_tokens: int
    encode_seconds: float
    tokens_per_second: float | None  # spoken; None for a vision-only model
    finite: bool  # no feature or logit is nan or infinite


@dataclass(frozen=True)
class Check:
    """The verdict on one question."""

    name: str
    status: Status
    message: str
    remedy: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything that was found out."""

    device: Device
    versions: dict[str, str]
    blas: str
    products: tuple[Product, ...]
    golden: tuple[Parity, ...]
    kernels: tuple[Kernel, ...]
    model: ModelProbe | None
    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        return any(check.status == "failed" for check in self.checks)


def examine(model: str | Path | None = None, progress: Progress | None = None) -> Report:
    """Examine the machine, and a model on it; takes a few seconds, and a large model's loading.

    Args:
        model: a folder or a hub repo id.
        progress: called with the number of steps done and steps in all.

    Raises:
        CheckpointError, ConfigError, TokenizerError, HubError: if the model cannot be loaded.
    """
    folder = None if model is None else resolve(model)  # a wrong name is told before anything is measured
    device, golden = find_device(), golden_folder()
    on_gpu = device.backend != "CPU"
    cases = () if golden is None else CASES
    steps = 2 + len(cases) + (folder is not None)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    products = measure_products(on_gpu)
    advance()
    parities = []
    for case in cases:
        assert golden is not None
        parities.append(compare(golden, case, on_gpu))
        advance()
    kernels = try_kernels() if on_gpu else ()
    advance()
    probe = None
    if folder is not None:
        probe = probe_model(folder)
        advance()

    checks = [check_products(device, products), *map(check_parity, parities)]
    if golden is None:
        remedy = "install genlip-mlx again"
        checks.append(Check("golden parity", "warning", "the reference's results are not installed", remedy))
    checks.append(check_kernels(device, kernels))
    if probe is not None:
        checks.append(check_model(probe))
    return Report(device, find_versions(), describe_blas(), products, tuple(parities), kernels, probe, tuple(checks))


def find_device() -> Device:
    """MLX's default device."""
    default = mx.default_device()
    info = mx.device_info(default)
    name = str(info.get("device_name", "unknown"))
    if default.type == mx.DeviceType.cpu:
        return Device("CPU", name, os.cpu_count(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None)
    if mx.metal.is_available():
        return Device(
            "Metal", name, None, _bytes(info, "memory_size"), _bytes(info, "max_recommended_working_set_size")
        )
    return Device("CUDA", name, None, _bytes(info, "total_memory"), _bytes(info, "free_memory"))


def _bytes(info: dict[str, str | int], key: str) -> int | None:
    value = info.get(key)
    return value if isinstance(value, int) else None


def find_versions() -> dict[str, str]:
    """Versions of this package, Python, what it stands on, and the operating system; nothing is imported for it."""
    versions = {"genlip-mlx": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package not in OPTIONAL_PACKAGES:
                versions[package] = "not installed"
    return versions | {"system": _system()}


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()} {platform.machine()}"


def describe_blas() -> str:
    """The library behind float32 matrix products on the CPU."""
    if sys.platform == "darwin":
        return "Accelerate"
    if blas.loaded is not None:
        return f"OpenBLAS ({blas.loaded}); GENLIP_MLX_BLAS=off goes back to the one that MLX links"
    return "the one that MLX links; OpenBLAS was not loaded"


def measure_products(on_gpu: bool) -> tuple[Product, ...]:
    """Rates of the default device in the types that this package uses on it."""
    if on_gpu:
        return (measure_product(mx.float32, 4096), measure_product(mx.bfloat16, 4096))
    return (measure_product(mx.float32, 1024),)


def measure_product(dtype: mx.Dtype, size: int, seconds: float = 0.3) -> Product:
    """The best of several products of two size x size matrices within `seconds`."""
    a, b = (mx.random.normal((size, size), key=mx.random.key(i)).astype(dtype) for i in (0, 1))
    mx.eval(a, b)
    mx.eval(a[:64] @ b)  # starts threads, compiles kernels
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - start)
    return Product(dtype_name(dtype), size, 2 * size**3 / best / 1e9)


def check_products(device: Device, products: tuple[Product, ...]) -> Check:
    """Slow only where MLX's Linux CPU wheel computes with its own BLAS."""
    message = ", ".join(f"{p.gflops:,.0f} GFLOP/s in {p.dtype} ({p.size} x {p.size})" for p in products)
    slow = device.backend == "CPU" and blas.loaded is None and products[0].gflops < SLOW_CPU
    if not slow or sys.platform == "darwin":
        return Check("matrix products", "ok", message)
    remedy = (
        "OpenBLAS is some 50 times faster: apt-get install libopenblas0-pthread, and do not set GENLIP_MLX_BLAS=off"
    )
    return Check("matrix products", "warning", f"{message}: slow", remedy)


def golden_folder() -> Path | None:
    """The golden cases: package data, or the tests' in a checkout."""
    package = Path(__file__).parent
    folders = (package / "golden", package.parent / "tests" / "golden")
    return next((folder for folder in folders if (folder / CASES[0] / "expected.json").is_file()), None)


def compare(golden: Path, case: str, on_gpu: bool) -> Parity:
    """Compute one golden case in float32 on the default device; on a GPU its features in bfloat16 too.

    Arrays of the reference hold every k-th row, and samples that show an earlier picture hold no image arrays.
    """
    folder = golden / case
    samples = json.loads((folder / "expected.json").read_text())["samples"]
    expected = load_file(folder / "expected.safetensors")
    processor = Processor.from_pretrained(folder)
    model = load_model(folder, "float32")
    half = load_model(folder, "bfloat16") if on_gpu else None
    tolerances = GPU_TOLERANCES if on_gpu else CPU_TOLERANCES
    worst = dict.fromkeys(tolerances, 0.0)
    margins: list[float] = []
    cosines: list[np.ndarray] = []

    def note(quantity: str, ours: mx.array, name: str) -> None:
        if name in expected:
            reference, rows = _same_rows(ours, expected[name])
            difference = float(np.abs(rows - reference).max()) if rows.shape == reference.shape else math.inf
            worst[quantity] = float(np.maximum(worst[quantity], difference))  # keeps nan

    for index, sample in enumerate(samples):
        path = golden / "images" / sample["image"]
        ((pixels, grid),) = processor.images([path])
        patches, ids = mx.array(pixels), mx.array(expected[f"{index}.input_ids"])
        note("patches", patches, f"{index}.patches")
        for layer, state in enumerate(model.hidden_states(patches, [grid])):
            note("hidden states", state, f"{index}.hidden.{layer}")
        note("features", model.encode(patches, [grid]), f"{index}.features")
        note("logits", model(patches, ids, PackedSequence([grid], [ids.size])), f"{index}.logits")
        margins.append(_greedy_margin(model, processor, path, patches, grid, sample))
        if half is not None and f"{index}.features" in expected:
            cosines.append(_cosines(*_same_rows(half.encode(patches, [grid]), expected[f"{index}.features"])))
    return Parity(
        case=case,
        differences=tuple(Difference(name, worst[name], tolerance) for name, tolerance in tolerances.items()),
        greedy_identical=margins.count(0.0),
        greedy_captions=len(margins),
        greedy_margin=float(np.max(margins)),
        # Two choices that near change places when each logit moves by the tolerance.
        greedy_tolerance=2 * tolerances["logits"] if on_gpu else 0.0,
        bfloat16_cosine=float(np.concatenate(cosines).mean()) if cosines else None,
    )


def _same_rows(ours: mx.array, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stride = math.ceil(len(ours) / len(reference))
    return reference, np.array(ours[::stride].astype(mx.float32))


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products: np.ndarray = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return products


def _greedy_margin(
    model: GenLIP, processor: Processor, path: Path, patches: mx.array, grid: tuple[int, int], sample: dict[str, Any]
) -> float:
    """0 if the greedy caption is the reference's; else how far apart the two choices' logits are where they part."""
    assert processor.tokenizer is not None
    stop = processor.tokenizer.stop_id
    wanted = list(takewhile(lambda token: token != stop, sample["greedy_ids"]))
    length = len(sample["greedy_ids"])
    (spoken,) = captions(model, processor, [path], sample["prompt"], max_tokens=length)
    if spoken.tokens == wanted:
        return 0.0
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(spoken.tokens, wanted)))
    ours, theirs = ([*tokens, stop][common] for tokens in (spoken.tokens, wanted))
    text = processor.prompt_ids(sample["prompt"]) + wanted[:common]
    logits = model(patches, mx.array(text, mx.int32), PackedSequence([grid], [len(text)]))[-1]
    # Exactly equal logits are no near tie but a decoder that does not take the largest one.
    return abs(float(logits[ours] - logits[theirs])) or math.inf


def check_parity(parity: Parity) -> Check:
    """The decisive check: this machine computes what the reference computes."""
    name = f"golden {parity.case}"
    greedy = f"{parity.greedy_identical} of {parity.greedy_captions} captions identical"
    if parity.within:
        near = "" if parity.greedy_margin == 0 else " (the others part at a near tie)"
        return Check(name, "ok", f"as the reference computes; {greedy}{near}")
    off = [
        f"{d.quantity} differ by {d.value:.1e} (at most {d.tolerance:.0e})" for d in parity.differences if not d.within
    ]
    if not parity.greedy_margin <= parity.greedy_tolerance:
        off.append(greedy)
    if parity.bfloat16_cosine is not None and not parity.bfloat16_cosine >= BFLOAT16_COSINE:
        off.append(f"features in bfloat16 have cosine {parity.bfloat16_cosine:.4f} (at least {BFLOAT16_COSINE})")
    return Check(name, "failed", "; ".join(off), _parity_remedy(parity))


def _parity_remedy(parity: Parity) -> str:
    patches = parity.differences[0]
    if not patches.within:
        return "the pictures are decoded or resized differently here: install another version of pillow"
    report = "do not trust results of this machine, and report this with the output of `genlip-mlx doctor --json`"
    if parity.greedy_tolerance > 0:
        return (
            f"run again with MLX_ENABLE_TF32=0 set: if that passes, this GPU rounds more than expected; else {report}"
        )
    return report


# Encoding: a picture alone, text rows after a picture, pictures of two sizes.
# Decoding: one query over the part in use of the cache, for captions of one size and of two.
CALLS: tuple[tuple[Use, Mask], ...] = (
    ("encode", "none"),
    ("encode", "causal"),
    ("encode", "boolean"),
    ("decode", "none"),
    ("decode", "boolean"),
)


def try_kernels() -> tuple[Kernel, ...]:
    """Ask MLX for fused attention at the shapes that encoding and decoding use, in bfloat16."""
    return tuple(_try_kernel(head_dim, use, mask) for head_dim in FUSED_ENCODE_DIMS for use, mask in CALLS)


def _try_kernel(head_dim: int, use: Use, mask: Mask) -> Kernel:
    heads, keys = 4, 300
    queries = 1 if use == "decode" else 44 if mask == "causal" else keys
    batch = 2 if mask == "boolean" else 1
    width = cache_head_dim(head_dim) if use == "decode" else head_dim

    def draw(seed: int, rows: int) -> mx.array:
        x = mx.random.normal((batch, rows, heads, head_dim), key=mx.random.key(seed)).astype(mx.bfloat16)
        return mx.pad(x, [(0, 0)] * 3 + [(0, width - head_dim)]).swapaxes(1, 2)

    q = draw(0, queries)
    if use == "decode":  # keys and values are the part in use of a larger array
        room = [(0, 0), (0, 0), (0, -keys % GROWTH), (0, 0)]
        stored = [mx.contiguous(mx.pad(draw(seed, keys), room)) for seed in (1, 2)]
        mx.eval(stored)
        k, v = (x[:, :, :keys] for x in stored)
    else:
        k, v = draw(1, keys), draw(2, keys)
    lengths = np.array([keys, 200])[:batch]
    real = (np.arange(keys) < lengths[:, None])[:, None, None]  # [B, 1, 1, keys]
    asked: mx.array | str | None = {"none": None, "causal": "causal", "boolean": mx.array(real)}[mask]
    try:
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5, mask=asked, force_fused=True)
        mx.eval(out)
    except ValueError:  # how MLX says that it has no such kernel
        return Kernel(head_dim, use, mask, width, "not served", None)
    except RuntimeError:
        return Kernel(head_dim, use, mask, width, "wrong", None)
    seen = np.tril(np.ones((queries, keys), bool), keys - queries) if mask == "causal" else real
    difference = float(np.abs(_float64(out) - _attention(_float64(q), _float64(k), _float64(v), seen, head_dim)).max())
    return Kernel(head_dim, use, mask, width, "ok" if difference <= KERNEL_TOLERANCE else "wrong", difference)


def _float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, head_dim: int) -> np.ndarray:
    scores = np.where(seen, q @ k.swapaxes(-1, -2) * head_dim**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: np.ndarray = weights / weights.sum(axis=-1, keepdims=True) @ v
    return result


def check_kernels(device: Device, kernels: tuple[Kernel, ...]) -> Check:
    """Wrong numbers fail; a call without a kernel is only slower, and expected to have one on Metal alone."""
    name = "fused attention"
    if device.backend == "CPU":
        return Check(name, "not applicable", "a CPU has no fused attention kernels")
    wrong, missing = ([k for k in kernels if k.result == result] for result in ("wrong", "not served"))
    if wrong:
        calls = ", ".join(f"{k.use} at head dim {k.head_dim} with mask {k.mask}" for k in wrong)
        return Check(name, "failed", f"wrong numbers or an error: {calls}", "install another version of mlx")
    if not missing:
        return Check(name, "ok", f"all {len(kernels)} calls served")
    message = (
        f"{len(kernels) - len(missing)} of {len(kernels)} calls served; the others are slower and take more memory"
    )
    if device.backend == "Metal":
        return Check(name, "warning", message, "update mlx, and macOS if that does not help")
    return Check(name, "ok", message)


def probe_model(folder: Path) -> ModelProbe:
    """Load a model as the commands do, encode a random picture, and speak a few tokens.

    Raises:
        CheckpointError, ConfigError, TokenizerError: if it cannot be loaded.
    """
    start = time.perf_counter()
    model, processor = load(folder)
    load_seconds = time.perf_counter() - start
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    pixels, grid = processor.image_processor(Image.fromarray(noise))
    patches = mx.array(pixels)
    features = model.encode(patches, [grid])
    mx.eval(features)  # the first run compiles kernels
    start = time.perf_counter()
    mx.eval(model.encode(patches, [grid]))
    encode_seconds = time.perf_counter() - start
    finite, rate = bool(mx.isfinite(features).all()), None
    if not model.config.vision_only:
        logits, rate = _speak(model, patches, grid)
        finite = finite and bool(mx.isfinite(logits).all())
    dtype = dtype_name(model.ln_post.weight.dtype)
    return ModelProbe(str(folder), dtype, load_seconds, len(pixels), encode_seconds, rate, finite)


def _speak(model: GenLIP, patches: mx.array, grid: tuple[int, int]) -> tuple[mx.array, float]:
    """The last logits of a short greedy caption, and the tokens a second after the first."""
    logits, cache = model.prefill(patches, [grid])
    logits = model.extend(mx.argmax(logits, axis=-1)[:, None], cache)
    mx.eval(logits)
    tokens, start = 0, time.perf_counter()
    while tokens < PROBE_TOKENS and time.perf_counter() - start < PROBE_SECONDS:
        logits = model.extend(mx.argmax(logits, axis=-1)[:, None], cache)
        mx.eval(logits)
        tokens += 1
    return logits, tokens / (time.perf_counter() - start)


def check_model(probe: ModelProbe) -> Check:
    """A model that gives nan or infinity is damaged, or its type has too small a range."""
    if not probe.finite:
        remedy = "the weights may be damaged: download or convert them again"
        return Check("model", "failed", f"{probe.folder}: features or logits are not finite numbers", remedy)
    message = (
        f"{probe.folder}: {probe.dtype}, loaded in {probe.load_seconds:.1f} s; {probe.image_tokens} image tokens "
        f"encoded in {probe.encode_seconds * 1000:,.0f} ms"
    )
    if probe.tokens_per_second is not None:
        message += f"; speaks {probe.tokens_per_second:,.0f} tokens a second"
    return Check("model", "ok", message)
