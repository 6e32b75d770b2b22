"""Recipes: what is read, what is refused, and that those that come along are sound."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from genlip_mlx.config import estimate_parameters
from genlip_mlx.train.plan import describe
from genlip_mlx.train.recipe import RecipeError, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "genlip_mlx" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_come_along(path: Path) -> None:
    assert load_recipe(path.stem) == load_recipe(path)


def test_there_are_two_stages_at_each_scale() -> None:
    scales = ("tiny", "small", "base", "l16", "so16", "g16")
    stages = {f"{scale}-stage{stage}" for scale in scales for stage in (1, 2)}
    assert {path.stem for path in RECIPES} == stages | {"tiny-cards", "tiny-finish"}
    assert load_recipe("tiny-cards").init_from == "runs/tiny-stage1"
    assert load_recipe("tiny-finish").init_from == "runs/tiny-stage2"
    for scale in scales:
        first, second = load_recipe(f"{scale}-stage1"), load_recipe(f"{scale}-stage2")
        assert not first.native
        assert second.native
        assert second.init_from == ("runs/tiny-cards" if scale == "tiny" else f"runs/{scale}-stage1")
        assert second.learning_rate < first.learning_rate


@pytest.mark.parametrize(
    ("scale", "trunk", "encoder"),
    [("small", 23e6, 0.0), ("base", 92e6, 0.1), ("l16", 334e6, 0.3), ("so16", 466e6, 0.4), ("g16", 1228e6, 1.1)],
)
def test_sizes(scale: str, trunk: float, encoder: float) -> None:
    config = load_recipe(f"{scale}-stage1").config()
    assert estimate_parameters(config)["trunk"] == pytest.approx(trunk, rel=0.01)
    # The paper's table does not count the gate; in billions.
    parts = estimate_parameters(dataclasses.replace(config, gated_attention=False))
    assert round((parts["patch_embedding"] + parts["trunk"]) / 1e9, 1) == encoder


@pytest.mark.parametrize(
    ("scale", "batch", "warmup", "drop_path"),
    [("l16", 32 * 1024, 0.007, 0.1), ("so16", 32 * 1024, 0.007, 0.1), ("g16", 48 * 1024, 0.02, 0.2)],
)
def test_the_papers_settings(scale: str, batch: int, warmup: float, drop_path: float) -> None:
    stages = (f"{scale}-stage1", batch, 270, 8.0e9, 1e-3), (f"{scale}-stage2", 3.6 * 1024, 1200, 37e6, 1e-4)
    for name, samples_a_step, tokens_a_sample, samples, peak in stages:
        recipe = load_recipe(name)
        assert recipe.grad_accumulation_steps * recipe.batch_tokens == pytest.approx(samples_a_step * tokens_a_sample)
        assert recipe.iters * samples_a_step == pytest.approx(samples, rel=1e-4)
        assert (recipe.learning_rate, recipe.min_learning_rate) == (peak, 1e-6)
        assert (recipe.warmup, recipe.drop_path_rate) == (warmup, drop_path)
        assert (recipe.adam_beta1, recipe.adam_beta2, recipe.adam_eps) == (0.9, 0.95, 1e-8)
        assert (recipe.weight_decay, recipe.grad_clip) == (0.01, 1.0)


def test_changes_on_the_command_line() -> None:
    changes = ["iters=7", "learning_rate=1e-3", "model_config.hidden_size=96", "valid_data=null", "data=a=b.jsonl"]
    recipe = load_recipe("tiny-stage1", changes)
    assert (recipe.iters, recipe.learning_rate, recipe.valid_data, recipe.data) == (7, 1e-3, None, "a=b.jsonl")
    assert recipe.config().hidden_size == 96


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("itres=7", "unknown field itres; known: data, iters"),
        ("iters=many", "iters has the wrong type: 'many'"),
        ("iters=0", "iters must be at least 1, not 0"),
        ("iters=null", "field iters is missing"),
        ("native=1", "native has the wrong type: 1"),
        ("warmup=1.5", r"warmup is a share of iters in \[0, 1\), not 1.5"),
        ("optimizer=sgd", "optimizer must be adamw or muon, not 'sgd'"),
        ("lr_schedule=linear", "lr_schedule must be cosine or constant, not 'linear'"),
        ("learning_rate=-1", "learning_rate must be positive, not -1"),
        ("model=huge", "unknown model 'huge'; presets are tiny, small"),
        ("tokenizer=null", "a model made anew needs a tokenizer"),
        ("init_from=x", "name either model .* or init_from"),
        ("iters", "--set takes key=value, not 'iters'"),
        ("iters.x=1", "--set iters.x: iters is no mapping"),
    ],
)
def test_what_is_refused(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("tiny-stage1", [change])


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing: no such recipe; a YAML file, or one of .*tiny-stage1"):
        load_recipe("nothing")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match=r"a.yaml: not valid YAML"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- a")
    with pytest.raises(RecipeError, match=r"b.yaml: a recipe is a mapping of fields"):
        load_recipe(tmp_path / "b.yaml")


def test_a_model_that_cannot_be(tmp_path: Path) -> None:
    for change, message in (
        ("model_config.hidden_size=193", "model_config: hidden_size 193 is not a multiple of num_attention_heads 3"),
        ("model_config.depth=3", "model_config: .*depth"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe("tiny-stage1", [change]).config()


def test_a_plan(tmp_path: Path, golden_dir: Path) -> None:
    content = yaml.safe_load((RECIPES[0].parent / "tiny-stage1.yaml").read_text())
    content |= {"data": "synth:train:50", "valid_data": "synth:validation:9", "iters": 1400, "batch_tokens": 4096}
    content["tokenizer"] = str(golden_dir / "tiny-224")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    text = "\n".join(describe(load_recipe(tmp_path / "r.yaml")))
    for part in ("3.3 M parameters", "tokens      5.7 M", "50 records in synth:train:50", "validation  9 records"):
        assert part in text
    assert "64 image tokens" in text
    assert "50 of the 50 looked at can be used" in text
