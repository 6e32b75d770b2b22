"""What a model is and what it costs, read off its headers: no weight is loaded.

Sizes are computed from shapes and types, so they hold for a model that this machine could not run.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from .checkpoint import quantization
from .checkpoint.hub import resolve
from .checkpoint.lazy import dtype_name
from .checkpoint.names import PATCH_EMBEDDING, matrices
from .checkpoint.reading import Checkpoint, open_checkpoint
from .config import GenLIPConfig, estimate_parameters
from .model.cache import FUSED_DECODE_DIMS, GROWTH, cache_head_dim
from .processing.processor import DEFAULT_PROMPT, Processor

FUSED_ENCODE_DIMS = (64, 72, 80, 96, 128)  # head dims that Metal's fused attention serves for more than 8 queries
GROUP_SIZE = 64  # of the estimates for 8 and 4 bits
CAPTION_TOKENS = 256  # of the estimate of the KV cache; the longest caption that `caption` speaks by default

# The part that a tensor belongs to, by the start of its name.
_PARTS = {
    "vision_embeddings.": "patch_embedding",
    "visual.": "trunk",
    "ln_post.": "trunk",
    "embeddings.": "text_embedding",
    "in_proj.": "text_embedding",
    "proj.": "head",
    "lm_head.": "head",
}
ENCODER_PARTS = ("patch_embedding", "trunk")


@dataclass(frozen=True)
class Part:
    """A part of a model: its parameters, and the bytes of its tensors as stored."""

    name: str  # patch_embedding, trunk, encoder (both), text_embedding, head or total
    parameters: int
    stored_bytes: int


@dataclass(frozen=True)
class WeightMemory:
    """Bytes that a model's weights take at one precision."""

    precision: str  # float32, bfloat16, 8 bits, 4 bits
    model_bytes: int
    encoder_bytes: int  # without text embedding and head


@dataclass(frozen=True)
class QuantizedWeights:
    """How a quantized model is packed."""

    mode: str
    bits: int
    group_size: int  # weights that share a scale
    bits_per_weight: float  # of the whole model, scales and unquantized tensors included
    layers_by_bits: dict[int, int]  # bits -> number of layers
    unquantized: dict[str, int]  # layers that stay as they are, with their input widths


@dataclass(frozen=True)
class ImageTokens:
    """How many tokens a picture becomes."""

    native: bool  # aspect ratio kept; otherwise every picture becomes a square of one size
    min_tokens: int
    max_tokens: int
    patch_size: int  # pixels a side


@dataclass(frozen=True)
class FusedAttention:
    """Whether Metal has a fused attention kernel for this head dim, so that no score matrix is stored."""

    head_dim: int
    encoding: bool  # more than 8 queries
    cached_dim: int  # keys and values of the cache are zero-padded to this width
    decoding: bool


@dataclass(frozen=True)
class CacheMemory:
    """Keys and values while captioning one picture of the largest size."""

    image_tokens: int
    prompt_tokens: int  # of the default prompt
    caption_tokens: int
    bfloat16_bytes: int
    float32_bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """Facts of one model."""

    folder: str
    config: GenLIPConfig
    parts: tuple[Part, ...]
    dtype: str  # of what is not packed
    disk_bytes: int  # all files of the folder
    quantized: QuantizedWeights | None
    memory: tuple[WeightMemory, ...]
    unquantizable: dict[str, int]  # layers whose width GROUP_SIZE does not divide, with that width
    image_tokens: ImageTokens
    fused_attention: FusedAttention
    cache: CacheMemory | None  # None: a vision-only model speaks no captions


def describe_model(path_or_repo: str | Path, revision: str | None = None) -> ModelInfo:
    """Read a model's headers, config, preprocessor and tokenizer.

    Args:
        path_or_repo: a folder, or a hub repo id, which is downloaded first.
        revision: branch, tag or commit of a hub repo.

    Raises:
        CheckpointError, ConfigError, TokenizerError: if the files are not those of a whole GenLIP model.
        HubError: if the hub is not reached or does not have it.
    """
    folder = resolve(path_or_repo, revision)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    processor = Processor.from_pretrained(folder)
    images = processor.image_processor
    tokens = ImageTokens(
        native=images.native,
        min_tokens=images.min_pixels // images.patch_size**2 if images.native else images.max_patches,
        max_tokens=images.max_patches,
        patch_size=images.patch_size,
    )
    cache = None
    if not config.vision_only:
        prompt = len(processor.prompt_ids(DEFAULT_PROMPT))
        text = prompt + CAPTION_TOKENS
        cache = CacheMemory(
            image_tokens=tokens.max_tokens,
            prompt_tokens=prompt,
            caption_tokens=CAPTION_TOKENS,
            bfloat16_bytes=cache_bytes(config, tokens.max_tokens, text, mx.bfloat16),
            float32_bytes=cache_bytes(config, tokens.max_tokens, text, mx.float32),
        )
    return ModelInfo(
        folder=str(folder),
        config=config,
        parts=_parts(checkpoint),
        dtype=dtype_name(checkpoint.dtype),
        disk_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        quantized=_quantized(checkpoint),
        memory=weight_memory(config),
        unquantizable={
            path: width
            for path, (_, width) in matrices(config).items()
            if width % GROUP_SIZE and path != PATCH_EMBEDDING
        },
        image_tokens=tokens,
        fused_attention=fused_attention(config.head_dim),
        cache=cache,
    )


def weight_memory(config: GenLIPConfig) -> tuple[WeightMemory, ...]:
    """Bytes of a model's weights at float32, bfloat16, 8 and 4 bits, however it is stored now.

    Quantized estimates are affine in groups of GROUP_SIZE; what that does not divide stays bfloat16.
    """
    whole = replace(config, quantization=None)
    encoder = replace(whole, vision_only=True)
    rows = [
        WeightMemory(name, quantization.estimate_size(whole, dtype), quantization.estimate_size(encoder, dtype))
        for name, dtype in (("float32", mx.float32), ("bfloat16", mx.bfloat16))
    ]
    for bits in (8, 4):
        rows.append(WeightMemory(f"{bits} bits", _packed_size(whole, bits), _packed_size(encoder, bits)))
    return tuple(rows)


def _packed_size(config: GenLIPConfig, bits: int) -> int:
    with suppress(quantization.QuantizationError):  # if the group size divides no layer's width, all stay bfloat16
        config = quantization.choose(bits=bits, group_size=GROUP_SIZE).apply(config)
    return quantization.estimate_size(config, mx.bfloat16)


def cache_bytes(config: GenLIPConfig, image_tokens: int, text_tokens: int, dtype: mx.Dtype) -> int:
    """Bytes of all layers' keys and values for one picture and its text, as `model.cache` allots them.

    Columns come in steps of GROWTH, with room for text from the start; heads are stored at `cache_head_dim`.
    """
    columns = max(math.floor(image_tokens / GROWTH) + 1, math.ceil((image_tokens + text_tokens) / GROWTH)) * GROWTH
    width = config.num_attention_heads * cache_head_dim(config.head_dim)
    return 2 * config.num_hidden_layers * columns * width * dtype.size


def fused_attention(head_dim: int) -> FusedAttention:
    """What Metal's fused kernels serve at this head dim (MLX 0.32)."""
    cached = cache_head_dim(head_dim)
    return FusedAttention(head_dim, head_dim in FUSED_ENCODE_DIMS, cached, cached in FUSED_DECODE_DIMS)


def _parts(checkpoint: Checkpoint) -> tuple[Part, ...]:
    stored: Counter[str] = Counter()
    for name, tensor in checkpoint.tensors.items():
        stored[next(part for start, part in _PARTS.items() if name.startswith(start))] += tensor.nbytes
    parameters = estimate_parameters(checkpoint.config)

    def part(name: str, of: tuple[str, ...]) -> Part:
        return Part(name, sum(parameters[key] for key in of), sum(stored[key] for key in of))

    single = {key: part(key, (key,)) for key in parameters}
    encoder, total = part("encoder", ENCODER_PARTS), part("total", tuple(parameters))
    return (*(single[key] for key in ENCODER_PARTS), encoder, single["text_embedding"], single["head"], total)


def _quantized(checkpoint: Checkpoint) -> QuantizedWeights | None:
    config = checkpoint.config
    if config.quantization is None:
        return None
    packed = quantization.packings(config)
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return QuantizedWeights(
        mode=config.quantization.get("mode", "affine"),
        bits=config.quantization["bits"],
        group_size=config.quantization["group_size"],
        bits_per_weight=8 * stored / sum(estimate_parameters(config).values()),
        layers_by_bits=dict(sorted(Counter(packing.bits for packing in packed.values()).items())),
        unquantized={path: shape[1] for path, shape in matrices(config).items() if path not in packed},
    )
