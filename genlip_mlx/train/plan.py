"""What a run will be, before its first step."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.hub import resolve
from ..checkpoint.reading import open_checkpoint
from ..config import GenLIPConfig, estimate_parameters
from ..data.sources import open_source
from .recipe import Recipe
from .run import best_checkpoint


def describe(recipe: Recipe) -> list[str]:
    """Lines on model, tokens, operations, memory and data; opening the data checks it.

    Raises:
        RecipeError, SourceError, or what reading `init_from` raises.
    """
    config = _config(recipe)
    parts = estimate_parameters(config)
    total = sum(parts.values())
    tokens = recipe.iters * recipe.grad_accumulation_steps * recipe.batch_tokens
    source = open_source(recipe.data)
    lines = [
        f"model       {total / 1e6:.1f} M parameters: " + ", ".join(f"{k} {v / 1e6:.1f}" for k, v in parts.items()),
        f"steps       {recipe.iters}, {recipe.grad_accumulation_steps} x {recipe.batch_tokens} tokens each",
        f"tokens      {tokens / 1e6:.1f} M on each machine",
        f"operations  {training_flops(config, tokens):.2e} on each machine",
        f"memory      about {memory_bytes(recipe, config) / 1e9:.2f} GB",
        f"data        {len(source)} records in {source.name}",
    ]
    if recipe.valid_data:
        lines.append(f"validation  {len(open_source(recipe.valid_data, split='validation'))} records")
    return lines


def _config(recipe: Recipe) -> GenLIPConfig:
    if recipe.init_from is None:
        return recipe.config()
    folder = best_checkpoint(Path(recipe.init_from).expanduser()) or resolve(recipe.init_from)
    return open_checkpoint(folder).config


def training_flops(config: GenLIPConfig, tokens: int) -> float:
    """6 operations a trunk parameter and token (arXiv 2001.08361); the head's for a quarter of them, the labels.

    Attention is left out: a few per cent at these lengths.
    """
    parts = estimate_parameters(config)
    return 6.0 * tokens * (parts["patch_embedding"] + parts["trunk"] + parts["head"] / 4)


def memory_bytes(recipe: Recipe, config: GenLIPConfig) -> float:
    """An estimate: weights, gradients and AdamW's two moments in float32, and a pack's activations.

    A block keeps about 14 D and 4 F numbers a token for its backward pass; with checkpointing only its input.
    """
    weights = 4 * 4 * sum(estimate_parameters(config).values())
    width = 4 if recipe.dtype == "float32" else 2
    block = 14 * config.hidden_size + 4 * config.intermediate_size
    kept = (
        config.hidden_size * config.num_hidden_layers + block
        if recipe.grad_checkpoint
        else (block * config.num_hidden_layers)
    )
    return weights + width * kept * recipe.batch_tokens
