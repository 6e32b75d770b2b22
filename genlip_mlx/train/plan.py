"""What a run will be, before its first step."""

from __future__ import annotations

from ..checkpoint.lazy import parse_dtype
from ..checkpoint.load import default_dtype
from ..checkpoint.reading import open_checkpoint
from ..config import GenLIPConfig, estimate_parameters
from ..data.pipeline import survey
from ..data.sources import open_source
from .recipe import Recipe
from .run import make_processor, starting_point


def describe(recipe: Recipe) -> list[str]:
    """Lines on model, tokens, operations, memory and data, whose first records are measured.

    Raises:
        RecipeError, SourceError, DataError, or what reading `init_from` and the tokenizer raises.
    """
    start = starting_point(recipe)
    config = recipe.config() if start is None else open_checkpoint(start).config
    parts = estimate_parameters(config)
    total = sum(parts.values())
    tokens = recipe.iters * recipe.grad_accumulation_steps * recipe.batch_tokens
    source = open_source(recipe.data)
    found = survey(
        source,
        make_processor(recipe, start),
        budget=recipe.batch_tokens,
        seed=recipe.seed,
        max_sample_len=recipe.max_sample_len,
    )
    lines = [
        f"model       {total / 1e6:.1f} M parameters: " + ", ".join(f"{k} {v / 1e6:.1f}" for k, v in parts.items()),
        f"steps       {recipe.iters}, {recipe.grad_accumulation_steps} x {recipe.batch_tokens} tokens each",
        f"tokens      {tokens / 1e6:.1f} M on each machine",
        f"operations  {training_flops(config, tokens):.2e} on each machine",
        f"memory      about {memory_bytes(recipe, config) / 1e9:.2f} GB",
        f"data        {found.records} records in {source.name}, about {found.packs_per_epoch} packs an epoch",
        f"samples     {found.usable} of the {found.looked_at} looked at can be used",
        f"a sample    {found.image_tokens:.0f} image tokens, {found.text_tokens:.0f} of text",
    ]
    lines += [f"unusable    {count} {reason}" for reason, count in found.skipped.items()]
    if recipe.valid_data:
        lines.append(f"validation  {len(open_source(recipe.valid_data, split='validation'))} records")
    return lines


def training_flops(config: GenLIPConfig, tokens: int) -> float:
    """6 operations a trunk parameter and token (arXiv 2001.08361); the head's for a quarter of them, the labels.

    Attention is left out: a few per cent at these lengths.
    """
    parts = estimate_parameters(config)
    return 6.0 * tokens * (parts["patch_embedding"] + parts["trunk"] + parts["head"] / 4)


def memory_bytes(recipe: Recipe, config: GenLIPConfig) -> float:
    """An estimate: weights, gradients and AdamW's two moments in float32, and a pack's activations.

    A block keeps about 20 D and 7 F numbers a token for its backward pass (fitted to peaks measured on a CPU);
    with checkpointing only its input.
    """
    weights = 4 * 4 * sum(estimate_parameters(config).values())
    width = (parse_dtype(recipe.dtype) or default_dtype()).size
    block = 20 * config.hidden_size + 7 * config.intermediate_size
    kept = (
        config.hidden_size * config.num_hidden_layers + block
        if recipe.grad_checkpoint
        else (block * config.num_hidden_layers)
    )
    return weights + width * kept * recipe.batch_tokens
