"""Which tensors a GenLIP model has: one table, one row a layer, and everything that is read off it.

Our names are the published names. Only one shape differs: the published patch kernel is a
convolution's, [D, channels, p, p]; ours is the same numbers as a matrix, [D, channels * p * p].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..config import ConfigError, GenLIPConfig
from .errors import CheckpointError, listed
from .lazy import LazyTensor, dtype_name

Shape = tuple[int, ...]
Condition = Callable[[GenLIPConfig], bool]

PATCH_EMBEDDING = "vision_embeddings.patch_embedding"
PATCH_KERNEL = f"{PATCH_EMBEDDING}.weight"


def _always(config: GenLIPConfig) -> bool:
    return True


def _swiglu(config: GenLIPConfig) -> bool:
    return config.use_swiglu_ffn


def _layer_scale(config: GenLIPConfig) -> bool:
    return config.use_layer_scale


def _text(config: GenLIPConfig) -> bool:
    return not config.vision_only


def _bridged(config: GenLIPConfig) -> bool:
    return not config.vision_only and config.embed_dim != config.hidden_size


@dataclass(frozen=True)
class Layer:
    """One row: a layer's path, its tensors, its sizes by letter (outputs first), and when it exists.

    Letters: D hidden size, Q queries and gates, F feed-forward, E text embedding, V vocabulary,
    P numbers in a patch.
    """

    path: str
    tensors: tuple[str, ...]
    sizes: str
    when: Condition = _always


_LINEAR, _MATRIX, _NORM, _SCALE = ("weight", "bias"), ("weight",), ("weight", "bias"), ("lambda1",)

# What comes before the trunk, the layers of each block, and what comes after.
BEFORE = (
    Layer(PATCH_EMBEDDING, _LINEAR, "DP"),
    Layer("embeddings", _MATRIX, "VE", _text),
    Layer("in_proj", _LINEAR, "DE", _bridged),
)
BLOCK = (
    Layer("layer_norm1", _NORM, "D"),
    Layer("self_attn.q_proj", _LINEAR, "QD"),
    Layer("self_attn.k_proj", _LINEAR, "DD"),
    Layer("self_attn.v_proj", _LINEAR, "DD"),
    Layer("self_attn.out_proj", _LINEAR, "DD"),
    Layer("layer_scale1", _SCALE, "D", _layer_scale),
    Layer("layer_norm2", _NORM, "D"),
    Layer("mlp.fc1", _LINEAR, "FD"),
    Layer("mlp.gate_fc", _LINEAR, "FD", _swiglu),
    Layer("mlp.fc2", _LINEAR, "DF"),
    Layer("layer_scale2", _SCALE, "D", _layer_scale),
)
AFTER = (
    Layer("ln_post", _NORM, "D"),
    Layer("proj", _LINEAR, "ED", _bridged),
    Layer("lm_head", _MATRIX, "VE", _text),
)


def _walk(config: GenLIPConfig) -> Iterator[tuple[str, Layer, Shape]]:
    """Path, row and sizes of every layer that the config has."""
    dim = config.hidden_size
    letters = {
        "D": dim,
        "Q": 2 * dim if config.gated_attention else dim,
        "F": config.intermediate_size,
        "E": config.embed_dim,
        "V": config.vocab_size,
        "P": config.patch_dim,
    }
    blocks = [(f"visual.layers.{i}.", BLOCK) for i in range(config.num_hidden_layers)]
    for prefix, layers in [("", BEFORE), *blocks, ("", AFTER)]:
        for layer in layers:
            if layer.when(config):
                yield prefix + layer.path, layer, tuple(letters[letter] for letter in layer.sizes)


def expected_shapes(config: GenLIPConfig) -> dict[str, Shape]:
    """Every tensor's shape in our layout, unquantized."""
    return {
        f"{path}.{tensor}": sizes if tensor == "weight" else sizes[:1]
        for path, layer, sizes in _walk(config)
        for tensor in layer.tensors
    }


def matrices(config: GenLIPConfig) -> dict[str, Shape]:
    """Path to weight shape [outputs, inputs] of every linear layer, and the text embedding's."""
    return {path: sizes for path, _, sizes in _walk(config) if len(sizes) == 2}


def ours(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors under published names and shapes, in our layout."""
    kernel = tensors.get(PATCH_KERNEL)
    if kernel is None or len(kernel.shape) != 4:
        return dict(tensors)
    dim, channels, height, width = kernel.shape
    return {**tensors, PATCH_KERNEL: kernel.reshape(dim, channels * height * width)}


def published(tensors: Mapping[str, LazyTensor], config: GenLIPConfig) -> dict[str, LazyTensor]:
    """Tensors of our layout in the published one."""
    p = config.patch_size
    kernel = tensors[PATCH_KERNEL].reshape(config.hidden_size, config.num_channels, p, p)
    return {**tensors, PATCH_KERNEL: kernel}


_PREFIX = re.compile(r"^(?:(?:model|module|_orig_mod|state_dict)\.)+")
_COMPUTED = "rotary_emb.inv_freq"  # a buffer of the reference, computed from the config


def plain_names(tensors: Mapping[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """Without wrappers' prefixes and without computed buffers.

    Raises:
        CheckpointError: if two tensors would get one name.
    """
    plain: dict[str, LazyTensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        # torch.compile also puts its prefix in the middle: visual._orig_mod.layers
        short = _PREFIX.sub("", name).replace("._orig_mod.", ".")
        if short.endswith(_COMPUTED):
            continue
        if short in plain:
            raise CheckpointError(f"{source}: {origin[short]} and {name} are both {short}; keep one of them")
        plain[short], origin[short] = tensor, name
    return plain


@dataclass(frozen=True)
class Evidence:
    """What a tensor says about a config field."""

    value: Any
    reason: str  # for messages: "embeddings.weight is [448, 64]"


def _evidence(shapes: Mapping[str, Shape]) -> dict[str, Evidence]:
    found: dict[str, Evidence] = {}

    def size(field: str, name: str, axis: int, ndim: int) -> None:
        shape = shapes.get(name)
        if shape is not None and len(shape) == ndim:
            found[field] = Evidence(shape[axis], f"{name} is {list(shape)}")

    size("hidden_size", "ln_post.weight", 0, 1)
    size("intermediate_size", "visual.layers.0.mlp.fc1.weight", 0, 2)
    size("vocab_size", "embeddings.weight", 0, 2)
    size("text_embed_dim", "embeddings.weight", 1, 2)
    size("num_channels", PATCH_KERNEL, 1, 4)
    size("patch_size", PATCH_KERNEL, 2, 4)

    blocks = [int(match[1]) for name in shapes if (match := re.match(r"visual\.layers\.(\d+)\.", name))]
    if not blocks:
        return found
    found["num_hidden_layers"] = Evidence(max(blocks) + 1, f"the last block is visual.layers.{max(blocks)}")
    query = shapes.get("visual.layers.0.self_attn.q_proj.weight", ())
    if len(query) == 2 and query[0] in (query[1], 2 * query[1]):
        reason = f"visual.layers.0.self_attn.q_proj.weight is {list(query)}"
        found["gated_attention"] = Evidence(query[0] == 2 * query[1], reason)
    gates = [name for name in shapes if name.endswith(".mlp.gate_fc.weight")]
    found["use_swiglu_ffn"] = Evidence(bool(gates), f"{gates[0]} exists" if gates else "no mlp.gate_fc.weight exists")
    return found


def reconcile(stated: Mapping[str, Any], shapes: Mapping[str, Shape], source: str) -> GenLIPConfig:
    """The config that a config.json and its tensors describe together.

    Sizes that the file leaves out are read from the tensors (the published files leave out
    `text_embed_dim`); the head count comes from the file alone.

    Args:
        stated: the content of config.json.
        shapes: unquantized shapes by name; the patch kernel in either layout.
        source: the folder, for messages.

    Raises:
        CheckpointError: if the file states what the tensors contradict; names both.
        ConfigError: as `GenLIPConfig.from_dict`.
    """
    evidence = _evidence(shapes)
    merged = {field: value for field, value in stated.items() if value is not None or field not in evidence}
    contradictions = [
        f"config.json says {field} {_json(merged[field])}, but {tensor.reason}"
        for field, tensor in evidence.items()
        if field in merged and merged[field] != tensor.value
    ]
    if contradictions:
        raise CheckpointError(f"{source}: {'; '.join(contradictions)}; config.json or the weights are another model's")
    merged = {**{field: tensor.value for field, tensor in evidence.items()}, **merged}
    scales = any(name.endswith(".layer_scale1.lambda1") for name in shapes)
    merged.setdefault("ls_init_value", 0.1 if scales else 0.0)
    if not merged.get("use_swiglu_ffn", True):
        merged.setdefault("hidden_act", "gelu_pytorch_tanh")  # the reference's default
    try:
        config = GenLIPConfig.from_dict(merged)
    except ConfigError as error:
        raise ConfigError(f"{source}: config.json: {error}") from None
    if "num_hidden_layers" in evidence and config.use_layer_scale != scales:
        seen = "layer_scale1.lambda1 exists" if scales else "no layer_scale1.lambda1 exists"
        raise CheckpointError(f"{source}: config.json says ls_init_value {config.ls_init_value}, but {seen}")
    return config


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check(tensors: Mapping[str, LazyTensor], expected: Mapping[str, tuple[Shape, mx.Dtype]], source: str) -> None:
    """Account for every tensor.

    Args:
        tensors: what there is, in our layout.
        expected: shape and type of what there must be; any floating type passes for another.

    Raises:
        CheckpointError: one error that lists missing, unexpected and wrong tensors by name.
    """
    wrong = []
    for name, (shape, dtype) in expected.items():
        if (tensor := tensors.get(name)) is None:
            continue
        same_kind = tensor.floating if mx.issubdtype(dtype, mx.floating) else tensor.dtype == dtype
        if tensor.shape != shape:
            wrong.append(f"{name} {list(tensor.shape)} instead of {list(shape)}")
        elif not same_kind:
            wrong.append(f"{name} {dtype_name(tensor.dtype)} instead of {dtype_name(dtype)}")
    kinds = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "wrong": wrong,
    }
    problems = [f"{kind} ({len(names)}): {listed(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(f"{source}: the tensors do not fit config.json; {'; '.join(problems)}")
