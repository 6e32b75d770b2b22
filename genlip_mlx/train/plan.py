"""What a run will be, before its first step."""

from __future__ import annotations

from itertools import islice

from ..checkpoint.reading import open_checkpoint
from ..config import GenLIPConfig, estimate_parameters
from ..data.pipeline import Pipeline, survey
from ..data.sources import Source
from ..processing.processor import Processor
from .memory import Load, Trained, check, plan
from .recipe import Recipe
from .run import make_processor, open_data, starting_point, trainable_config

PACKS = 4  # that stand for all of them


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
    source, held_out = open_data(recipe)
    processor = make_processor(recipe, start)
    found = survey(
        source,
        processor,
        budget=recipe.batch_tokens,
        seed=recipe.seed,
        max_sample_len=recipe.max_sample_len,
    )
    packs = loads(recipe, source, processor)
    memory = max(plan(recipe, config, load).total for load in packs)
    records = f"{'' if source.exact else 'about '}{found.records} records"
    lines = [
        f"model       {total / 1e6:.1f} M parameters: " + ", ".join(f"{k} {v / 1e6:.1f}" for k, v in parts.items()),
        f"steps       {recipe.iters}, {recipe.grad_accumulation_steps} x {recipe.batch_tokens} tokens each",
        f"tokens      {tokens / 1e6:.1f} M on each machine",
        f"operations  {training_flops(config, tokens):.2e} on each machine",
        f"memory      about {memory / 1e9:.2f} GB",
        f"data        {records} in {source.name}, about {found.packs_per_epoch} packs an epoch",
        f"samples     {found.usable} of the {found.looked_at} looked at can be used",
        f"a sample    {found.image_tokens:.0f} image tokens, {found.text_tokens:.0f} of text",
    ]
    lines += [f"unusable    {count} {reason}" for reason, count in found.skipped.items()]
    if held_out is not None:
        lines.append(f"validation  {held_out.count()} records")
    return lines


def training_flops(config: GenLIPConfig, tokens: int) -> float:
    """6 operations a trunk parameter and token (arXiv 2001.08361); the head's for a quarter of them, the labels.

    Attention is left out: a few per cent at these lengths.
    """
    parts = estimate_parameters(config)
    return 6.0 * tokens * (parts["patch_embedding"] + parts["trunk"] + parts["head"] / 4)


def loads(recipe: Recipe, source: Source, processor: Processor) -> list[Load]:
    """What the first packs of a run ask of memory."""
    with Pipeline(
        source,
        processor,
        budget=recipe.batch_tokens,
        seed=recipe.seed,
        workers=0,
        max_sample_len=recipe.max_sample_len,
        shuffle=recipe.shuffle,
        epochs=1,
    ) as pipeline:
        return [Load.of(pack) for pack in islice(pipeline, PACKS)]


def describe_fine_tuning(recipe: Recipe) -> list[str]:
    """Lines on what is trained, and on the memory it takes.

    Raises:
        TooLargeError: if this machine has not the memory, naming the options that would fit.
        AdapterError, RecipeError: if the model does not have what should be trained.
        RunError, SourceError, DataError, or what reading the model raises.
    """
    start = starting_point(recipe)
    config = trainable_config(recipe, start)
    trained = Trained.of(config, recipe)
    data, _ = open_data(recipe)
    _, line = check(recipe, config, loads(recipe, data, make_processor(recipe, start)))
    total = sum(estimate_parameters(config).values())
    return [
        f"trained     {trained.parameters / 1e6:.2f} M parameters; the model has {total / 1e6:.1f} M",
        f"memory      {line}",
    ]
