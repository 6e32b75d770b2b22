"""Recipes: what is read, what is refused, and that those that come along are sound."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from genlip_mlx.train.plan import describe
from genlip_mlx.train.recipe import RecipeError, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "genlip_mlx" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_come_along(path: Path) -> None:
    assert load_recipe(path.stem) == load_recipe(path)


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
    content = yaml.safe_load(RECIPES[0].read_text()) | {"data": "synth:train:50", "valid_data": "synth:validation:9"}
    content["tokenizer"] = str(golden_dir / "tiny-224")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    text = "\n".join(describe(load_recipe(tmp_path / "r.yaml")))
    for part in ("3.6 M parameters", "tokens      5.7 M", "50 records in synth:train:50", "validation  9 records"):
        assert part in text
    assert "64 image tokens" in text
    assert "50 of the 50 looked at can be used" in text
