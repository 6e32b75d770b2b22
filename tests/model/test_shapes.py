"""Every shape of the model against the plain dense-mask model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from model.dense import Dense, image_rows, interleave, predicting_rows
from model.random_case import Pack, assert_close, dense_of, random_model, random_pack, small_config

from genlip_mlx.model.genlip import GenLIP
from genlip_mlx.model.sequence import PackedSequence

SHAPES: dict[str, dict[str, Any]] = {
    "published": {},
    "ungated": {"gated_attention": False},
    "mlp, tanh gelu": {"use_swiglu_ffn": False, "hidden_act": "gelu_pytorch_tanh"},
    "mlp, gelu": {"use_swiglu_ffn": False, "hidden_act": "gelu"},
    "swiglu, relu": {"hidden_act": "relu"},
    "no LayerScale": {"ls_init_value": 0.0},
    "chunked MRoPE": {"head_dim": 16, "mrope_interleaved": False, "mrope_section": (1, 4, 3)},
    "short sections": {"head_dim": 16, "mrope_section": (2, 2, 1)},
    "long sections": {"head_dim": 16, "mrope_section": (8, 12, 12)},
    "other theta": {"rope_theta": 50.0},
    "wider text": {"text_embed_dim": 24},
    "narrower text": {"text_embed_dim": 12},
    "one layer": {"num_hidden_layers": 1},
    "one head": {"num_heads": 1},
    "plain ViT": {
        "gated_attention": False,
        "use_swiglu_ffn": False,
        "hidden_act": "gelu_pytorch_tanh",
        "ls_init_value": 0.0,
        "mrope_interleaved": False,
        "text_embed_dim": 20,
    },
    "head dim 32": {"head_dim": 32, "mrope_section": (4, 6, 6)},
    "head dim 64": {"head_dim": 64, "mrope_section": (8, 12, 12)},
    "head dim 64, chunked": {"head_dim": 64, "mrope_section": (8, 12, 12), "mrope_interleaved": False},
    "head dim 72": {"head_dim": 72, "mrope_section": (8, 12, 12)},
    "head dim 80": {"head_dim": 80, "mrope_section": (12, 12, 12)},
    "head dim 80, chunked": {"head_dim": 80, "mrope_section": (16, 12, 12), "mrope_interleaved": False},
    "head dim 96": {"head_dim": 96, "mrope_section": (16, 16, 16)},
    "head dim 128": {"head_dim": 128, "mrope_section": (24, 20, 20)},
}
GRIDS = [(3, 4), (1, 1), (5, 2), (3, 4)]
TEXT_LENGTHS = [5, 3, 0, 4]  # the third sample is a picture with nothing said about it


@dataclass(frozen=True)
class Shape:
    model: GenLIP
    pack: Pack
    dense: Dense
    states: list[mx.array]  # of the whole pack, interleaved: N + 1 [L, D]

    @property
    def image(self) -> mx.array:
        return image_rows(interleave(self.pack.grids, self.pack.text_lengths))

    @property
    def logits(self) -> list[mx.array]:
        """Of each sample, from the last image row on: [T + 1, V]."""
        rows = interleave(self.pack.grids, self.pack.text_lengths)
        ends = np.cumsum([n + 1 for n in self.pack.text_lengths])[:-1].tolist()
        return mx.split(self.dense.logits(self.states[-1][predicting_rows(rows)]), ends)


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    model = random_model(small_config(**SHAPES[request.param]))
    pack = random_pack(model.config, GRIDS, TEXT_LENGTHS)
    dense = dense_of(model)
    states = dense.states(interleave(GRIDS, TEXT_LENGTHS), pack.patches, pack.input_ids)
    return Shape(model, pack, dense, states)


def test_the_parts_that_a_shape_has(shape: Shape) -> None:
    names = dict(tree_flatten(shape.model.parameters()))
    config = shape.model.config
    bridged = config.embed_dim != config.hidden_size
    assert ("in_proj.weight" in names) == ("proj.bias" in names) == bridged
    assert ("visual.layers.0.layer_scale1.lambda1" in names) == (config.ls_init_value > 0)
    assert ("visual.layers.0.mlp.gate_fc.weight" in names) == config.use_swiglu_ffn
    widening = 2 if config.gated_attention else 1
    assert names["visual.layers.0.self_attn.q_proj.weight"].shape[0] == widening * config.hidden_size


@pytest.mark.parametrize("slack", [0.0, 100.0])
def test_logits_of_a_pack(shape: Shape, slack: float) -> None:
    sequence = PackedSequence(GRIDS, TEXT_LENGTHS, slack=slack)
    logits = shape.model(shape.pack.patches, shape.pack.input_ids, sequence)
    assert_close(logits, mx.concatenate(shape.logits))


def test_states_and_features_of_pictures_of_different_sizes(shape: Shape) -> None:
    # The plain model's image rows come from whole samples: the text must not show in them.
    ours = shape.model.hidden_states(shape.pack.patches, GRIDS)
    assert len(ours) == shape.model.config.num_hidden_layers + 1
    for state, expected in zip(ours, shape.states):
        assert_close(state, expected[shape.image])
    features = shape.model.encode(shape.pack.patches, GRIDS)
    assert_close(features, shape.dense.features(shape.states[-1][shape.image]))


def test_prefill_predicts_the_first_word(shape: Shape) -> None:
    # All there is to an empty prompt: the last image row speaks.
    logits, _ = shape.model.prefill(shape.pack.patches, GRIDS)
    assert_close(logits, mx.stack([rows[0] for rows in shape.logits]))


def test_token_by_token_equals_teacher_forcing(shape: Shape) -> None:
    for sample, expected in enumerate(shape.logits):
        first, cache = shape.model.prefill(shape.pack.picture(sample), [GRIDS[sample]])
        spoken = [first, *(shape.model.extend(token.reshape(1, 1), cache) for token in shape.pack.text(sample))]
        assert_close(mx.concatenate(spoken), expected)


def test_prompt_then_tokens_in_a_batch_of_different_grids(shape: Shape) -> None:
    chosen = [0, 1, 3]  # those with three words or more: two for a prompt, one said
    grids = [GRIDS[i] for i in chosen]
    patches = mx.concatenate([shape.pack.picture(i) for i in chosen])
    words = mx.stack([shape.pack.text(i)[:3] for i in chosen])
    first, cache = shape.model.prefill(patches, grids)
    prompt = shape.model.extend(words[:, :2], cache, all_logits=True)
    said = shape.model.extend(words[:, 2:], cache)
    ours = mx.concatenate([first[:, None], prompt, said[:, None]], axis=1)
    assert_close(ours, mx.stack([shape.logits[i][:4] for i in chosen]))


def test_extend_gives_the_last_logits_of_all(shape: Shape) -> None:
    _, cache = shape.model.prefill(shape.pack.picture(0), GRIDS[:1])
    last = shape.model.extend(shape.pack.text(0)[None], cache)
    assert_close(last, shape.logits[0][-1:])
