#!/usr/bin/env python3
"""Trim a full set of golden cases to what the repository can hold.

    python scripts/make_golden.py SRC DST

SRC has `images/` and one folder a case: a checkpoint in the published layout, `expected.json` and
`expected.safetensors`. Everything is copied as it is except `expected.safetensors`, which loses what
a test does not need twice: most rows of large arrays, the width of 64-bit integers, and image arrays
of a sample that shows the same picture as an earlier one. `tests/golden/README.md` tells readers the rules.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

LIMIT = 4_000_000  # bytes, all files together

# Every k-th row stays. 5 and 17 share no divisor with the grids' widths (14, 21, 24),
# so the kept patches come from every column of a picture.
STRIDES = {"patches": 17, "hidden": 5, "features": 5, "grad": 11}
IMAGE_KINDS = ("patches", "hidden", "features", "readout_top5")  # these depend on the picture alone
INTEGERS = {"input_ids": np.int32, "labels": np.int32, "position_ids": np.int16, "readout_top5": np.int16}


def kind(name: str) -> str:
    """What an array is: "0.hidden.1" -> "hidden", "grad.ln_post.weight" -> "grad"."""
    first, _, rest = name.partition(".")
    return first if first == "grad" else rest.split(".")[0]


def thin(name: str, array: np.ndarray) -> np.ndarray:
    """Every k-th row of a large matrix; other arrays whole.

    Raises:
        ValueError: if a reader could not tell k from the two lengths.
    """
    stride = STRIDES.get(kind(name), 1) if array.ndim == 2 else 1
    kept = np.ascontiguousarray(array[::stride])
    recovered = -(-len(array) // len(kept))  # ceil, as the reader computes it
    if recovered != stride:
        raise ValueError(
            f"{name}: {len(array)} rows thinned by {stride} read back as {recovered}; choose another stride"
        )
    return kept


def narrow(name: str, array: np.ndarray) -> np.ndarray:
    """Integers in the smallest type of `INTEGERS` for them; floats as they are.

    Raises:
        ValueError: if a value does not fit.
    """
    dtype = INTEGERS.get(kind(name))
    if dtype is None:
        return array
    small = array.astype(dtype)
    if not np.array_equal(small, array):
        raise ValueError(f"{name}: values do not fit {np.dtype(dtype).name}")
    return small


def repeated(samples: list[dict[str, Any]], tensors: dict[str, np.ndarray]) -> set[str]:
    """Image arrays of a sample whose picture and grid an earlier sample has too.

    Raises:
        ValueError: if such an array differs from the earlier sample's.
    """
    names = set()
    for i, sample in enumerate(samples):
        twins = (j for j in range(i) if all(samples[j][key] == sample[key] for key in ("image", "grid")))
        twin = next(twins, None)
        if twin is None:
            continue
        for name in tensors:
            if name.startswith(f"{i}.") and kind(name) in IMAGE_KINDS:
                earlier = f"{twin}.{name.partition('.')[2]}"
                if not np.array_equal(tensors[name], tensors[earlier]):
                    raise ValueError(f"{name} differs from {earlier}, though picture and grid are the same")
                names.add(name)
    return names


def trim(source: Path, target: Path) -> None:
    """Write the trimmed `expected.safetensors` of one case."""
    tensors = load_file(source / "expected.safetensors")
    samples = json.loads((source / "expected.json").read_text())["samples"]
    drop = repeated(samples, tensors)
    kept = {name: narrow(name, thin(name, array)) for name, array in tensors.items() if name not in drop}
    (target / "expected.safetensors").write_bytes(save(kept))


def main() -> int:
    parser = argparse.ArgumentParser(description="Trim a full set of golden cases to what the repository can hold.")
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of the full set")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write; files of the same name are replaced")
    arguments = parser.parse_args()

    files = sorted(path for path in arguments.source.rglob("*") if path.is_file())
    if not any(path.name == "expected.safetensors" for path in files):
        print(f"{arguments.source}: no expected.safetensors in it; name the folder of the full set", file=sys.stderr)
        return 1
    for path in files:
        target = arguments.target / path.relative_to(arguments.source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "expected.safetensors":
            trim(path.parent, target.parent)
        else:
            shutil.copyfile(path, target)

    total = sum(path.stat().st_size for path in arguments.target.rglob("*") if path.is_file())
    print(f"{arguments.target}: {total:,} bytes of at most {LIMIT:,}")
    return 0 if total <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
