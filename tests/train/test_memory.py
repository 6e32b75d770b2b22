"""The memory plan: near what is measured, and what it proposes where memory is short."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from genlip_mlx.checkpoint.quantization import choose
from genlip_mlx.config import PRESETS, GenLIPConfig
from genlip_mlx.data.packing import Pack
from genlip_mlx.model.genlip import GenLIP
from genlip_mlx.train import memory
from genlip_mlx.train.adapters import prepare
from genlip_mlx.train.memory import Load, TooLargeError, Trained, check, plan
from genlip_mlx.train.recipe import Recipe
from genlip_mlx.train.trainer import Trainer

SMALL = replace(PRESETS["tiny"], num_hidden_layers=3, vocab_size=512)
PACKED = choose(4, 64).apply(SMALL)


def recipe_of(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {"data": "x", "iters": 1, "init_from": "x", "fine_tune_type": "lora", "dtype": "float32"}
    return Recipe(**fields | changes)


def pack_of(samples: list[tuple[tuple[int, int], int]], config: GenLIPConfig) -> Pack:
    grids, texts = zip(*samples)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, sum(texts)).astype(np.int32)
    patches = rng.standard_normal((sum(h * w for h, w in grids), config.patch_dim), np.float32)
    return Pack(patches, grids, ids, ids, texts, tuple(range(len(texts))))


@pytest.mark.parametrize(
    ("changes", "config", "samples"),
    [
        ({}, SMALL, [((8, 8), 64)] * 12),
        ({}, SMALL, [((32, 32), 128)]),
        ({"grad_checkpoint": True}, SMALL, [((14, 14), 70)] * 5),
        ({"num_layers": 2}, SMALL, [((14, 14), 70)] * 5),
        ({"fine_tune_type": "dora"}, PACKED, [((8, 8), 64)] * 8),
        ({}, PACKED, [((8, 8), 64)] * 8),
        ({"fine_tune_type": "full"}, SMALL, [((14, 14), 70)] * 5),
        ({"fine_tune_type": "full", "optimizer": "muon"}, SMALL, [((14, 14), 70)] * 5),
        ({"fine_tune_type": "full", "parts": ["head"]}, replace(SMALL, vocab_size=32768), [((4, 4), 8)]),
        ({"fine_tune_type": None}, replace(SMALL, vocab_size=16384), [((8, 8), 64)] * 8),
    ],
)
def test_plan_and_peak(
    changes: dict[str, Any], config: GenLIPConfig, samples: list[tuple[tuple[int, int], int]]
) -> None:
    recipe, pack = recipe_of(**changes), pack_of(samples, config)
    gc.collect()
    before = mx.get_active_memory()
    model = GenLIP(config)
    if config.quantization is not None:
        packed = ("self_attn", "mlp", "embeddings", "lm_head")
        nn.quantize(
            model,
            64,
            4,
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized") and any(name in path and "vision" not in path for name in packed)
            ),
        )
    if recipe.fine_tune_type is not None:
        prepare(model, recipe, mx.float32)
    trainer = Trainer(model, recipe)
    mx.eval(model.parameters(), trainer.optimizer.state)
    mx.clear_cache()
    mx.reset_peak_memory()
    trainer.step([pack])
    peak = mx.get_peak_memory() - before
    assert plan(recipe, config, Load.of(pack)).total == pytest.approx(peak, rel=0.15)


def test_what_is_trained() -> None:
    everything = Trained.of(SMALL, recipe_of(fine_tune_type="full"))
    assert everything.blocks == 3
    assert everything.largest == 768 * 256
    assert Trained.of(SMALL, recipe_of(num_layers=1)).blocks == 1
    assert Trained.of(SMALL, recipe_of(fine_tune_type="full", parts=["head"])) == Trained(
        512 * 256, 0, 512 * 256, 512 * 256, 0
    )


def test_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config, load = PRESETS["L16"], Load(8192, 2000, 8192 * 1200)
    recipe = recipe_of(fine_tune_type="full", batch_tokens=8192)
    monkeypatch.setattr(memory, "available", lambda: 16e9)
    with pytest.raises(TooLargeError) as error:
        check(recipe, config, [load])
    assert str(error.value).count("\n") == 0
    assert "and there are 16.00 GB; what would fit: --fine-tune-type lora --grad-checkpoint (" in str(error.value)
    options = [
        r"--batch-tokens 2048 --grad-accumulation-steps 4 \(\d+\.\d\d GB\)",
        r"--grad-checkpoint \(\d+\.\d\d GB\)",
        r"a 4-bit model \(genlip-mlx quantize\) with --grad-checkpoint \(\d+\.\d\d GB\)",
    ]
    with pytest.raises(TooLargeError, match="what would fit: " + "; ".join(options) + "$"):
        check(replace(recipe, fine_tune_type="lora"), config, [load])
    line = check(replace(recipe, fine_tune_type="lora", grad_checkpoint=True), config, [load.scaled(0.5), load])[1]
    assert "of 16.00 GB: weights 2.6" in line
    assert "activations, checkpointed" in line


def test_this_machine_has_some_memory() -> None:
    assert memory.available() > 1e8
