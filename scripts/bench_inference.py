"""How fast this machine encodes and captions, beside its own matrix products.

    python scripts/bench_inference.py [--preset L16] [--json bench.json]

Random weights of a preset's full size. Each figure is the best of a few runs (medians for decoding), and the
sgemm rate is measured in turn with them, since machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import genlip_mlx  # first, since it loads OpenBLAS, which must come before mlx

# isort: split
import mlx.core as mx
from rich.console import Console
from rich.table import Table

from genlip_mlx.config import PRESETS, GenLIPConfig
from genlip_mlx.model.genlip import GenLIP

GRID = (14, 14)  # 224 x 224 pixels
GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_gflops(dtype: mx.Dtype, size: int = 2048) -> float:
    a, b = (mx.random.normal((size, size)).astype(dtype) for _ in range(2))
    mx.eval(a, b)
    return 2e-9 * size**3 / best_seconds(lambda: a @ b.T, 3)


def encoder_flops(config: GenLIPConfig, images: int) -> float:
    """Products alone, two operations a multiply-add; norms and activations count as nothing."""
    d, m = config.hidden_size, GRID[0] * GRID[1]
    ffn = (3 if config.use_swiglu_ffn else 2) * d * config.intermediate_size
    projections = (5 if config.gated_attention else 4) * d * d
    block = 2 * m * (projections + ffn) + 4 * m * m * d
    return images * (config.num_hidden_layers * block + 2 * m * config.patch_dim * d)


def bench_encode(model: GenLIP, dtype: mx.Dtype, batch: int, repeats: int) -> dict[str, float]:
    patches = mx.random.normal((batch * GRID[0] * GRID[1], model.config.patch_dim))
    grids = [GRID] * batch
    mx.eval(patches, model.encode(patches, grids))
    before = matmul_gflops(dtype)
    seconds = best_seconds(lambda: model.encode(patches, grids), repeats)
    matmul = max(before, matmul_gflops(dtype))
    gflops = encoder_flops(model.config, batch) / seconds / 1e9
    return {
        "batch": batch,
        "images_per_second": batch / seconds,
        "gflops": gflops,
        "matmul_gflops": matmul,
        "share_of_matmul": gflops / matmul,
    }


def bench_decode(model: GenLIP, batch: int, tokens: int) -> dict[str, float]:
    patches = mx.random.normal((batch * GRID[0] * GRID[1], model.config.patch_dim))
    mx.eval(patches)
    start = time.perf_counter()
    logits, cache = model.prefill(patches, [GRID] * batch)
    logits = model.extend(mx.zeros((batch, 6), mx.int32), cache)
    current = mx.argmax(logits, axis=-1)
    mx.eval(current)
    prefill = time.perf_counter() - start
    times = []
    for _ in range(tokens):
        start = time.perf_counter()
        current = mx.argmax(model.extend(current[:, None], cache), axis=-1)
        mx.eval(current)
        times.append(time.perf_counter() - start)
    early, late = statistics.median(times[5:16]), statistics.median(times[-11:])
    return {
        "batch": batch,
        "prefill_seconds": prefill,
        "tokens_per_second": batch / statistics.median(times),
        "seconds_a_token_at_10": early,
        f"seconds_a_token_at_{tokens - 6}": late,
        "late_to_early": late / early,
    }


def bench_start_up(repeats: int) -> dict[str, float]:
    """Seconds of whole processes: `--help`, and one caption of 8 tokens with the tiny golden model."""
    command = [sys.executable, "-m", "genlip_mlx"]
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/tiny"
        picture = str(GOLDEN / "images" / "astronaut.jpg")
        convert = [*command, "convert", "--hf-path", str(GOLDEN / "tiny-navit"), "--mlx-path", model]
        subprocess.run(convert, check=True, capture_output=True)
        runs = {"help": ["--help"], "caption": ["caption", picture, "--model", model, "--max-tokens", "8"]}
        seconds: dict[str, float] = {}
        for name, words in runs.items():
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                subprocess.run([*command, *words], check=True, capture_output=True)
                times.append(time.perf_counter() - start)
            seconds[name] = min(times)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="L16", choices=PRESETS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=206, help="tokens decoded")
    parser.add_argument("--json", help="write the figures to this file too")
    options = parser.parse_args()
    gpu = mx.default_device().type == mx.DeviceType.gpu
    dtype = getattr(mx, options.dtype or ("bfloat16" if gpu else "float32"))

    model = GenLIP(PRESETS[options.preset])
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    figures = {
        "preset": options.preset,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "device": str(mx.default_device()),
        "blas": genlip_mlx.blas.loaded,
        "mlx": mx.__version__,
        "encode": [bench_encode(model, dtype, batch, options.repeats) for batch in (1, 8)],
        "decode": [bench_decode(model, batch, options.tokens) for batch in (1, 8)],
        "start_up_seconds": bench_start_up(options.repeats),
    }
    one, many = figures["decode"]
    figures["batched_to_single"] = many["tokens_per_second"] / one["tokens_per_second"]

    console = Console()
    console.print(f"{options.preset}, random weights, {figures['dtype']}, {figures['device']}, 224 x 224 pictures")
    table = Table("encode: batch", "pictures/s", "GFLOP/s", "matmul GFLOP/s", "share")
    for row in figures["encode"]:
        numbers = (row["images_per_second"], row["gflops"], row["matmul_gflops"])
        table.add_row(str(row["batch"]), *(f"{x:.2f}" for x in numbers), f"{row['share_of_matmul']:.0%}")
    console.print(table)
    late = f"token {options.tokens - 6}"
    table = Table("decode: batch", "prefill s", "tokens/s", "token 10, ms", f"{late}, ms", "ratio")
    for row in figures["decode"]:
        early_ms, late_ms = (1e3 * row[k] for k in row if k.startswith("seconds_a_token"))
        table.add_row(
            str(row["batch"]),
            f"{row['prefill_seconds']:.2f}",
            f"{row['tokens_per_second']:.2f}",
            f"{early_ms:.1f}",
            f"{late_ms:.1f}",
            f"{row['late_to_early']:.2f}",
        )
    console.print(table)
    console.print(f"8 captions at once against one after another: {figures['batched_to_single']:.2f} times as fast")
    table = Table("start-up", "s")
    for name, seconds in figures["start_up_seconds"].items():
        table.add_row(name, f"{seconds:.2f}")
    console.print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
