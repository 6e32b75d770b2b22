"""Copies of the golden checkpoints to damage, and edits of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

CHECKPOINT_FILES = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model*",
)


@dataclass(frozen=True)
class Folder:
    """A model folder of a test's own."""

    path: Path

    def config(self, **changes: Any) -> None:
        """Set fields of config.json; None takes a field away."""
        file = self.path / "config.json"
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    def tensors(self) -> dict[str, np.ndarray]:
        tensors: dict[str, np.ndarray] = {}
        for file in sorted(self.path.glob("model*.safetensors")):
            tensors |= load_file(file)
        return tensors

    def rewrite(self, change: Callable[[dict[str, np.ndarray]], object]) -> None:
        """Change the tensors in place, saved as one file."""
        tensors = self.tensors()
        change(tensors)
        for file in self.path.glob("model*"):
            file.unlink()
        save_file(tensors, self.path / "model.safetensors", {"format": "pt"})


def copy_of(case: Path, target: Path) -> Folder:
    target.mkdir(parents=True)
    for pattern in CHECKPOINT_FILES:
        for file in case.glob(pattern):
            shutil.copy(file, target / file.name)
    return Folder(target)


@pytest.fixture
def tiny(golden_dir: Path, tmp_path: Path) -> Folder:
    """A copy of tiny-224: E = D, `text_embed_dim` missing, one file."""
    return copy_of(golden_dir / "tiny-224", tmp_path / "tiny-224")


@pytest.fixture
def navit(golden_dir: Path, tmp_path: Path) -> Folder:
    """A copy of tiny-navit: E != D, two shards."""
    return copy_of(golden_dir / "tiny-navit", tmp_path / "tiny-navit")


def listing(folder: Path) -> dict[str, bytes]:
    """Everything under a folder, hidden files too, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
