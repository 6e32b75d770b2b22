"""A run folder: what a run was told, what it measured, and where it can go on from.

    config.yaml             the recipe, resolved
    metrics.jsonl           one object a step, validation losses among them
    checkpoints/step-N/     a model folder, with optimizer.safetensors and run.json (place in the data)
    curves.png

Everything a step depends on is in its checkpoint or follows from its number: a run that is killed and resumed repeats
what it would have done.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import yaml
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint.hub import resolve
from ..checkpoint.lazy import LazyTensor, parse_dtype
from ..checkpoint.load import default_dtype, load_model, write_model
from ..checkpoint.writing import model_folder, write_safetensors
from ..data.packing import Pack
from ..data.pipeline import Pipeline
from ..data.sources import Source, open_source
from ..model.genlip import GenLIP, initialize
from ..processing.images import ImageProcessor
from ..processing.processor import Processor
from ..processing.tokenizer import load_tokenizer
from .recipe import Recipe, RecipeError, recipe_from
from .trainer import StepResult, Trainer

Report = Callable[[dict[str, Any]], None]


class RunError(ValueError):
    """A run folder that cannot be started in, or gone on from."""


class Run:
    """One training run in a folder.

    Args:
        folder: made if it does not exist; refused if it holds a run already, unless `resume`.
        recipe: None to resume with the run's own.
        resume: go on from the folder's last checkpoint.
        log: called with one line on what the user should know.

    Raises:
        RunError, RecipeError, or what loading model and data raises.
    """

    def __init__(
        self, folder: str | Path, recipe: Recipe | None = None, resume: bool = False, log: Callable[[str], None] = print
    ):
        self.folder = Path(folder)
        self.log = log
        self.group = mx.distributed.init()
        self.writes = self.group.rank() == 0  # one machine writes for all
        config = self.folder / "config.yaml"
        if resume:
            if not config.is_file():
                raise RunError(f"{self.folder}: no run to resume; there is no config.yaml")
            recipe = recipe_from(yaml.safe_load(config.read_text()))
        elif self.writes and config.exists():  # the others may find what the first has just written
            raise RunError(f"{self.folder}: holds a run already; resume it, or choose another folder")
        if recipe is None:
            raise RunError("a new run needs a recipe")
        self.recipe = recipe
        start = _last_checkpoint(self.folder) if resume else None
        if resume and start is None:
            log("no checkpoint yet: starting over")

        source = start or starting_point(recipe)
        self.processor = make_processor(recipe, source)
        model = _make_model(recipe, source)
        tokenizer, vocab_size = self.processor.tokenizer, model.config.vocab_size
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise RecipeError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model has room for {vocab_size}")
        # Opened at once, so that a mistake in it shows now and not at the first validation.
        self.held_out = open_source(recipe.valid_data, split="validation") if recipe.valid_data else None
        self.trainer = Trainer(model, recipe, parse_dtype(recipe.dtype) or default_dtype())
        self.best: dict[str, Any] = {}  # step and loss of the best validation
        data_state = None
        if start is not None:
            state = json.loads((start / "run.json").read_text())
            self._restore(start, state)
            data_state = state["data"]
        self.pipeline = Pipeline(
            open_source(recipe.data),
            self.processor,
            budget=recipe.batch_tokens,
            seed=recipe.seed,
            workers=recipe.workers,
            max_sample_len=recipe.max_sample_len,
            rank=self.group.rank(),
            world=self.group.size(),
            start=data_state,
            log=log,
        )
        if self.writes:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            config.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
            _keep_metrics(self.folder / "metrics.jsonl", self.trainer.steps_done)

    def train(self, report: Report = lambda metrics: None) -> bool:
        """Run to the last step; False if Ctrl-C ended it before (its state is saved then).

        Args:
            report: called with each step's metrics.
        """
        recipe, trainer = self.recipe, self.trainer
        mx.reset_peak_memory()
        with _interrupts() as interrupted, self.pipeline, self._metrics_file() as write:
            while trainer.steps_done < recipe.iters and not interrupted():
                started, waited = time.perf_counter(), self.pipeline.stats.seconds_waited
                packs = list(islice(self.pipeline, recipe.grad_accumulation_steps))
                result = trainer.step(packs)
                metrics = self._metrics(result, packs, time.perf_counter() - started)
                metrics["data_wait"] = round(self.pipeline.stats.seconds_waited - waited, 4)
                last = result.step == recipe.iters
                if self.held_out and (last or result.step % recipe.steps_per_eval == 0):
                    metrics["valid_loss"] = self.validate(self.held_out)
                    if not self.best or metrics["valid_loss"] < self.best["valid_loss"]:
                        self.best = {"step": result.step, "valid_loss": metrics["valid_loss"]}
                write(metrics)
                report(metrics)
                if last or result.step % recipe.steps_per_save == 0 or self.best.get("step") == result.step:
                    self.save()
            if interrupted():
                self.save()
        return trainer.steps_done >= recipe.iters

    def validate(self, held_out: Source) -> float:
        """Mean loss per label token on the first packs of held-out data, the same ones each time."""
        recipe = self.recipe
        with Pipeline(
            held_out,
            self.processor,
            budget=recipe.batch_tokens,
            workers=0,
            max_sample_len=recipe.max_sample_len,
            rank=self.group.rank(),
            world=self.group.size(),
            shuffle=False,
            epochs=1,
        ) as pipeline:
            return self.trainer.evaluate(islice(pipeline, recipe.valid_batches))

    def save(self) -> None:
        """Write the current step's checkpoint; older ones go, but for the best.

        Raises:
            DiskFullError: if the disk is full; the older checkpoints stand.
        """
        folder = self.folder / "checkpoints" / f"step-{self.trainer.steps_done}"
        if not self.writes or folder.exists():
            return
        state = {
            "step": self.trainer.steps_done,
            "bad_steps": self.trainer.bad_steps,
            "best": self.best,
            "data": self.pipeline.state(),
        }
        optimizer: dict[str, mx.array] = {}
        tree_flatten(self.trainer.optimizer.state, destination=optimizer)
        with model_folder(folder) as temporary:
            write_model(temporary, self.trainer.model, self.processor, folder.name, self.recipe.init_from)
            with (temporary / "optimizer.safetensors").open("wb") as file:
                tensors = {name: LazyTensor.of(value) for name, value in optimizer.items()}
                write_safetensors(file, tensors, {"format": "mlx"}, lambda nbytes: None)
            (temporary / "run.json").write_text(json.dumps(state) + "\n")
        for old in folder.parent.glob("step-*"):
            if old != folder and old.name != f"step-{self.best.get('step')}":
                shutil.rmtree(old, ignore_errors=True)

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        optimizer = cast(dict[str, mx.array], mx.load(str(checkpoint / "optimizer.safetensors")))
        self.trainer.optimizer.state = tree_unflatten(list(optimizer.items()))
        self.trainer.steps_done, self.trainer.bad_steps = state["step"], state["bad_steps"]
        self.best = state["best"]

    def _metrics(self, result: StepResult, packs: list[Pack], seconds: float) -> dict[str, Any]:
        metrics: dict[str, Any] = {
            "step": result.step,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "label_tokens": result.label_tokens,
            "tokens_per_second": round(result.tokens / seconds, 1),
            "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 3),
        }
        if result.skipped:
            metrics["skipped"] = True
        return metrics

    @contextmanager
    def _metrics_file(self) -> Iterator[Report]:
        if not self.writes:
            yield lambda metrics: None
            return
        with (self.folder / "metrics.jsonl").open("a") as file:

            def write(metrics: dict[str, Any]) -> None:
                # nan and infinity are not JSON
                clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
                file.write(json.dumps(clean) + "\n")
                file.flush()

            yield write


def starting_point(recipe: Recipe) -> Path | None:
    """The model folder that `init_from` names, of a run its best checkpoint; None for a model made anew."""
    if recipe.init_from is None:
        return None
    return best_checkpoint(Path(recipe.init_from).expanduser()) or resolve(recipe.init_from)


def make_processor(recipe: Recipe, source: Path | None) -> Processor:
    """Pictures as the recipe says, words as its tokenizer does, or else that of the model started from."""
    if recipe.tokenizer is None and source is not None:
        return replace(Processor.from_pretrained(source), image_processor=_image_processor(recipe))
    return Processor(_image_processor(recipe), load_tokenizer(Path(recipe.tokenizer or "")))


def _make_model(recipe: Recipe, source: Path | None) -> GenLIP:
    """The model to train, in float32: that of a folder, or made anew."""
    if source is None:
        model = GenLIP(recipe.config())
        initialize(model, mx.random.key(recipe.seed))
        mx.eval(model.parameters())
        return model
    model = load_model(source, "float32")
    if model.config.vision_only:
        raise RunError(f"{source}: is vision-only; training needs a text embedding and a head")
    if model.config.quantization is not None:
        raise RunError(f"{source}: is quantized; dequantize it first")
    if recipe.drop_path_rate is not None:
        model.config = replace(model.config, drop_path_rate=recipe.drop_path_rate)
    return model


def _image_processor(recipe: Recipe) -> ImageProcessor:
    return ImageProcessor(
        native=recipe.native, size=recipe.image_size, min_pixels=recipe.min_pixels, max_pixels=recipe.max_pixels
    )


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint of a run with the lowest validation loss, or its last; None if this is no run."""
    last = _last_checkpoint(run)
    if last is None:
        return None
    best = json.loads((last / "run.json").read_text())["best"]
    chosen = run / "checkpoints" / f"step-{best.get('step')}"
    return chosen if chosen.is_dir() else last


def _last_checkpoint(run: Path) -> Path | None:
    steps = [p for p in (run / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return max(steps, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def _keep_metrics(path: Path, steps: int) -> None:
    """Drop what was measured after the checkpoint a run goes on from, and a line cut by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= steps:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop after the current step; a second one stops at once."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
