"""What packing in two streams costs and saves, beside the two plain ways to train the same model.

    python scripts/bench_training.py [throughput objective packing waiting memory] [--json bench.json]

- throughput: tokens/s and peak memory of a training step as packs grow, for this trainer, for one dense mask over
  the whole pack, and for rows padded to the longest sample. All three are the same model, trainer, attention kernel
  and samples, and give the same loss; padding counts as no token. Rivals are timed in turn with this trainer, since
  machines are shared and noisy.
- objective: peak memory of the loss over a vocabulary of 151936 and its gradients, in chunks and all at once.
- packing: how full packs of 16384 tokens are, and the attention work lost to padding, at the paper's mean lengths.
- waiting: share of a step's time spent waiting for pictures drawn, cut and tokenized in another process.
- memory: at step 50 and at step 500, with native pictures whose sizes never repeat.

What would need more than --memory is not tried, or ends in its own process, and is said not to fit.
"""

from __future__ import annotations

import genlip_mlx  # first, since it loads OpenBLAS, which must come before mlx

# isort: split
import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from rich.console import Console
from rich.table import Table

from genlip_mlx.config import GenLIPConfig
from genlip_mlx.data.packing import Measured, Pack, first_fit, in_pack_order
from genlip_mlx.data.pipeline import LOOKAHEAD, Pipeline
from genlip_mlx.data.sources import open_source
from genlip_mlx.model.attention import PackedContext
from genlip_mlx.model.exponential import attention
from genlip_mlx.model.genlip import GenLIP, initialize
from genlip_mlx.model.rope import Rope
from genlip_mlx.model.sequence import PackedSequence
from genlip_mlx.processing import NO_LOSS
from genlip_mlx.processing.images import ImageProcessor
from genlip_mlx.processing.processor import Processor
from genlip_mlx.train.objective import Batch, summed_loss
from genlip_mlx.train.recipe import Recipe, load_recipe
from genlip_mlx.train.trainer import Trainer

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
SECTIONS = ("throughput", "objective", "packing", "waiting", "memory")
SIZES = (2048, 4096, 8192, 16384)  # tokens a pack
STAGES = {1: 270, 2: 1200}  # mean tokens of a sample, section 4.1 of the paper
ROWS = (512, 1024, 2048, 4096)  # with a label
PUBLISHED_VOCAB = 151936
PROMPT_TOKENS = 6  # of "Describe the image in detail."
GB = 1e9


# --- Samples without pixels or meaning, but with the sizes that matter ---


def grids_of_photos(draw: np.random.Generator, processor: ImageProcessor) -> Iterator[tuple[int, int]]:
    """Grids of pictures as the web has them: about 900 pixels wide or high, in common and odd proportions."""
    while True:
        longer, ratio = draw.lognormal(np.log(900), 0.45), min(1.0, draw.lognormal(np.log(0.72), 0.25))
        sides = (round(longer), max(1, round(longer * ratio)))
        yield processor.grid(*(sides if draw.random() < 0.4 else sides[::-1]))


def samples_like(stage: int, vocab: int, max_sample_len: int, seed: int = 0) -> Iterator[Measured]:
    """Endless samples of a stage: its pictures' sizes, and texts (log-normal) that give its mean length."""
    draw = np.random.default_rng(seed)
    processor = ImageProcessor(native=stage == 2)
    mean_picture = np.mean([h * w for h, w in islice(grids_of_photos(np.random.default_rng(1), processor), 4000)])
    mean_text, spread = STAGES[stage] - mean_picture, 0.4
    for position, grid in enumerate(grids_of_photos(draw, processor)):
        drawn = PROMPT_TOKENS + draw.lognormal(np.log(mean_text - PROMPT_TOKENS) - spread**2 / 2, spread)
        text = min(max(PROMPT_TOKENS + 8, round(drawn)), max_sample_len - grid[0] * grid[1])
        input_ids = draw.integers(0, vocab, text).astype(np.int32)
        labels = np.where(np.arange(text) < PROMPT_TOKENS, NO_LOSS, input_ids).astype(np.int32)
        yield Measured(position, position, grid, input_ids, labels)


def packs_like(stage: int, config: GenLIPConfig, budget: int) -> Iterator[Pack]:
    """Endless packs of noise."""
    samples = samples_like(stage, config.vocab_size, min(4096, budget))
    for chosen, _ in first_fit(samples, budget, LOOKAHEAD):
        yield pack_of(in_pack_order(chosen), config)


def pack_of(samples: Sequence[Measured], config: GenLIPConfig) -> Pack:
    rows = sum(h * w for h, w in (s.grid for s in samples))
    return Pack(
        np.random.default_rng(rows).standard_normal((rows, config.patch_dim), np.float32),
        tuple(s.grid for s in samples),
        np.concatenate([s.input_ids for s in samples]),
        np.concatenate([s.labels for s in samples]),
        tuple(len(s.input_ids) for s in samples),
        tuple(s.record for s in samples),
    )


# --- The rivals: the same model but for who attends to whom, and how ---


class DenseContext(PackedContext):
    """Attention of the whole pack at once, under one mask [L, L]."""

    mask: mx.array

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        q, k, v = (x.swapaxes(0, 1)[None] for x in (queries, keys, values))
        mask = self.mask if self.rows is None else self.mask[self.rows]
        return attention(q, k, v, queries.shape[-1] ** -0.5, mask)[0].swapaxes(0, 1)


class DenseGenLIP(GenLIP):
    """One mask over the pack."""

    def outputs(
        self, patches: mx.array, input_ids: mx.array, sequence: PackedSequence, checkpoint: bool = False
    ) -> mx.array:
        x = mx.concatenate([self.embed_images(patches, sequence), self.embed_text(input_ids)])
        table = Rope(self.config).table(sequence.positions)
        place = mx.arange(len(x))
        mask = sees(sequence.samples, place >= sequence.num_image_rows, place)
        for layer in self.visual.layers:
            context = DenseContext(sequence, table, outputs_only=layer is self.visual.layers[-1])
            context.mask = mask
            x = layer(x, context)
        return self.ln_post(x)


class PaddedContext(PackedContext):
    """Attention of rows [B, L], a sample and its padding each, under a mask [B, 1, L, L]."""

    mask: mx.array

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        batch, length = self.mask.shape[0], self.mask.shape[-1]
        q, k, v = (x.reshape(batch, length, *x.shape[1:]).swapaxes(1, 2) for x in (queries, keys, values))
        return attention(q, k, v, queries.shape[-1] ** -0.5, self.mask).swapaxes(1, 2).flatten(0, 1)


class PaddedGenLIP(GenLIP):
    """A row for each sample, as long as the longest."""

    def outputs(
        self, patches: mx.array, input_ids: mx.array, sequence: PackedSequence, checkpoint: bool = False
    ) -> mx.array:
        x = mx.concatenate([self.embed_images(patches, sequence), self.embed_text(input_ids)])
        images, texts = np.array(sequence.image_lengths), np.array(sequence.text_lengths)
        width = int((images + texts).max())
        # Where each of the streams' rows stands in [B, width]; padding repeats some row and is seen by none.
        starts = np.arange(len(images)) * width
        order = [start + np.arange(n) for start, n in zip(starts, images)]
        order += [start + np.arange(n) for start, n in zip(starts + images, texts)]
        standing = np.concatenate(order)
        taken = np.zeros(len(images) * width, np.int32)
        taken[standing] = np.arange(len(standing))
        real = np.zeros(len(taken), bool)
        real[standing] = True
        taken_rows = mx.array(taken)

        cos, sin = Rope(self.config).table(sequence.positions)
        row = mx.where(mx.array(real), sequence.samples[taken_rows], -1).reshape(len(images), width)
        is_text = (taken_rows >= sequence.num_image_rows).reshape(len(images), width)
        mask = sees(row, is_text, mx.broadcast_to(mx.arange(width), row.shape))
        # Padding sees something, or its softmax would be 0 / 0.
        mask = (mask | (row < 0)[..., None])[:, None]
        context = PaddedContext(sequence, (cos[taken_rows], sin[taken_rows]))
        context.mask = mask
        x = x[taken_rows]
        for layer in self.visual.layers:
            x = layer(x, context)
        return self.ln_post(x[mx.array(standing.astype(np.int32))][sequence.output_rows])


def sees(sample: mx.array, is_text: mx.array, place: mx.array) -> mx.array:
    """The prefix-LM mask [..., L, L] of rows given by [..., L]: pictures whole, texts up to the row itself."""
    query, key = (lambda x: x[..., :, None]), (lambda x: x[..., None, :])
    before = query(is_text) & (key(place) <= query(place))
    return (query(sample) == key(sample)) & (~key(is_text) | before)


METHODS: dict[str, type[GenLIP]] = {"dense mask": DenseGenLIP, "padded rows": PaddedGenLIP}


def score_bytes(method: str, config: GenLIPConfig, pack: Pack) -> float:
    """Attention scores a rival keeps for the backward pass, at least: two arrays a layer."""
    lengths = [h * w + n for (h, w), n in zip(pack.grids, pack.text_lengths)]
    pairs = sum(lengths) ** 2 if method == "dense mask" else len(lengths) * max(lengths) ** 2
    return 2 * 4.0 * config.num_hidden_layers * config.num_attention_heads * pairs


# --- Measuring, each in a process of its own ---


def in_child(limit: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a process that may take `limit` bytes; None if that is not enough."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_limit, initargs=(int(limit),)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (MemoryError, RuntimeError) as error:  # a BrokenProcessPool is a RuntimeError
            if "alloc" in str(error) or "terminated abruptly" in str(error):
                return None
            raise


def _limit(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def trainer_of(method: type[GenLIP], recipe: Recipe) -> Trainer:
    model = method(recipe.config())
    initialize(model, mx.random.key(0))
    mx.eval(model.parameters())
    return Trainer(model, recipe)


def timed(trainer: Trainer, packs: Sequence[Pack]) -> float:
    """Tokens a second, one step a pack."""
    start = time.perf_counter()
    for pack in packs:
        trainer.step([pack])
    return sum(pack.num_tokens for pack in packs) / (time.perf_counter() - start)


def peak_of(trainer: Trainer, pack: Pack) -> float:
    """GB of a step, with weights, gradients and optimiser."""
    mx.clear_cache()
    mx.reset_peak_memory()
    trainer.step([pack])
    return mx.get_peak_memory() / GB


def measure_trainer(recipe: Recipe, stage: int, rounds: int) -> list[dict[str, Any]]:
    """This trainer at all sizes, in turn."""
    trainer = trainer_of(GenLIP, recipe)
    # 8192 tokens a turn or more: a single small step is over too soon to time.
    packs = {size: list(islice(packs_like(stage, recipe.config(), size), max(1, SIZES[2] // size))) for size in SIZES}
    peaks = {size: peak_of(trainer, packs[size][0]) for size in SIZES}
    rates: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(rounds):
        for size in SIZES:
            rates[size].append(timed(trainer, packs[size]))
    return [
        {
            "size": size,
            "tokens": packs[size][0].num_tokens,  # of the pack whose peak this is
            "tokens_per_second": max(rates[size]),
            "rounds": rates[size],
            "peak_gb": peaks[size],
            # of a round, against the size before: noise that lasts longer than a round cancels out
            "rate_to_smallest": statistics.median(a / b for a, b in zip(rates[size], rates[SIZES[0]])),
        }
        for size in SIZES
    ]


def measure_rival(recipe: Recipe, stage: int, method: str, size: int, rounds: int) -> dict[str, Any]:
    """A rival, and this trainer in turn with it on the same pack."""
    pack = next(packs_like(stage, recipe.config(), size))
    rival = trainer_of(METHODS[method], recipe)
    peak = peak_of(rival, pack)
    ours = trainer_of(GenLIP, recipe)
    timed(ours, [pack])
    rates = [(timed(rival, [pack]), timed(ours, [pack])) for _ in range(rounds)]
    return {
        "tokens_per_second": max(rate for rate, _ in rates),
        "peak_gb": peak,
        "two_streams_then": max(rate for _, rate in rates),
        "two_streams_are_faster_by": statistics.median(b / a for a, b in rates),
    }


def difference(recipe: Recipe) -> float:
    """The largest relative difference of the rivals' losses and gradient norms from this trainer's, in three steps."""
    pack = next(packs_like(1, recipe.config(), 1024))
    found = []
    for method in (GenLIP, *METHODS.values()):
        trainer = trainer_of(method, recipe)
        steps = [trainer.step([pack]) for _ in range(3)]
        found.append([number for step in steps for number in (step.loss, step.grad_norm)])
    return float(np.max(np.abs(np.array(found[1:]) / np.array(found[0]) - 1)))


def bench_throughput(recipe: Recipe, rounds: int, limit: float) -> dict[str, Any]:
    figures: dict[str, Any] = {"difference": in_child(limit, difference, recipe), "stages": {}}
    for stage in STAGES:
        ours = in_child(limit, measure_trainer, recipe, stage, rounds)
        rivals: dict[str, dict[int, Any]] = {}
        for method in METHODS:
            rivals[method] = {}
            for size in SIZES:
                pack = next(packs_like(stage, recipe.config(), size))
                fits = score_bytes(method, recipe.config(), pack) < limit
                cell = (recipe, stage, method, size, max(1, rounds // 2))
                rivals[method][size] = in_child(limit, measure_rival, *cell) if fits else None
        figures["stages"][stage] = {"two streams": ours, **rivals}
    return figures


class OnlyHead(GenLIP):
    """A captioner that takes its features ready-made: what it costs is the objective."""

    def outputs(
        self, patches: mx.array, input_ids: mx.array, sequence: PackedSequence, checkpoint: bool = False
    ) -> mx.array:
        return patches


def measure_objective(config: GenLIPConfig, rows: int, chunked: bool) -> dict[str, float]:
    # `outputs` are the features themselves, so the model has no trunk to speak of.
    model = OnlyHead(replace(config, num_hidden_layers=1, vocab_size=PUBLISHED_VOCAB))
    features = mx.random.normal((rows, config.hidden_size))
    targets = mx.random.randint(0, PUBLISHED_VOCAB, (rows,))
    sequence = PackedSequence([(1, 1)])
    batch = Batch(features, mx.zeros((0,), mx.int32), sequence, mx.arange(rows), targets)
    parameters = {"lm_head": model.lm_head.trainable_parameters()}

    def loss(parameters: Any, features: mx.array) -> mx.array:
        model.update(parameters)
        if not chunked:
            return nn.losses.cross_entropy(model.logits(features), targets, reduction="sum")
        return summed_loss(model, replace(batch, patches=features))

    mx.eval(parameters, features, targets)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(mx.value_and_grad(loss, argnums=(0, 1))(parameters, features))
    seconds = time.perf_counter() - start
    grown = mx.get_peak_memory() - held
    return {"peak_gb": grown / GB, "resident_gb": largest_resident() / GB, "seconds": seconds}


def bench_objective(config: GenLIPConfig, limit: float) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = []
    for rows in ROWS:
        row: dict[str, Any] = {"rows": rows}
        for name, chunked in ("chunked", True), ("plain", False):
            row[name] = in_child(limit, measure_objective, config, rows, chunked)
        cells.append(row)
    return cells


def bench_packing(recipe: Recipe, packs: int = 60) -> list[dict[str, Any]]:
    found = []
    for stage in STAGES:
        samples = samples_like(stage, recipe.config().vocab_size, recipe.max_sample_len)
        tokens = n = calls = 0
        padding = []
        for chosen, _ in islice(first_fit(samples, SIZES[-1], LOOKAHEAD), packs):
            ordered = in_pack_order(chosen)
            sequence = PackedSequence(
                [s.grid for s in ordered], [len(s.input_ids) for s in ordered], recipe.attention_slack
            )
            padding.append(sequence.attention_padding)
            tokens, n, calls = (
                tokens + sum(s.num_tokens for s in chosen),
                n + len(chosen),
                calls + len(sequence.buckets),
            )
        found.append(
            {
                "stage": stage,
                "mean_sample": tokens / n,
                "fill": tokens / (packs * SIZES[-1]),
                "attention_padding": statistics.mean(padding),
                "samples_a_pack": n / packs,
                "attention_calls_a_pack": calls / packs,
            }
        )
    return found


def bench_waiting(recipe: Recipe, steps: int = 60) -> dict[str, float]:
    processor = Processor.from_pretrained(GOLDEN / "tiny-navit")
    trainer = trainer_of(GenLIP, recipe)
    with Pipeline(open_source("synth:train:20000"), processor, budget=recipe.batch_tokens, workers=1) as pipeline:
        trainer.step([next(pipeline)])
        waited, start, tokens = pipeline.stats.seconds_waited, time.perf_counter(), 0
        for pack in islice(pipeline, steps):
            tokens += trainer.step([pack]).tokens
        seconds, waited = time.perf_counter() - start, pipeline.stats.seconds_waited - waited
    return {
        "steps": steps,
        "batch_tokens": recipe.batch_tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "seconds_waited": waited,
        "share": waited / seconds,
    }


def bench_memory(recipe: Recipe, budget: int = 256, early: int = 50, late: int = 500) -> dict[str, Any]:
    """Memory after the steps up to `early` and up to `late`, the largest of ten each."""
    trainer = trainer_of(GenLIP, recipe)
    draw = np.random.default_rng(0)
    seen: list[tuple[float, float]] = []
    shapes = set()
    for number in count():
        if number == late:
            break
        samples, room = [], budget
        while room >= 80:
            h, w = (int(n) for n in draw.integers(3, 13, 2))
            ids = draw.integers(0, recipe.config().vocab_size, int(draw.integers(10, 61))).astype(np.int32)
            if h * w + len(ids) <= room:
                samples.append(Measured(number, number, (h, w), ids, ids))
                room -= samples[-1].num_tokens
        pack = pack_of(in_pack_order(samples), recipe.config())
        shapes.add((pack.grids, pack.text_lengths))
        trainer.step([pack])
        seen.append(((mx.get_active_memory() + mx.get_cache_memory()) / GB, resident() / GB))
    figures: dict[str, Any] = {"packs_of_other_shapes": len(shapes)}
    for name, values in zip(("mlx_gb", "resident_gb"), zip(*seen)):
        before, after = (max(values[step - 10 : step]) for step in (early, late))
        figures[name] = {f"step {early}": before, f"step {late}": after, "growth": after / before - 1}
    return figures


def resident() -> float:
    """Bytes of this process in memory."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return 1024.0 * int(done.stdout)


def largest_resident() -> float:
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


# --- Tables ---


def show_throughput(console: Console, figures: dict[str, Any]) -> None:
    console.print(f"losses and gradient norms of the three ways agree to {figures['difference']:.1e}")
    for stage, ways in figures["stages"].items():
        smallest = ways["two streams"][0]
        title = f"stage {stage} (growth: peak against tokens, both to 2048's)"
        columns = ("tokens", "way", "tokens/s", "to 2048's", "peak GB", "growth", "two streams then")
        table = Table(*columns, title=title)
        for row in ways["two streams"]:
            size = row["size"]
            growth = row["peak_gb"] / smallest["peak_gb"] / (row["tokens"] / smallest["tokens"])
            numbers = (row["rate_to_smallest"], row["peak_gb"], growth)
            table.add_row(str(size), "two streams", f"{row['tokens_per_second']:.0f}", *(f"{x:.2f}" for x in numbers))
            for method in METHODS:
                rival = ways[method][size]
                if rival is None:
                    table.add_row("", method, "does not fit")
                    continue
                cells = (f"{rival['tokens_per_second']:.0f}", "", f"{rival['peak_gb']:.2f}", "")
                beside = f"{rival['two_streams_then']:.0f}, {rival['two_streams_are_faster_by']:.2f} x"
                table.add_row("", method, *cells, beside)
            table.add_section()
        console.print(table)


def show_objective(console: Console, figures: list[dict[str, Any]]) -> None:
    table = Table("rows", "way", "peak GB", "resident GB", "s", title=f"objective, V = {PUBLISHED_VOCAB}")
    for row in figures:
        for name in ("chunked", "plain"):
            cell = row[name]
            numbers = [f"{cell[n]:.2f}" for n in ("peak_gb", "resident_gb", "seconds")] if cell else ["does not fit"]
            table.add_row(str(row["rows"]) if name == "chunked" else "", name, *numbers)
    console.print(table)


def show_packing(console: Console, figures: list[dict[str, Any]]) -> None:
    table = Table(f"packs of {SIZES[-1]}: stage", "mean sample", "samples", "attention calls", "fill", "padding")
    for row in figures:
        numbers = (row["mean_sample"], row["samples_a_pack"], row["attention_calls_a_pack"])
        shares = (row["fill"], row["attention_padding"])
        table.add_row(str(row["stage"]), *(f"{x:.1f}" for x in numbers), *(f"{x:.1%}" for x in shares))
    console.print(table)


def show_waiting(console: Console, figures: dict[str, float]) -> None:
    console.print(
        f"waiting for data: {figures['share']:.2%} of {figures['steps']} steps' {figures['seconds']:.0f} s, "
        f"{figures['batch_tokens']} tokens a pack, {figures['tokens_per_second']:.0f} tokens/s"
    )


def show_memory(console: Console, figures: dict[str, Any]) -> None:
    for name in ("mlx_gb", "resident_gb"):
        *steps, growth = figures[name].items()
        said = ", ".join(f"{value:.3f} GB at {step}" for step, value in steps)
        console.print(f"{name.removesuffix('_gb')} memory: {said}: {growth[1]:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--recipe", default="tiny-stage1", help="whose model and settings are measured")
    parser.add_argument("--rounds", type=int, default=4, help="how often each throughput is measured")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    parser.add_argument("--memory", type=float, default=total / 2, help="GB a process may take; default: half of all")
    parser.add_argument("--json", help="write the figures to this file too")
    options = parser.parse_args()
    unknown = sorted(set(options.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    recipe = replace(load_recipe(options.recipe), grad_checkpoint=False)
    limit = options.memory * GB
    benches: dict[str, tuple[Callable[[], Any], Callable[[Console, Any], None]]] = {
        "throughput": (partial(bench_throughput, recipe, options.rounds, limit), show_throughput),
        "objective": (partial(bench_objective, recipe.config(), limit), show_objective),
        "packing": (partial(bench_packing, recipe), show_packing),
        "waiting": (partial(bench_waiting, recipe), show_waiting),
        "memory": (partial(bench_memory, recipe), show_memory),
    }
    figures: dict[str, Any] = {
        "recipe": options.recipe,
        "device": str(mx.default_device()),
        "blas": genlip_mlx.blas.loaded,
        "mlx": mx.__version__,
        "memory_limit_gb": options.memory,
    }
    console = Console()
    console.print(f"{options.recipe}, {figures['device']}, up to {options.memory:.1f} GB a process")
    for name, (bench, show) in benches.items():
        if not options.sections or name in options.sections:
            with console.status(f"{name}: a few minutes"):
                figures[name] = bench()
            show(console, figures[name])
            if options.json:
                Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
