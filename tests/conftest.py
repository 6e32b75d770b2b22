"""Golden cases for the tests: what the reference implementation computed, and how to compare with it."""

from __future__ import annotations

import genlip_mlx  # first, since it loads OpenBLAS, which must come before mlx

# isort: split
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

mx.set_default_device(mx.cpu)  # what is expected was computed in float32 on a CPU

CASES = ("tiny-224", "tiny-navit")
IMAGE_ARRAYS = ("patches", "hidden", "features", "readout_top5")  # depend on a sample's picture alone


@dataclass(frozen=True)
class Golden:
    """One golden case; `tests/golden/README.md` describes the files.

    `tensors` may hold every k-th row only, and no image arrays where a sample repeats an earlier picture:
    `sample` and `rows` hide both, and work alike on a trimmed and on a whole set.
    """

    folder: Path  # the checkpoint, config.json and so on
    images_dir: Path
    expected_json: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Per sample: image, grid, prompt, caption, n_prompt, loss, greedy_ids, greedy_text."""
        samples: list[dict[str, Any]] = self.expected_json["samples"]
        return samples

    def image_path(self, index: int) -> Path:
        return self.images_dir / self.samples[index]["image"]

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """Arrays of one sample, named without the number: "patches", "hidden.0", "features", "logits", ..."""
        ours = {key: self.samples[index][key] for key in ("image", "grid")}
        twin = next(i for i, other in enumerate(self.samples) if all(other[key] == ours[key] for key in ours))
        arrays = {
            name.removeprefix(f"{twin}."): array
            for name, array in self.tensors.items()
            if name.startswith(f"{twin}.") and name.split(".")[1] in IMAGE_ARRAYS
        }
        own = {
            name.removeprefix(f"{index}."): array
            for name, array in self.tensors.items()
            if name.startswith(f"{index}.")
        }
        return arrays | own

    def expected(self, name: str) -> np.ndarray:
        """One array by its full name, such as "2.features" or "grad.lm_head.weight"."""
        if name in self.tensors:
            return self.tensors[name]
        index, _, rest = name.partition(".")
        return self.sample(int(index))[rest]

    def rows(self, ours: npt.ArrayLike, name: str) -> np.ndarray:
        """The rows of our array (numpy or mlx, float32 or integer) that `expected(name)` holds."""
        array = np.asarray(ours)
        stride = -(-len(array) // len(self.expected(name)))  # ceil
        return array[::stride]


def read_features(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of a features file, and its paths."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            arrays = dict(archive)
        return arrays, arrays.pop("paths").tolist()
    with safe_open(path, "np") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["paths"])


def pytest_report_header() -> str:
    return f"genlip-mlx {genlip_mlx.__version__}, BLAS: {genlip_mlx.blas.loaded or 'as MLX links it'}"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden cases: `GENLIP_GOLDEN`, or the trimmed ones of this repository."""
    return Path(os.environ.get("GENLIP_GOLDEN") or Path(__file__).parent / "golden")


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest, golden_dir: Path) -> Golden:
    """Each golden case in turn."""
    folder = golden_dir / request.param
    return Golden(
        folder=folder,
        images_dir=golden_dir / "images",
        expected_json=json.loads((folder / "expected.json").read_text()),
        tensors=load_file(folder / "expected.safetensors"),
    )
