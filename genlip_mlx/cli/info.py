"""genlip-mlx info"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .console import size

if TYPE_CHECKING:
    from ..info import ModelInfo

LABEL = 17  # columns of the names on the left
WIDTH = 110  # columns in all


def info(
    model: options.Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; sizes in bytes.")] = False,
    revision: options.Revision = None,
) -> None:
    """Show what a model is: parameters, sizes, memory, tokens a picture.

    Reads headers only, so it is quick for any size. A hub repo is downloaded first.

    Examples:

        genlip-mlx info --model genlip-l16

        genlip-mlx info --model genlip-l16 --json
    """
    from ..info import describe_model

    facts = describe_model(model, revision)
    print(_json(facts) if as_json else "\n".join(_lines(facts)))


def _json(info: ModelInfo) -> str:
    import dataclasses
    import json

    return json.dumps(dataclasses.asdict(info) | {"config": info.config.to_dict()}, indent=2)


def _lines(info: ModelInfo) -> list[str]:
    sections = [[info.folder], _architecture(info), _weights(info), _memory(info), _speed(info)]
    return [line for section in sections for line in (*section, "")][:-1]


def _row(label: str, *text: str) -> str:
    return f"  {label:<{LABEL}}  " + "  ".join(text)


def _wrapped(label: str, text: str) -> list[str]:
    """A row of any length, broken into lines."""
    first, *others = textwrap.wrap(text, WIDTH - LABEL - 4)
    return [_row(label, first), *(_row("", line) for line in others)]


def _architecture(info: ModelInfo) -> list[str]:
    config, tokens = info.config, info.image_tokens
    kind = "SwiGLU" if config.use_swiglu_ffn else f"MLP ({config.hidden_act})"
    section = ", ".join(map(str, config.mrope_section))
    order = "interleaved" if config.mrope_interleaved else "chunked"
    side = round(tokens.max_tokens**0.5) * tokens.patch_size
    if tokens.native:
        pictures = f"{tokens.min_tokens} to {tokens.max_tokens} tokens, aspect ratio kept"
    else:
        pictures = f"{tokens.max_tokens} tokens, resized to {side} x {side} pixels"
    lines = [
        "Architecture",
        _row("pictures", f"{pictures}; a token is {tokens.patch_size} x {tokens.patch_size} pixels"),
        _row("blocks", f"{config.num_hidden_layers}, hidden size {config.hidden_size}"),
        _row(
            "attention",
            f"{config.num_attention_heads} heads of {config.head_dim} (head dim)"
            f"{', gated' if config.gated_attention else ', no gate'}",
        ),
        _row("feed-forward", f"{kind}, width {config.intermediate_size}"),
        _row("LayerScale", "yes" if config.use_layer_scale else "no"),
        _row("positions (MRoPE)", f"{order}, sections {section} (time, row, column)"),
    ]
    if config.vision_only:
        return [*lines, _row("text", "none: a vision-only model, for features")]
    return [*lines, _row("vocabulary", f"{config.vocab_size:,} tokens, embedding size {config.embed_dim}")]


def _weights(info: ModelInfo) -> list[str]:
    names = {"encoder": "= encoder"}  # the sum of the two lines before it
    lines = [f"{'Weights':<{LABEL + 2}}  {'parameters':>13}  {'stored':>9}"]
    for part in info.parts:
        if part.parameters and not (info.config.vision_only and part.name == "encoder"):  # the total, then
            label = names.get(part.name, part.name.replace("_", " "))
            lines.append(_row(label, f"{part.parameters:>13,}", f"{size(part.stored_bytes):>9}"))
    lines.append(_row("type", info.dtype if info.quantized is None else f"quantized; the rest {info.dtype}"))
    if info.quantized is not None:
        packed = info.quantized
        lines += [
            _row(
                "quantization",
                f"{packed.bits} bits, a scale for every {packed.group_size} weights, mode {packed.mode}; "
                f"{packed.bits_per_weight:.2f} bits a weight in all",
            ),
            _row("layers by bits", ", ".join(f"{n} at {bits}" for bits, n in packed.layers_by_bits.items())),
            *_wrapped("not quantized", _listed(packed.unquantized)),
        ]
    lines.append(_row("folder on disk", size(info.disk_bytes)))
    return lines


def _memory(info: ModelInfo) -> list[str]:
    from ..info import GROUP_SIZE

    alone = info.config.vision_only
    columns = f"{'this model':>13}" + ("" if alone else f"  {'encoder alone':>13}")
    lines = [f"{'Memory for weights':<{LABEL + 2}}  {columns}"]
    for row in info.memory:
        encoder = [] if alone else [f"{size(row.encoder_bytes):>13}"]
        lines.append(_row(row.precision, f"{size(row.model_bytes):>13}", *encoder))
    if info.unquantizable:
        stay = f"where {GROUP_SIZE} does not divide a layer's width, it stays bfloat16: {_listed(info.unquantizable)}"
        lines += _wrapped("8 and 4 bits", f"groups of {GROUP_SIZE} weights share a scale; {stay}")
    return lines


def _speed(info: ModelInfo) -> list[str]:
    fused = info.fused_attention
    lines = [
        "Attention on Apple GPUs: does a fused Metal kernel serve it? (`genlip-mlx doctor` checks on this machine)",
        _row(
            "encoding", f"{'yes' if fused.encoding else 'no, slower and with more memory'}: head dim {fused.head_dim}"
        ),
    ]
    if info.cache is None:
        return lines
    padded = "" if fused.cached_dim == fused.head_dim else f", stored {fused.cached_dim} wide"
    served = "yes" if fused.decoding else "no, slower"
    cache = info.cache
    return [
        *lines,
        _row("captioning", f"{served}: head dim {fused.head_dim}{padded}"),
        "",
        "Memory for captioning one picture, beside the weights (keys and values, the KV cache)",
        _row("bfloat16", f"{size(cache.bfloat16_bytes):>9}"),
        _row("float32", f"{size(cache.float32_bytes):>9}"),
        f"  for {cache.image_tokens} image, {cache.prompt_tokens} prompt and {cache.caption_tokens} caption tokens",
    ]


def _listed(layers: dict[str, int]) -> str:
    """Layers with their widths; a layer that every block has is named once."""
    counts: dict[tuple[str, int], int] = {}
    for path, width in layers.items():
        words = path.split(".")
        name = ".".join(words[3:]) if path.startswith("visual.layers.") else path
        counts[name, width] = counts.get((name, width), 0) + 1
    return ", ".join(f"{name} (width {width}){f' x {n}' if n > 1 else ''}" for (name, width), n in counts.items())
