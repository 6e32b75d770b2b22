"""Runs from start to end: the reference's steps, resuming, killing, two machines, what can go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Golden
from mlx.utils import tree_flatten

from genlip_mlx.checkpoint.hub import best_checkpoint
from genlip_mlx.checkpoint.load import load
from genlip_mlx.data.packing import Pack
from genlip_mlx.data.pipeline import Pipeline
from genlip_mlx.data.sources import open_source
from genlip_mlx.train.recipe import OPTIMIZERS, Recipe
from genlip_mlx.train.run import Run, RunError
from genlip_mlx.train.trainer import DivergedError, Trainer


@pytest.fixture
def golden_data(case: Golden, tmp_path: Path) -> Path:
    """The samples of a golden case as a JSONL file."""
    path = tmp_path / "golden.jsonl"
    rows = [
        {"image": str(case.image_path(i).resolve()), "prompt": sample["prompt"], "caption": sample["caption"]}
        for i, sample in enumerate(case.samples)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(data: Path, model: Path, **changes: Any) -> Recipe:
    processor = json.loads((model / "preprocessor_config.json").read_text())
    fields: dict[str, Any] = {
        "data": str(data),
        "init_from": str(model),
        "native": "NaViT" in processor["image_processor_type"],
        "iters": 5,
        "learning_rate": 1e-3,
        "lr_schedule": "constant",
        "warmup": 0.0,
        "drop_path_rate": 0.0,
        "dtype": "float32",
        "workers": 0,
        "valid_data": None,
    }
    return Recipe(**fields | changes)


def quiet(_: str) -> None:
    pass


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Metrics without what no two runs share."""
    timed = ("tokens_per_second", "peak_memory_gb", "data_wait")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_five_steps_are_the_references(case: Golden, golden_data: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", recipe_of(golden_data, case.folder), log=quiet)
    assert run.train()
    rows = metrics_of(tmp_path / "run")
    expected = case.expected_json
    np.testing.assert_allclose([row["loss"] for row in rows], expected["adamw_5_step_losses"], rtol=1e-3)
    assert rows[0]["loss"] == pytest.approx(expected["packed_loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(expected["grad_global_norm"], rel=1e-4)
    assert rows[0]["tokens"] == expected["packed_tokens"]
    assert rows[0]["label_tokens"] == expected["packed_label_tokens"]


def test_a_course_is_taken_in_order(case: Golden, tmp_path: Path) -> None:
    changes = {"data": "synth:train:300:cards", "shuffle": False, "batch_tokens": 1024}
    run = Run(tmp_path / "run", replace(recipe_of(Path(), case.folder), **changes), log=quiet)
    with run.pipeline as packs:
        seen = [min(next(packs).records) for _ in range(3)]
    assert seen[0] == 0
    assert seen == sorted(seen)


def packs_of(case: Golden, data: Path, budget: int) -> list[Pack]:
    _, processor = load(case.folder)
    with Pipeline(open_source(str(data)), processor, budget=budget, workers=0, shuffle=False, epochs=1) as pipeline:
        return list(pipeline)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("slack", [0.0, 1.0])
def test_gradients_are_the_references(case: Golden, golden_data: Path, checkpointed: bool, slack: float) -> None:
    model, _ = load(case.folder, dtype="float32")
    changes = {"grad_checkpoint": checkpointed, "attention_slack": slack}
    trainer = Trainer(model, recipe_of(golden_data, case.folder, **changes))
    (pack,) = packs_of(case, golden_data, 16384)
    gradients = gradients_of(trainer, [pack])
    for name, norm in case.expected_json["grad_norms"].items():
        assert np.linalg.norm(gradients[name]) == pytest.approx(norm, rel=1e-4), name
    for name in case.tensors:
        if name.startswith("grad."):
            full = gradients[name.removeprefix("grad.")]
            if full.ndim == 1 or full.shape[0] >= len(case.tensors[name]):
                ours, theirs = case.rows(full, name), case.tensors[name]
                assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs), name


def gradients_of(trainer: Trainer, packs: Sequence[Pack]) -> dict[str, np.ndarray]:
    """The mean gradient of one step, seen where the optimiser would see it (unclipped)."""
    seen: dict[str, np.ndarray] = {}

    def update(model: Any, gradients: Any) -> None:
        seen.update({name: np.array(value) for name, value in tree_flatten(gradients)})

    trainer.optimizer.update = update
    trainer.recipe = Recipe(**trainer.recipe.to_dict() | {"grad_clip": 1e9})
    trainer.step(packs)
    return seen


def test_accumulating_packs_gives_the_gradient_of_one(case: Golden, golden_data: Path) -> None:
    whole = packs_of(case, golden_data, 16384)
    parts = packs_of(case, golden_data, 400)
    assert len(whole) == 1
    assert len(parts) > 1
    gradients = []
    for packs in (whole, parts):
        model, _ = load(case.folder, dtype="float32")
        gradients.append(gradients_of(Trainer(model, recipe_of(golden_data, case.folder)), packs))
    for name, value in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], value, rtol=1e-3, atol=2e-6, err_msg=name)


@pytest.fixture
def synth_recipe(golden_dir: Path) -> Recipe:
    """Many small packs, two epochs of them, with drop path and validation."""
    return recipe_of(
        Path("synth:train:40"),
        golden_dir / "tiny-224",
        image_size=64,
        iters=12,
        batch_tokens=700,
        grad_accumulation_steps=2,
        drop_path_rate=0.2,
        lr_schedule="cosine",
        warmup=0.2,
        valid_data="synth:validation:8",
        valid_batches=1,
        steps_per_eval=4,
        steps_per_save=3,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_equals_uninterrupted(synth_recipe: Recipe, tmp_path: Path, optimizer: str) -> None:
    recipe = replace(synth_recipe, optimizer=optimizer)
    assert Run(tmp_path / "whole", recipe, log=quiet).train()
    part = Run(tmp_path / "part", recipe, log=quiet)

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 7:
            os.kill(os.getpid(), signal.SIGINT)

    assert not part.train(interrupt)
    assert (tmp_path / "part" / "checkpoints" / "step-7").is_dir()
    assert Run(tmp_path / "part", resume=True, log=quiet).train()
    assert metrics_of(tmp_path / "part") == metrics_of(tmp_path / "whole")


SCRIPT = """
import sys, genlip_mlx
from genlip_mlx.train.run import Run
from genlip_mlx.train.recipe import recipe_from
import json
if __name__ == "__main__":
    folder, recipe = sys.argv[1], sys.argv[2]
    run = Run(folder, resume=True) if recipe == "resume" else Run(folder, recipe_from(json.loads(recipe)))
    run.train()
"""


def test_killed_at_any_moment_and_resumed(synth_recipe: Recipe, tmp_path: Path) -> None:
    assert Run(tmp_path / "whole", synth_recipe, log=quiet).train()
    rng = np.random.default_rng(0)
    words: str = json.dumps(synth_recipe.to_dict())
    for attempt in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "killed"), words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            # The last one may end, on however slow a machine.
            _, errors = process.communicate(timeout=0.8 + rng.random() if attempt < 39 else 120)
            assert process.returncode == 0, errors.decode()
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        if (tmp_path / "killed" / "config.yaml").exists():
            words = "resume"
        for checkpoint in (tmp_path / "killed" / "checkpoints").glob("step-*"):
            load(checkpoint)  # what is there can be read
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")


def test_best_and_last_checkpoints_are_kept(synth_recipe: Recipe, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", synth_recipe, log=quiet)
    run.train()
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"step-12", f"step-{run.best['step']}"}
    best = best_checkpoint(tmp_path / "run")
    assert best is not None
    assert best.name == f"step-{run.best['step']}"
    model, _ = load(tmp_path / "run")  # a run stands for its best checkpoint
    name, weight = tree_flatten(model.parameters())[-1]
    np.testing.assert_array_equal(weight, tree_flatten(load(best)[0].parameters(), destination={})[name])
    # A second stage starts from it, with pictures read otherwise.
    second = Recipe(
        **synth_recipe.to_dict() | {"init_from": str(tmp_path / "run"), "native": True, "iters": 1, "min_pixels": 1024}
    )
    assert Run(tmp_path / "second", second, log=quiet).train()


def test_a_full_disk_leaves_the_last_checkpoint(
    synth_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from genlip_mlx.train import run as module

    run = Run(tmp_path / "run", synth_recipe, log=quiet)
    real = module.write_safetensors

    def full(*arguments: Any) -> None:
        if run.trainer.steps_done > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(module, "write_safetensors", full)
    with pytest.raises(OSError, match=r"the disk is full; nothing was changed"):
        run.train()
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-4"]
    load(tmp_path / "run" / "checkpoints" / "step-4")


def test_a_loss_that_is_not_finite_changes_nothing(case: Golden, golden_data: Path) -> None:
    model, _ = load(case.folder, dtype="float32")
    trainer = Trainer(model, recipe_of(golden_data, case.folder))
    (pack,) = packs_of(case, golden_data, 16384)
    broken = Pack(**{**vars(pack), "patches": np.full_like(pack.patches, np.nan)})
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    for _ in range(9):
        assert trainer.step([broken]).skipped
    for name, value in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert not trainer.step([pack]).skipped
    for _ in range(9):
        trainer.step([broken])
    with pytest.raises(DivergedError, match=r"not finite for 10 steps in a row, up to step 20; lower learning_rate"):
        trainer.step([broken])


def test_two_machines_are_one_with_twice_the_packs(synth_recipe: Recipe, tmp_path: Path) -> None:
    launch = Path(sys.executable).parent / "mlx.launch"
    fields = synth_recipe.to_dict() | {"drop_path_rate": 0.0, "iters": 6}
    Run(tmp_path / "one", Recipe(**fields), log=quiet).train()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    words = json.dumps(fields | {"grad_accumulation_steps": 1})
    command = [sys.executable, str(script), str(tmp_path / "two"), words]
    subprocess.run(
        [str(launch), "-n", "2", "--backend", "ring", "--", *command], check=True, capture_output=True, timeout=120
    )
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [row["tokens"] for row in two] == [row["tokens"] for row in one]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=1e-5, err_msg=name)


def test_a_folder_with_a_run_is_refused(synth_recipe: Recipe, tmp_path: Path) -> None:
    Run(tmp_path / "run", synth_recipe, log=quiet).pipeline.close()
    with pytest.raises(RunError, match=r"run: holds a run already; resume it, or choose another folder"):
        Run(tmp_path / "run", synth_recipe, log=quiet)
    with pytest.raises(RunError, match=r"nothing: no run to resume; there is no config.yaml"):
        Run(tmp_path / "nothing", resume=True, log=quiet)
