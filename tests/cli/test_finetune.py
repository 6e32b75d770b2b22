"""genlip-mlx finetune: the reference's losses by the installed command, from data to captions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Golden

from genlip_mlx.train import memory
from genlip_mlx.train import run as running

from .conftest import Call, run

ACCEPTANCE = (
    "--fine-tune-type full --iters 5 --batch-tokens 16384 --learning-rate 1e-3 --lr-schedule constant "
    "--weight-decay 0.01 --grad-clip 1.0 --dtype float32 --no-validate"
)


def rows_of(case_folder: Path, images: Path) -> list[dict[str, str]]:
    samples = json.loads((case_folder / "expected.json").read_text())["samples"]
    return [
        {"image": str((images / s["image"]).resolve()), "prompt": s["prompt"], "caption": s["caption"]} for s in samples
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_five_steps_are_the_references(case: Golden, tmp_path: Path) -> None:
    data = write(tmp_path / "golden.jsonl", rows_of(case.folder, case.images_dir))
    folder = tmp_path / "run"
    outcome = run("finetune", "--model", case.folder, "--data", data, *ACCEPTANCE.split(), "--run-dir", folder)
    assert outcome.code == 0, outcome.err
    metrics = metrics_of(folder)
    np.testing.assert_allclose([m["loss"] for m in metrics], case.expected_json["adamw_5_step_losses"], rtol=1e-3)
    assert {m["tokens"] for m in metrics} == {case.expected_json["packed_tokens"]}  # each sample once a step
    assert outcome.out == f"model      {folder / 'checkpoints' / 'step-5'}\n"


@pytest.fixture
def place(navit: Path, vision_only: Path, golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: `model`, `encoder`, `data.jsonl`, and `tags/` with train.jsonl and valid.jsonl."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(navit)
    Path("encoder").symlink_to(vision_only)
    rows = rows_of(golden_dir / "tiny-navit", golden_dir / "images")
    pages = [row for row in rows if row["image"].endswith("page.png")]
    write(Path("data.jsonl"), (pages * 9)[:10])
    write(Path("wordless.jsonl"), [{"image": row["image"], "label": "page"} for row in rows])
    Path("tags").mkdir()
    write(Path("tags/train.jsonl"), pages * 2)
    write(Path("tags/valid.jsonl"), pages)
    return tmp_path


def finetune(call: Call, words: str) -> Any:
    return call("finetune", *words.split(), "--set", "workers=0", "--set", "valid_captions=1", "--dtype", "float32")


def test_from_data_to_captions(call: Call, place: Path) -> None:
    done = finetune(call, "--model model --data data.jsonl --iters 6 --learning-rate 1e-3 --run-dir run --num-layers 1")
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["validation", "step", "nll", "perplexity"]
    assert [line[0] for line in lines[1:]] == ["before", "best", "last", "adapter"]
    assert float(lines[2][2]) < float(lines[1][2])  # better than before
    assert lines[4][1] == "run/adapters"
    assert "memory      about" in done.err
    assert "validation loss before training" in done.err
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == list(range(7))
    page = json.loads(Path("data.jsonl").read_text().splitlines()[0])["image"]
    spoken = [
        call("caption", page, "--model", "model", *adapter, "--max-tokens", "8", "--json")
        for adapter in ((), ("--adapter-path", "run/adapters"))
    ]
    assert [outcome.code for outcome in spoken] == [0, 0]
    assert spoken[0].out != spoken[1].out
    for number, adapter in enumerate(((), ("--adapter-path", "run/adapters"))):
        assert call("features", page, "--model", "model", *adapter, "--output", f"{number}.npz").code == 0
    with np.load("0.npz") as before, np.load("1.npz") as after:
        assert not np.allclose(before["0"], after["0"])


def test_a_validation_file_beside_the_data_and_epochs(call: Call, place: Path) -> None:
    done = finetune(call, "--model model --data tags/train.jsonl --epochs 3 --adapter-path adapter --seed 3")
    assert done.code == 0, done.err
    assert "3 times through" in done.err
    config = Path("adapter/config.yaml").read_text()
    assert "valid_data: tags/valid.jsonl" in config
    assert "iters: 3" in config
    assert {"adapters.safetensors", "adapter_config.json", "metrics.jsonl"} <= {
        p.name for p in Path("adapter").iterdir()
    }


def test_options_go_before_the_config_file(call: Call, place: Path) -> None:
    Path("c.yaml").write_text(
        "model: model\ndata: data.jsonl\niters: 9\nfine_tune_type: dora\nlora_parameters: {rank: 2, scale: 4.0}\n"
    )
    done = finetune(call, "--config c.yaml --iters 2 --run-dir run --no-validate --set lora_parameters.rank=3")
    assert done.code == 0, done.err
    content = json.loads(Path("run/adapters/adapter_config.json").read_text())
    assert (content["iters"], content["fine_tune_type"]) == (2, "dora")
    assert content["lora_parameters"] == {"rank": 3, "scale": 4.0, "dropout": 0.0}


def test_resume(call: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--model model --data data.jsonl --iters 4 --no-validate --run-dir"
    assert finetune(call, f"{words} whole").code == 0
    real = running.Run.save

    def save(self: Any) -> None:
        real(self)
        if self.trainer.steps_done == 2:
            raise OSError("the power went off")

    monkeypatch.setattr(running.Run, "save", save)
    stopped = finetune(call, f"{words} part --set steps_per_save=1")
    assert stopped.err.endswith("error: the power went off\n")
    monkeypatch.setattr(running.Run, "save", real)
    done = call("finetune", "--resume", "--run-dir", "part")
    assert done.code == 0, done.err
    losses = [[row["loss"] for row in metrics_of(Path(name))] for name in ("whole", "part")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--model model --data data.jsonl", 2, "name the run folder: --run-dir (or --adapter-path)"),
        ("--data data.jsonl --run-dir r", 2, "Missing option '--model'"),
        ("--model model --run-dir r", 2, "Missing option '--data'"),
        ("--model model --data data.jsonl --run-dir r --iters 3 --epochs 1", 2, "either --iters or --epochs"),
        ("--model model --data data.jsonl --run-dir r --epochs 0", 2, "--epochs must be positive, not 0"),
        ("--model model --data data.jsonl --run-dir r --no-validate --val-data x", 2, "no use for --val-data"),
        ("--model model --data data.jsonl --run-dir r --adapter-path a --fine-tune-type full", 2, "--run-dir alone"),
        ("--run-dir r --resume", 1, "r: no run to resume; there is no config.yaml"),
        ("--run-dir r --resume --iters 3", 2, "--resume takes the run as it is"),
        ("--model model --data data.jsonl --run-dir r --iters 0", 1, "iters must be at least 1, not 0"),
        ("--model model --data data.jsonl --run-dir r --learning-rate 0", 1, "learning_rate must be positive"),
        ("--model model --data data.jsonl --run-dir r --num-layers 3", 1, "but the model has 2 blocks"),
        ("--model model --data data.jsonl --run-dir r --parts nose --fine-tune-type full", 1, "not 'nose'"),
        ("--model model --data data.jsonl --run-dir r --config none.yaml", 1, "none.yaml: no such recipe"),
        ("--model model --data data.jsonl --run-dir r --set rank=2", 1, "unknown field rank"),
        ("--model encoder --data data.jsonl --run-dir r", 1, "is vision-only; training needs a text embedding"),
        ("--model nothing --data data.jsonl --run-dir r", 1, "nothing: no such folder"),
        ("--model model --data nothing.jsonl --run-dir r", 1, "nothing.jsonl: no such file or folder"),
        ("--model model --data wordless.jsonl --run-dir r", 1, "no field caption or conversations"),
        ("--model model --data wordless.jsonl --run-dir r", 1, "it has image, label"),
        (
            "--model model --data data.jsonl --run-dir r --caption-column title",
            1,
            "no field title; it has image, prompt, caption",
        ),
        ("--model model --data data.jsonl --run-dir r --prompt-column ask", 1, "no field ask; it has image"),
        ("--model model --data data.jsonl --run-dir r --val-data wordless.jsonl", 1, "no field caption"),
    ],
)
def test_errors(call: Call, place: Path, words: str, code: int, message: str) -> None:
    outcome = finetune(call, words) if "--resume" not in words else call("finetune", *words.split())
    last = outcome.err.splitlines()[-1]
    assert (outcome.code, outcome.out) == (code, "")
    assert last.startswith("error: ")
    assert message in last
    assert not Path("r/checkpoints").exists() or not list(Path("r/checkpoints").iterdir())


def test_a_caption_column_by_another_name(call: Call, place: Path) -> None:
    words = "--model model --data wordless.jsonl --caption-column label --iters 1 --no-validate --run-dir run"
    assert finetune(call, words).code == 0


def test_memory_that_is_not_there(call: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 4e7)
    outcome = finetune(call, "--model model --data data.jsonl --run-dir r --batch-tokens 4096")
    assert outcome.code == 1
    assert "MB, and there are 40 MB; what would fit: " in outcome.error
    assert "--batch-tokens 1024 --grad-accumulation-steps 4 (" in outcome.error
    monkeypatch.setattr(memory, "available", lambda: 1e6)
    outcome = finetune(call, "--model model --data data.jsonl --run-dir r")
    assert outcome.error.endswith("there are 1 MB; a smaller model, or a larger machine")
    assert not Path("r").exists()
