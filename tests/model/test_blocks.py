"""Drop path, initial weights, and the parameter count."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from model.random_case import random_model, random_pack, small_config

from genlip_mlx.config import estimate_parameters
from genlip_mlx.model.attention import PackedContext
from genlip_mlx.model.genlip import GenLIP, drop_path_factors, initialize
from genlip_mlx.model.rope import Rope
from genlip_mlx.model.sequence import PackedSequence

RATE = 0.25


@pytest.mark.parametrize("outputs_only", [False, True])
def test_drop_path_drops_whole_samples(outputs_only: bool) -> None:
    # Image rows and text rows of a sample share one lot, in the last block too.
    mx.random.seed(0)
    sequence = PackedSequence([(1, 3)] * 200, [4] * 200)
    table = Rope(small_config()).table(sequence.positions)
    (kept,) = drop_path_factors(RATE, 1, 200)
    packed = PackedContext(sequence, table, outputs_only, kept=kept)
    # Streams hold all pictures, then all texts; rows that predict come sample after sample.
    number = np.arange(200)
    samples = np.repeat(number, 5) if outputs_only else np.concatenate([np.repeat(number, 3), np.repeat(number, 4)])
    for branch in (0, 1):
        out = np.asarray(packed.drop_path(mx.ones((len(samples), 4)), branch))
        np.testing.assert_array_equal(out, np.repeat(np.asarray(kept[branch])[samples][:, None], 4, axis=1))
    assert packed.drop_path(mx.ones((len(samples), 4), mx.bfloat16), 0).dtype == mx.bfloat16


def test_drop_path_factors_keep_the_mean() -> None:
    mx.random.seed(0)
    factors = drop_path_factors(RATE, 2, 10000)
    assert factors.shape == (2, 2, 10000)
    assert set(np.unique(np.asarray(factors)).tolist()) == {0.0, float(np.float32(1) / np.float32(1 - RATE))}
    # The standard deviation of one factor is sqrt(rate / (1 - rate)) = 0.58.
    assert factors.mean().item() == pytest.approx(1, rel=4 * 0.58 / 40000**0.5)
    assert not mx.array_equal(factors, drop_path_factors(RATE, 2, 10000))


def test_checkpointing_repeats_the_same_drop_paths() -> None:
    config = small_config(drop_path_rate=0.5)
    model = random_model(config)
    model.train()
    pack = random_pack(config, [(2, 2)] * 4, [2] * 4)
    sequence = PackedSequence(pack.grids, pack.text_lengths)

    def gradients(checkpoint: bool) -> dict[str, mx.array]:
        def loss(model: GenLIP) -> mx.array:
            return (model.outputs(pack.patches, pack.input_ids, sequence, checkpoint) ** 2).sum()

        mx.random.seed(0)
        return dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))

    plain, again = gradients(False), gradients(True)
    for name, value in plain.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_model_drops_paths_only_while_training() -> None:
    config = small_config(drop_path_rate=0.5)
    model, plain = random_model(config), random_model(small_config())
    pack = random_pack(config, [(2, 2)] * 8, [2] * 8)
    sequence = PackedSequence(pack.grids, pack.text_lengths)
    expected = plain(pack.patches, pack.input_ids, sequence)
    assert mx.array_equal(model(pack.patches, pack.input_ids, sequence), expected)
    model.train()
    mx.random.seed(0)
    assert not mx.allclose(model(pack.patches, pack.input_ids, sequence), expected)
    model.eval()
    assert mx.array_equal(model(pack.patches, pack.input_ids, sequence), expected)


def initialized(seed: int = 0, **fields: Any) -> dict[str, mx.array]:
    config = small_config(
        **{"head_dim": 32, "intermediate_size": 160, "vocab_size": 300, "text_embed_dim": 48, "patch_size": 8} | fields
    )
    model = GenLIP(config)
    initialize(model, mx.random.key(seed))
    return dict(tree_flatten(model.parameters()))


def test_initial_distributions() -> None:
    weights = initialized(initializer_range=0.03)
    seen = set()
    for name, value in weights.items():
        w = np.asarray(value)
        _, _, kind = name.rpartition(".")
        if kind == "bias":
            seen.add("bias")
            assert not w.any(), name
        elif kind == "lambda1":
            seen.add("LayerScale")
            assert np.all(w == np.float32(0.1)), name
        elif "norm" in name or "ln_post" in name:
            seen.add("norm")
            assert np.all(w == 1), name
        elif "self_attn" in name:
            seen.add("attention")
            bound = (6 / sum(w.shape)) ** 0.5
            assert np.abs(w).max() <= bound, name
            assert np.abs(w).max() > 0.99 * bound, name
            assert w.std() == pytest.approx(bound / 3**0.5, rel=0.05), name
            assert abs(w.mean()) < 5 * bound / w.size**0.5, name
        else:
            seen.add("normal")
            assert w.std() == pytest.approx(0.03, rel=0.05), name
            assert abs(w.mean()) < 5 * 0.03 / w.size**0.5, name
            assert np.abs(w).max() > 3 * 0.03, name  # a normal, not a uniform, distribution
    assert seen == {"bias", "LayerScale", "norm", "attention", "normal"}


def test_initial_weights_follow_the_key_and_differ_from_each_other() -> None:
    first, again, other = initialized(0), initialized(0), initialized(1)
    matrices = [name for name, value in first.items() if value.ndim == 2]
    assert all(mx.array_equal(first[name], again[name]) for name in first)
    assert not any(mx.array_equal(first[name], other[name]) for name in matrices)
    starts = {tuple(first[name][0, :8].tolist()) for name in matrices}
    assert len(starts) == len(matrices)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gated_attention": False},
        {"use_swiglu_ffn": False, "hidden_act": "gelu_pytorch_tanh"},
        {"ls_init_value": 0.0},
        {"text_embed_dim": 24},
        {"vision_only": True},
        {"vision_only": True, "text_embed_dim": 24},
        {"num_hidden_layers": 3, "num_channels": 1},
        {"gated_attention": False, "use_swiglu_ffn": False, "ls_init_value": 0.0, "text_embed_dim": 24},
    ],
)
def test_estimate_parameters(fields: dict[str, Any]) -> None:
    config = small_config(**fields)
    parts = {
        "vision_embeddings": "patch_embedding",
        "visual": "trunk",
        "ln_post": "trunk",
        "embeddings": "text_embedding",
        "in_proj": "text_embedding",
        "proj": "head",
        "lm_head": "head",
    }
    counted = dict.fromkeys(("patch_embedding", "trunk", "text_embedding", "head"), 0)
    for name, value in tree_flatten(GenLIP(config).parameters()):
        counted[parts[name.partition(".")[0]]] += value.size
    assert estimate_parameters(config) == counted


def test_linear_layers_can_be_quantized() -> None:
    # Layers are replaced in place: every product must go through its layer. The patch kernel is never packed.
    model = random_model(small_config(head_dim=32, intermediate_size=64, patch_size=8, text_embed_dim=96))
    pack = random_pack(model.config, [(2, 2), (1, 3)], [2, 1])
    sequence = PackedSequence(pack.grids, pack.text_lengths)
    exact = np.asarray(model(pack.patches, pack.input_ids, sequence))
    nn.quantize(
        model,
        group_size=32,
        bits=8,
        class_predicate=lambda name, layer: hasattr(layer, "to_quantized") and "patch_embedding" not in name,
    )
    matrices = {
        name: w.dtype for name, w in tree_flatten(model.parameters()) if name.endswith("weight") and w.ndim == 2
    }
    assert matrices.pop("vision_embeddings.patch_embedding.weight") == mx.float32
    assert set(matrices.values()) == {mx.uint32}
    ours = np.asarray(model(pack.patches, pack.input_ids, sequence))
    cosine = (ours * exact).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_stays_half(dtype: mx.Dtype) -> None:
    # One float32 table or factor let through would make everything after it float32.
    model = random_model(small_config(text_embed_dim=12, drop_path_rate=0.1))
    pack = random_pack(model.config, [(2, 2), (1, 3), (1, 3)], [2, 1, 2])
    sequence = PackedSequence(pack.grids, pack.text_lengths, slack=10)
    exact = [model(pack.patches, pack.input_ids, sequence), model.encode(pack.patches, pack.grids)]
    model.set_dtype(dtype)
    states = model.hidden_states(pack.patches, pack.grids)
    logits, cache = model.prefill(pack.patches, pack.grids)
    said = model.extend(mx.array([[1, 2], [3, 4], [5, 6]]), cache)
    ours = [model(pack.patches, pack.input_ids, sequence), model.encode(pack.patches, pack.grids)]
    arrays = [*states, logits, said, *ours, *(array for layer in cache.layers for array in layer)]
    model.train()
    arrays.append(model(pack.patches, pack.input_ids, sequence))
    assert {array.dtype for array in arrays} == {dtype}
    for half, full in zip(ours, exact):
        assert float(mx.abs(half.astype(mx.float32) - full).mean() / mx.abs(full).mean()) < 0.05
