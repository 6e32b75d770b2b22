"""Fine-tuning: what is trained, what an adapter is on disk, and that it goes on, and into the weights, exactly."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from genlip_mlx.checkpoint.adapters import AdapterConfig, AdapterError, attach, fill, load_adapters
from genlip_mlx.checkpoint.convert import convert, export, quantize
from genlip_mlx.checkpoint.errors import CheckpointError
from genlip_mlx.checkpoint.fuse import fuse
from genlip_mlx.checkpoint.load import load, load_model
from genlip_mlx.checkpoint.quantization import choose
from genlip_mlx.model.genlip import GenLIP
from genlip_mlx.train.recipe import Recipe, RecipeError
from genlip_mlx.train.run import Run, RunError
from genlip_mlx.train.trainer import Trainer

SCENES = Path("synth:train:24")
EVERYWHERE = ["self_attn.q_proj", "mlp.fc2", "vision_embeddings.patch_embedding", "embeddings", "in_proj", "lm_head"]


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def plain(golden_dir: Path) -> Path:
    return golden_dir / "tiny-navit"


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model at 4 bits."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    quantize(plain, folder, choose(4, 32))
    return folder


@pytest.fixture
def base(request: pytest.FixtureRequest, plain: Path, packed: Path) -> Path:
    return {"plain": plain, "packed": packed}[request.param]


both = pytest.mark.parametrize("base", ["plain", "packed"], indirect=True)


@pytest.fixture(scope="module")
def data(golden_dir: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden samples, three times over, as a JSONL file."""
    path = tmp_path_factory.mktemp("data") / "samples.jsonl"
    samples = json.loads((plain / "expected.json").read_text())["samples"]
    rows = [
        {"image": str((golden_dir / "images" / s["image"]).resolve()), "prompt": s["prompt"], "caption": s["caption"]}
        for s in samples * 3
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(data: Path, base: Path, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "data": str(data),
        "init_from": str(base),
        "fine_tune_type": "lora",
        "iters": 8,
        "batch_tokens": 2048,
        "learning_rate": 1e-3,
        "warmup": 0.0,
        "drop_path_rate": 0.0,
        "dtype": "float32",
        "workers": 0,
    }
    return Recipe(**fields | changes)


def train(folder: Path, recipe: Recipe) -> Run:
    run = Run(folder, recipe, log=quiet)
    assert run.train()
    return run


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Metrics without what no two runs share."""
    timed = ("tokens_per_second", "peak_memory_gb", "data_wait")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def arrays(model: GenLIP) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def logits(model: GenLIP, processor: Any, golden_dir: Path) -> np.ndarray:
    patches, grid = processor.images([golden_dir / "images" / "page.png"])[0]
    first, cache = model.prefill(mx.array(patches), [grid])
    return np.concatenate([np.array(first), np.array(model.extend(mx.array([[5, 6, 7]]), cache))])


# --- Learning ---


@both
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_learn_and_the_base_stays(base: Path, kind: str, data: Path, tmp_path: Path) -> None:
    before = arrays(load_model(base, "float32"))
    run = train(tmp_path / "run", recipe_of(data, base, fine_tune_type=kind, lora_parameters={"rank": 4}))
    losses = [row["loss"] for row in metrics_of(tmp_path / "run")]
    assert min(losses[-2:]) < 0.75 * losses[0]
    after = arrays(run.trainer.model)
    for name, value in before.items():
        path, _, tensor = name.rpartition(".")
        now = after[name] if name in after else after[f"{path}.linear.{tensor}"]
        np.testing.assert_array_equal(now, value, err_msg=name)


def test_adapters_compute_what_the_base_did_until_they_are_trained(
    base_and_kind: tuple[Path, str], golden_dir: Path
) -> None:
    base, kind = base_and_kind
    model, processor = load(base, "float32")
    expected = logits(model, processor, golden_dir)
    keys = tuple(key for key in EVERYWHERE if kind == "lora" or base.name != "model" or key != "embeddings")
    attach(model, AdapterConfig(kind, keys=keys))
    np.testing.assert_allclose(logits(model, processor, golden_dir), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["plain-lora", "plain-dora", "packed-lora", "packed-dora"])
def base_and_kind(request: pytest.FixtureRequest, plain: Path, packed: Path) -> tuple[Path, str]:
    name, _, kind = request.param.partition("-")
    return ({"plain": plain, "packed": packed}[name], kind)


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_dora_beside_odd_numbers_of_bits(bits: int, plain: Path, tmp_path: Path, golden_dir: Path) -> None:
    quantize(plain, tmp_path / "model", choose(bits, 32))
    model, processor = load(tmp_path / "model", "float32")
    expected = logits(model, processor, golden_dir)
    attach(model, AdapterConfig("dora"))
    np.testing.assert_allclose(logits(model, processor, golden_dir), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        (
            {"fine_tune_type": "full"},
            {"vision_embeddings", "visual", "ln_post", "embeddings", "in_proj", "proj", "lm_head"},
        ),
        ({"fine_tune_type": "full", "parts": ["head"]}, {"proj", "lm_head"}),
        ({"fine_tune_type": "full", "parts": ["text", "head"]}, {"embeddings", "in_proj", "proj", "lm_head"}),
        ({"fine_tune_type": "full", "parts": ["vision"]}, {"vision_embeddings", "visual", "ln_post"}),
        ({"fine_tune_type": "full", "num_layers": 1}, {"visual.layers.1", "ln_post"}),
        ({"num_layers": 1}, {"visual.layers.1"}),
        ({"lora_parameters": {"keys": ["lm_head", "self_attn.q_proj"]}}, {"visual", "lm_head"}),
    ],
)
def test_what_is_trained_changes_and_nothing_else(
    changes: dict[str, Any], trained: set[str], plain: Path, data: Path, tmp_path: Path
) -> None:
    before = arrays(load_model(plain, "float32"))
    run = train(tmp_path / "run", recipe_of(data, plain, iters=2, **changes))
    after = {name.replace(".linear.", "."): value for name, value in arrays(run.trainer.model).items()}
    names = {name for name, value in after.items() if name not in before or not np.array_equal(before[name], value)}
    assert names
    for name in names:
        assert any(name.startswith(f"{part}.") for part in trained), name
    for part in trained:
        assert any(name.startswith(f"{part}.") for name in names), part


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_in_bfloat16(kind: str, plain: Path, data: Path, tmp_path: Path) -> None:
    run = train(
        tmp_path / "run", recipe_of(data, plain, fine_tune_type=kind, dtype="bfloat16", iters=2, batch_tokens=700)
    )
    for name, value in tree_flatten(run.trainer.model.trainable_parameters()):
        assert value.dtype == mx.float32, name
    if kind == "lora":
        assert run.trainer.model.ln_post.weight.dtype == mx.bfloat16


# --- On disk ---


@pytest.fixture(scope="module")
def trained(plain: Path, packed: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters by kind and base, some of them with embedding and head."""
    folder = tmp_path_factory.mktemp("trained")
    for name, base in (("plain", plain), ("packed", packed)):
        for kind in ("lora", "dora"):
            keys = [key for key in EVERYWHERE if (name, kind, key) != ("packed", "dora", "embeddings")]
            recipe = recipe_of(data, base, fine_tune_type=kind, iters=3, lora_parameters={"rank": 4, "keys": keys})
            train(folder / f"{name}-{kind}", recipe)
    return {path.name: path / "adapters" for path in folder.iterdir()}


def test_files_are_mlx_lms(trained: dict[str, Path], plain: Path, golden_dir: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters as mlx_lm_load_adapters

    content = json.loads((trained["plain-lora"] / "adapter_config.json").read_text())
    assert (content["fine_tune_type"], content["num_layers"]) == ("lora", -1)
    assert content["lora_parameters"] == {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": EVERYWHERE}
    assert content["model"] == str(plain)

    class Listed(GenLIP):
        layers = property(lambda self: self.visual.layers)  # where mlx-lm looks for blocks

    for kind in ("lora", "dora"):
        ours, processor = load(plain, "float32", adapter_path=trained[f"plain-{kind}"])
        theirs = Listed(ours.config)
        theirs.load_weights(list(tree_flatten(load_model(plain, "float32").parameters())))
        mlx_lm_load_adapters(theirs, str(trained[f"plain-{kind}"])).eval()
        np.testing.assert_array_equal(logits(theirs, processor, golden_dir), logits(ours, processor, golden_dir))


@both
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fused_equals_unfused(
    base: Path, kind: str, trained: dict[str, Path], plain: Path, golden_dir: Path, tmp_path: Path
) -> None:
    adapter = trained[f"{'plain' if base == plain else 'packed'}-{kind}"]
    model, processor = load(base, "float32", adapter_path=adapter)
    expected = logits(model, processor, golden_dir)
    assert not np.allclose(logits(*load(base, "float32"), golden_dir), expected, atol=0.1)
    fuse(base, adapter, tmp_path / "fused", dequantize=base != plain)
    np.testing.assert_allclose(logits(*load(tmp_path / "fused"), golden_dir), expected, rtol=1e-4, atol=1e-4)
    export(tmp_path / "fused", tmp_path / "published")
    np.testing.assert_allclose(logits(*load(tmp_path / "published"), golden_dir), expected, rtol=1e-4, atol=1e-4)


def test_fused_and_still_quantized(trained: dict[str, Path], plain: Path, golden_dir: Path, tmp_path: Path) -> None:
    quantize(plain, tmp_path / "base", choose(8, 32))
    model, processor = load(tmp_path / "base", "float32", adapter_path=trained["packed-lora"])
    expected = logits(model, processor, golden_dir)
    fuse(tmp_path / "base", trained["packed-lora"], tmp_path / "fused")
    fused, _ = load(tmp_path / "fused")
    assert fused.config.quantization == model.config.quantization
    found, before = (logits(m, processor, golden_dir) for m in (fused, load(tmp_path / "base", "float32")[0]))
    # Quantizing again costs something, and less than the adapter changed.
    assert 0 < np.linalg.norm(found - expected) < 0.2 * np.linalg.norm(before - expected)


def test_an_adapter_of_a_4_bit_base_fits_the_plain_one(trained: dict[str, Path], plain: Path) -> None:
    load(plain, adapter_path=trained["packed-lora"])


# --- Going on ---


def test_resumed_equals_uninterrupted(packed: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        SCENES,
        packed,
        batch_tokens=500,
        iters=7,
        lora_parameters={"dropout": 0.1},
        valid_share=0.2,
        valid_captions=1,
        steps_per_eval=2,
        steps_per_save=4,
    )
    train(tmp_path / "whole", recipe)
    part = Run(tmp_path / "part", recipe, log=quiet)

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    assert not part.train(interrupt)
    files = {path.name for path in (tmp_path / "part" / "checkpoints" / "step-5").iterdir()}
    assert files == {"adapters.safetensors", "adapter_config.json", "optimizer.safetensors", "run.json"}
    resumed = Run(tmp_path / "part", resume=True, log=quiet)
    assert resumed.train()
    assert metrics_of(tmp_path / "part") == metrics_of(tmp_path / "whole")
    for name in ("samples.jsonl", "adapters/adapters.safetensors", "adapters/adapter_config.json"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_validation_brings(plain: Path, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        data,
        plain,
        iters=60,
        learning_rate=0.05,
        warmup=0.0,
        valid_share=0.2,
        valid_captions=2,
        steps_per_eval=1,
        patience=3,
    )
    run = train(tmp_path / "run", recipe)
    rows = metrics_of(tmp_path / "run")
    assert run.stalled
    assert len(rows) == run.best["step"] + 3 < 60
    assert run.best["valid_loss"] == min(row["valid_loss"] for row in rows)
    assert run.last == rows[-1]["valid_loss"]
    assert run.before is not None
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [step for step in range(len(rows) + 1) for _ in range(2)]
    assert all(sample.keys() == {"step", "image", "prompt", "reference", "caption"} for sample in samples)
    # The adapter folder holds the best, not the last.
    best = tmp_path / "run" / "checkpoints" / f"step-{run.best['step']}" / "adapters.safetensors"
    assert (tmp_path / "run" / "adapters" / "adapters.safetensors").read_bytes() == best.read_bytes()


# --- What is refused ---


def test_an_adapter_for_another_model(trained: dict[str, Path], golden_dir: Path, plain: Path, tmp_path: Path) -> None:
    other, adapter = golden_dir / "tiny-224", trained["plain-lora"]
    with pytest.raises(AdapterError, match=r"adapters: is for another model; .*no layer in_proj; it has"):
        load(other, adapter_path=adapter)
    content = json.loads((adapter / "adapter_config.json").read_text())
    content["lora_parameters"]["keys"] = ["self_attn.q_proj"]
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=r"changed: no adapter; there is no adapters.safetensors"):
        load(plain, adapter_path=changed)
    weights = dict(mx.load(str(adapter / "adapters.safetensors")))
    mx.save_safetensors(str(changed / "adapters.safetensors"), weights)
    with pytest.raises(AdapterError, match=r"another model; unexpected \(\d+\): .* and \d+ more"):
        load(plain, adapter_path=changed)
    weights = {name: value for name, value in weights.items() if "q_proj" in name}
    name = "visual.layers.0.self_attn.q_proj.lora_a"
    mx.save_safetensors(str(changed / "adapters.safetensors"), weights | {name: mx.zeros((8, 4))})
    with pytest.raises(AdapterError, match=rf"wrong \(1\): {name} \[8, 4\] instead of \[144, 4\]$"):
        load(plain, adapter_path=changed)
    del weights[name]
    mx.save_safetensors(str(changed / "adapters.safetensors"), weights)
    with pytest.raises(AdapterError, match=rf"missing \(1\): {name}$"):
        load(plain, adapter_path=changed)
    with pytest.raises(AdapterError, match=r"nothing: no adapter; there is no adapter_config.json"):
        load(plain, adapter_path=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fine_tune_type": "full", "lora_parameters": None}, "comes from full fine-tuning"),
        ({"lora_parameters": {"rank": 8, "alpha": 16}}, "lora_parameters must name rank and scale"),
        ({"lora_parameters": {"rank": 8, "scale": 1, "alpha": 16}}, "unknown alpha; known: rank, scale, dropout, keys"),
        ({"lora_parameters": {"rank": 0, "scale": 1}}, "rank must be at least 1, not 0"),
        ({"lora_parameters": {"rank": 8, "scale": "1"}}, "scale must be a number, not '1'"),
        ({"lora_parameters": {"rank": 8, "scale": 1, "dropout": 1}}, r"dropout must lie in \[0, 1\), not 1"),
        ({"lora_parameters": {"rank": 8, "scale": 1, "keys": []}}, "keys must be a list of layer names"),
        ({"num_layers": 0, "lora_parameters": {"rank": 8, "scale": 1}}, "num_layers must be at least 1, or -1"),
        ({"num_layers": 3, "lora_parameters": {"rank": 8, "scale": 1}}, "num_layers is 3, but the model has 2 blocks"),
        ({"fine_tune_type": "qlora", "lora_parameters": {"rank": 8, "scale": 1}}, "must be lora or dora, not 'qlora'"),
    ],
)
def test_adapter_configs_that_are_refused(content: dict[str, Any], message: str, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=message) as error:
        load_adapters(load_model(plain), tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "qlora"}, "fine_tune_type must be lora, dora, full, not 'qlora'"),
        ({"parts": ["head"]}, "parts are for fine_tune_type full"),
        ({"fine_tune_type": "full", "parts": ["nose"]}, "parts are vision, text, head, not 'nose'"),
        ({"num_layers": 0}, "num_layers must be at least 1, or -1 for all, not 0"),
        ({"lora_parameters": {"alpha": 1}}, "lora_parameters: unknown alpha"),
        ({"lora_parameters": {"dropout": 0.1}, "grad_checkpoint": True}, "another dropout"),
        ({"valid_share": 1.0}, "valid_share is a share"),
        ({"patience": -1}, "patience must be at least 0"),
        ({"init_from": None, "model": "tiny", "tokenizer": "x"}, "fine-tuning needs a model to start from"),
    ],
)
def test_recipes_that_are_refused(changes: dict[str, Any], message: str, plain: Path, data: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(data, plain, **changes)


def test_models_that_are_refused(plain: Path, packed: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"model: is quantized; dequantize it first, or train adapters beside it"):
        Run(tmp_path / "a", recipe_of(data, packed, fine_tune_type="full"), log=quiet)
    keys = {"keys": ["embeddings"]}
    with pytest.raises(AdapterError, match=r"embeddings: DoRA has no quantized embeddings"):
        Run(tmp_path / "a", recipe_of(data, packed, fine_tune_type="dora", lora_parameters=keys), log=quiet)
    with pytest.raises(AdapterError, match=r"the model has no layer self_attn.qkv; it has .*self_attn.q_proj"):
        Run(tmp_path / "a", recipe_of(data, plain, lora_parameters={"keys": ["self_attn.qkv"]}), log=quiet)
    with pytest.raises(RecipeError, match=r"num_layers is 3, but the model has 2 blocks"):
        Run(tmp_path / "a", recipe_of(data, plain, fine_tune_type="full", num_layers=3), log=quiet)
    convert(plain, tmp_path / "encoder", vision_only=True)
    with pytest.raises(RunError, match=r"encoder: is vision-only; training needs a text embedding and a head"):
        Run(tmp_path / "a", recipe_of(data, tmp_path / "encoder"), log=quiet)
    train(tmp_path / "run", recipe_of(data, plain, iters=1))
    with pytest.raises(CheckpointError, match=r"run: holds adapters and no model; fuse them with theirs, or"):
        Run(tmp_path / "a", recipe_of(data, tmp_path / "run"), log=quiet)
    assert not (tmp_path / "a").exists()


def test_a_full_disk_leaves_the_adapter_there_was(
    plain: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from genlip_mlx.checkpoint import adapters as module

    run = Run(tmp_path / "run", recipe_of(data, plain, iters=6, steps_per_save=2), log=quiet)
    real = module.write_safetensors

    def full(*arguments: Any) -> None:
        if run.trainer.steps_done > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(module, "write_safetensors", full)
    with pytest.raises(OSError, match=r"the disk is full; nothing was"):
        run.train()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    load(plain, adapter_path=tmp_path / "run" / "adapters")


def test_weights_that_are_not_the_runs(plain: Path, trained: dict[str, Path]) -> None:
    model = load_model(plain, "float32")
    attach(model, AdapterConfig())
    with pytest.raises(AdapterError, match=r"missing .*unexpected"):
        fill(model, trained["plain-lora"], mx.float32)


def test_gradients_with_and_without_checkpointing_are_equal(plain: Path, data: Path) -> None:
    from genlip_mlx.data.pipeline import Pipeline
    from genlip_mlx.train.run import _make_model, make_processor, open_data

    losses = []
    for checkpointed in (False, True):
        recipe = recipe_of(data, plain, grad_checkpoint=checkpointed)
        trainer = Trainer(_make_model(recipe, plain), recipe)
        with Pipeline(open_data(recipe)[0], make_processor(recipe, plain), budget=2048, workers=0) as pipeline:
            losses.append(
                [(result.loss, result.grad_norm) for result in (trainer.step([next(pipeline)]) for _ in range(3))]
            )
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
