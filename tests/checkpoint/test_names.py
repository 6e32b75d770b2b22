"""The table of tensors, and what config.json and tensors say of each other."""

from __future__ import annotations

import dataclasses
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from genlip_mlx.checkpoint.errors import CheckpointError
from genlip_mlx.checkpoint.lazy import LazyTensor
from genlip_mlx.checkpoint.names import PATCH_KERNEL, check, expected_shapes, published, reconcile
from genlip_mlx.checkpoint.reading import open_checkpoint
from genlip_mlx.config import PRESETS, ConfigError, GenLIPConfig, estimate_parameters
from genlip_mlx.model.genlip import GenLIP

from .conftest import Folder

TINY = GenLIPConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=40,
    text_embed_dim=32,
    mrope_section=(4, 6, 6),
)
VARIANTS = {
    "bridged": TINY,
    "one width": dataclasses.replace(TINY, text_embed_dim=None),
    "ungated": dataclasses.replace(TINY, gated_attention=False),
    "mlp": dataclasses.replace(TINY, use_swiglu_ffn=False, hidden_act="gelu_pytorch_tanh"),
    "no layer scale": dataclasses.replace(TINY, ls_init_value=0.0),
    "vision only": dataclasses.replace(TINY, vision_only=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_is_the_model(variant: str) -> None:
    config = VARIANTS[variant]
    model = {name: tuple(value.shape) for name, value in tree_flatten(GenLIP(config).parameters())}
    assert expected_shapes(config) == model


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_has_the_parameters_that_the_config_counts(preset: str) -> None:
    config = PRESETS[preset]
    parameters = sum(math.prod(shape) for shape in expected_shapes(config).values())
    assert parameters == sum(estimate_parameters(config).values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_read_from_the_tensors(variant: str) -> None:
    config = VARIANTS[variant]
    stated = {"num_attention_heads": 2, "rope_scaling": {"type": "default", "mrope_section": [4, 6, 6]}}
    if config.vision_only:  # nothing there tells of the text side
        stated |= {"vision_only": True, "vocab_size": 40, "text_embed_dim": 32}
    tensors = {name: LazyTensor.of(mx.zeros(shape)) for name, shape in expected_shapes(config).items()}
    shapes = {name: tensor.shape for name, tensor in published(tensors, config).items()}
    assert reconcile(stated, shapes, "here") == config


def test_the_text_width_comes_from_the_embedding(tiny: Folder, navit: Folder) -> None:
    assert open_checkpoint(tiny.path).config.embed_dim == 64
    config = open_checkpoint(navit.path).config
    assert (config.hidden_size, config.embed_dim) == (144, 96)


@pytest.mark.parametrize(
    ("field", "value", "evidence"),
    [
        ("hidden_size", 128, r"ln_post\.weight is \[64\]"),
        ("intermediate_size", 100, r"visual\.layers\.0\.mlp\.fc1\.weight is \[96, 64\]"),
        ("num_hidden_layers", 3, r"the last block is visual\.layers\.1"),
        ("vocab_size", 500, r"embeddings\.weight is \[448, 64\]"),
        ("text_embed_dim", 32, r"embeddings\.weight is \[448, 64\]"),
        ("patch_size", 14, r"vision_embeddings\.patch_embedding\.weight is \[64, 3, 16, 16\]"),
        ("num_channels", 1, r"vision_embeddings\.patch_embedding\.weight is \[64, 3, 16, 16\]"),
        ("gated_attention", False, r"visual\.layers\.0\.self_attn\.q_proj\.weight is \[128, 64\]"),
        ("use_swiglu_ffn", False, r"visual\.layers\.0\.mlp\.gate_fc\.weight exists"),
        ("ls_init_value", 0.0, r"layer_scale1\.lambda1 exists"),
    ],
)
def test_a_config_that_contradicts_its_tensors_names_both(
    tiny: Folder, field: str, value: object, evidence: str
) -> None:
    tiny.config(**{field: value})
    with pytest.raises(
        CheckpointError, match=rf"tiny-224: config\.json says {field} {str(value).lower()}, but {evidence}"
    ):
        open_checkpoint(tiny.path)


def test_all_contradictions_are_told_at_once(tiny: Folder) -> None:
    tiny.config(hidden_size=128, intermediate_size=100)
    with pytest.raises(CheckpointError, match=r"hidden_size 128.*; config.json says intermediate_size 100"):
        open_checkpoint(tiny.path)


def test_stated_nothing_means_left_out(tiny: Folder) -> None:
    whole = open_checkpoint(tiny.path).config
    tiny.config(hidden_size=None, vocab_size=None, gated_attention=None, ls_init_value=None, patch_size=None)
    assert open_checkpoint(tiny.path).config == whole


def test_the_head_count_comes_from_the_config_alone(tiny: Folder) -> None:
    tiny.config(num_attention_heads=4, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
    assert open_checkpoint(tiny.path).config.num_attention_heads == 4
    tiny.config(num_attention_heads=None)
    with pytest.raises(ConfigError, match=r"tiny-224: config\.json: missing field num_attention_heads"):
        open_checkpoint(tiny.path)


def test_missing_unexpected_and_wrong_tensors_come_in_one_error(tiny: Folder) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        del tensors["lm_head.weight"], tensors["visual.layers.1.mlp.fc2.bias"]
        tensors["visual.layers.1.mlp.fc1.bias"] = np.zeros(95, np.float32)
        tensors["visual.layers.0.mlp.fc1.bias"] = np.zeros(96, np.int64)
        tensors["pooler.weight"] = np.zeros((2, 2), np.float32)

    tiny.rewrite(damage)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tiny.path)
    message = str(error.value)
    assert "\n" not in message
    assert str(tiny.path) in message
    assert "missing (2): visual.layers.1.mlp.fc2.bias, lm_head.weight" in message
    assert "unexpected (1): pooler.weight" in message
    assert "visual.layers.1.mlp.fc1.bias [95] instead of [96]" in message
    assert "visual.layers.0.mlp.fc1.bias int64 instead of float32" in message


def test_long_lists_are_cut() -> None:
    expected = {f"layer{i}": ((1,), mx.float32) for i in range(14)}
    with pytest.raises(CheckpointError, match=r"missing \(14\): layer0, .*, layer9 and 4 more$"):
        check({}, expected, "here")


def test_a_bridge_that_is_missing_is_named(navit: Folder) -> None:
    navit.rewrite(lambda tensors: [tensors.pop(name) for name in ("in_proj.weight", "in_proj.bias")])
    with pytest.raises(CheckpointError, match=r"missing \(2\): in_proj\.weight, in_proj\.bias"):
        open_checkpoint(navit.path)


def test_the_patch_kernel_is_the_same_numbers_as_a_matrix(tiny: Folder) -> None:
    kernel = tiny.tensors()[PATCH_KERNEL]
    checkpoint = open_checkpoint(tiny.path)
    matrix = checkpoint.tensors[PATCH_KERNEL]
    assert matrix.shape == (64, 768)
    assert np.array_equal(np.array(matrix.read()), kernel.reshape(64, 768))
    back = published(checkpoint.tensors, checkpoint.config)[PATCH_KERNEL]
    assert np.array_equal(np.array(back.read()), kernel)
