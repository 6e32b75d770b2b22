"""genlip-mlx pretrain, plot and tokenizer train, from pictures to captions."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from .conftest import COMMAND

RECIPE = """
model: tiny
model_config: {hidden_size: 32, num_attention_heads: 1, num_hidden_layers: 2, intermediate_size: 48,
  text_embed_dim: null, vocab_size: 400, mrope_section: [6, 5, 5]}
tokenizer: words
data: scenes/metadata.jsonl
valid_data: synth:validation:6
valid_batches: 1
image_size: 64
batch_tokens: 512
iters: 6
warmup: 0.2
steps_per_eval: 3
workers: 1
dtype: float32
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], cwd=folder, capture_output=True, text=True, timeout=120)


def test_from_scenes_to_captions(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for words in (
        ("synth", "--output", "scenes", "--size", "40"),
        ("tokenizer", "train", "--data", "scenes", "--vocab-size", "400", "--output", "words"),
        ("pretrain", "--recipe", "recipe.yaml", "--dry-run"),
        ("pretrain", "--recipe", "recipe.yaml", "--run-dir", "one"),
        ("pretrain", "--recipe", "recipe.yaml", "--run-dir", "two", "--set", "iters=4", "--set", "learning_rate=2e-3"),
        ("plot", "one", "two", "--output", "curves.png"),
    ):
        done = run(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"lr", "grad_norm", "tokens", "label_tokens", "tokens_per_second", "peak_memory_gb"} <= rows[0].keys()
    assert "valid_loss" in rows[2]
    for picture in ("one/curves.png", "curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    image = next((tmp_path / "scenes").rglob("*.jpg"))
    done = run(tmp_path, "caption", str(image), "--model", "one/checkpoints/step-6", "--max-tokens", "5", "--json")
    assert json.loads(done.stdout)["grid"] == [4, 4]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("pretrain",), 2, "name either --recipe or --resume"),
        (("pretrain", "--recipe", "tiny-stage1"), 2, "a new run needs --run-dir"),
        (("pretrain", "--resume", "nothing"), 1, "nothing: no run to resume; there is no config.yaml"),
        (("pretrain", "--resume", "nothing", "--set", "iters=3"), 2, "--resume takes the run as it is"),
        (("pretrain", "--recipe", "none", "--run-dir", "r"), 1, "none: no such recipe"),
        (("pretrain", "--recipe", "tiny-stage1", "--run-dir", "r"), 1, "tokenizer: no tokenizer.json"),
        (("pretrain", "--recipe", "tiny-stage2", "--run-dir", "r"), 1, "runs/tiny-cards"),
        (
            ("pretrain", "--recipe", "tiny-stage1", "--run-dir", "r", "--report-to", "tensorboard"),
            1,
            "wandb or swanlab",
        ),
        (("plot", "nothing"), 1, "nothing: no metrics.jsonl; name a run folder"),
    ],
)
def test_errors(tmp_path: Path, words: tuple[str, ...], code: int, message: str) -> None:
    done = run(tmp_path, *words)
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_a_thousand_useless_records_end_a_run(tmp_path: Path, golden_dir: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"image": "gone.jpg", "caption": "Nothing."}\n' * 1100)
    changes = [
        f"tokenizer={golden_dir / 'tiny-224'}",
        "model_config.vocab_size=2048",
        "data=d.jsonl",
        "valid_data=null",
    ]
    words = [word for change in changes for word in ("--set", change)]
    done = run(tmp_path, "pretrain", "--recipe", "tiny-stage1", "--run-dir", "r", *words)
    assert done.returncode == 1
    why = "error: d.jsonl: none of the first 1000 records can be used. missing file: 1000, for example"
    assert done.stderr.splitlines()[-1].startswith(why)
