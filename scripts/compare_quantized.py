"""What fewer bits cost: a model at 8, 6, 5, 4 and 3 bits and mixed, plainly rounded and calibrated, against itself.

    python scripts/compare_quantized.py MODEL --calibrate D --data D2 [--json costs.json]

Each copy is written to a temporary folder by the functions behind `genlip-mlx quantize` and held against the full model
on D2, which the calibration must not have seen. Speeds are of this machine. Products with packed weights are slow on a
CPU: --unpack computes with the same weights unpacked to float32, equal to rounding, and leaves the speeds out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import genlip_mlx  # first, since it loads OpenBLAS, which must come before mlx

# isort: split
from rich.console import Console
from rich.table import Table

from genlip_mlx.analysis.comparison import compare, disk_bytes
from genlip_mlx.checkpoint.convert import dequantize, quantize
from genlip_mlx.checkpoint.quantization import choose
from genlip_mlx.config import estimate_parameters
from genlip_mlx.data.sources import open_source
from genlip_mlx.train.calibrate import Calibration, calibrate

COLUMNS = {
    "NLL +": ("nll_difference", "{:+.5f}"),
    "KL": ("kl", "{:.5f}"),
    "cosine": ("feature_cosine", "{:.5f}"),
    "worst": ("worst_feature_cosine", "{:.4f}"),
    "same captions": ("captions_identical", "{:.0%}"),
    "bits/weight": ("bits_per_weight", "{:.2f}"),
    "MB": ("megabytes", "{:.2f}"),
    "encode tok/s": ("encode_tokens_per_second", "{:.0f}"),
    "caption tok/s": ("caption_tokens_per_second", "{:.0f}"),
}


def row(
    options: argparse.Namespace,
    name: str,
    full: Any,
    processor: Any,
    bits: int | None,
    target: float | None,
    learn: bool,
) -> dict[str, Any]:
    """One line of the table: figures by the names of `Comparison.to_dict`."""
    recipe = "mixed_4_8" if bits is None and target is None else None
    quantization = choose(bits, options.q_group_size, recipe=recipe)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        started = time.perf_counter()
        if learn:
            settings = Calibration(
                options.calibrate, options.iters, options.learning_rate, options.batch_tokens, target
            )
            calibrate(options.model, folder, quantization, settings)
        else:
            quantize(options.model, folder, quantization)
        seconds = time.perf_counter() - started
        nbytes = disk_bytes(folder)
        if options.unpack:
            packed, folder = folder, Path(temporary) / "unpacked"
            dequantize(packed, folder, "float32")
        model, _ = genlip_mlx.load(folder)
    found = compare(model, full, processor, open_source(options.data), captions=options.captions)
    side = found.model
    more = {
        "name": name,
        "bits_per_weight": 8 * nbytes / sum(estimate_parameters(full.config).values()),
        "megabytes": nbytes / 1e6,
        "encode_tokens_per_second": None if options.unpack else side.encode_tokens_per_second,
        "caption_tokens_per_second": None if options.unpack else side.caption_tokens_per_second,
        "seconds_to_quantize": seconds,
    }
    return found.to_dict() | more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="unquantized model folder or hub repo")
    parser.add_argument("--calibrate", required=True, metavar="D", help="captions to calibrate on")
    parser.add_argument("--data", required=True, metavar="D2", help="captions to measure on")
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 6, 5, 4, 3])
    parser.add_argument("--target-bpw", type=float, nargs="*", default=[], help="budgets to try as well, calibrated")
    parser.add_argument("--q-group-size", type=int, default=64)
    parser.add_argument("--iters", type=int, default=Calibration.iters)
    parser.add_argument("--learning-rate", type=float, default=Calibration.learning_rate)
    parser.add_argument("--batch-tokens", type=int, default=Calibration.batch_tokens)
    parser.add_argument("--captions", type=int, default=50, help="pictures that are captioned")
    parser.add_argument("--unpack", action="store_true", help="compute with unpacked weights: for a CPU")
    parser.add_argument("--json", help="write everything measured to this file too")
    options = parser.parse_args()
    full, processor = genlip_mlx.load(options.model)
    cases: list[tuple[str, int | None, float | None]] = [(f"{bits} bits", bits, None) for bits in options.bits]
    plans = [(*case, learn) for case in [*cases, ("mixed_4_8", None, None)] for learn in (False, True)]
    plans += [(f"target {target:g}", None, target, True) for target in options.target_bpw]
    rows = []
    for name, bits, target, learn in plans:
        rows.append(row(options, f"{name}{', calibrated' * learn}", full, processor, bits, target, learn))
        print(name, "calibrated" if learn else "plain", f"KL {rows[-1]['kl']:.5f}", flush=True)
        if options.json:  # after each, as a large model takes hours
            Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")
    table = Table("model", *COLUMNS)
    for one in rows:
        cells = [form.format(one[key]) if one[key] is not None else "-" for key, form in COLUMNS.values()]
        table.add_row(one["name"], *cells)
    Console(width=max(120, Console().width)).print(table)  # a file gets whole columns too


if __name__ == "__main__":
    main()
