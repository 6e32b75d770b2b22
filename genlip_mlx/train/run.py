"""A run folder: what a run was told, what it measured, and where it can go on from.

    config.yaml             the recipe, resolved
    metrics.jsonl           one object a step, validation losses among them
    samples.jsonl           captions of some held-out pictures at each validation, if the recipe asks for them
    checkpoints/step-N/     a model folder, with optimizer.safetensors and run.json (place in the data);
                            where adapters are trained, these stand in for the model
    adapters/               the best adapters so far, if any are trained
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import yaml
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint.adapters import adapter_tensors, fill, write_adapters
from ..checkpoint.hub import last_checkpoint, resolve
from ..checkpoint.lazy import LazyTensor, parse_dtype
from ..checkpoint.load import default_dtype, load_model, write_model
from ..checkpoint.reading import open_checkpoint
from ..checkpoint.writing import model_folder, write_safetensors
from ..config import GenLIPConfig
from ..data.held_out import set_aside
from ..data.packing import Pack
from ..data.pipeline import Pipeline
from ..data.records import Record, RecordError
from ..data.sources import Source, open_source
from ..model.genlip import GenLIP, initialize
from ..processing.images import ImageProcessor
from ..processing.processor import Processor
from ..processing.tokenizer import load_tokenizer
from .adapters import prepare
from .recipe import Recipe, RecipeError, recipe_from
from .trainer import StepResult, Trainer

Report = Callable[[dict[str, Any]], None]

SAMPLES = "samples.jsonl"
SAMPLE_TOKENS = 128  # that the caption of a held-out picture has at most


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
        start = last_checkpoint(self.folder) if resume else None
        if resume and start is None:
            log("no checkpoint yet: starting over")

        self.adapters = recipe.adapters()
        self.adapter_path = Path(recipe.adapter_path).expanduser() if recipe.adapter_path else self.folder / "adapters"
        # A checkpoint of adapters holds no model: that is loaded from where it came.
        source = start if start is not None and self.adapters is None else starting_point(recipe)
        self.processor = make_processor(recipe, source)
        model = _make_model(recipe, source)
        tokenizer, vocab_size = self.processor.tokenizer, model.config.vocab_size
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise RecipeError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model has room for {vocab_size}")
        # Opened at once, so that a mistake in it shows now and not at the first validation.
        data, self.held_out = open_data(recipe)
        self.trainer = Trainer(model, recipe, parse_dtype(recipe.dtype) or default_dtype())
        self.best: dict[str, Any] = {}  # step and loss of the best validation
        self.before: float | None = None  # validation loss of the model that a fine-tuning starts from
        self.last: float | None = None  # of the latest validation
        data_state = None
        if start is not None:
            state = json.loads((start / "run.json").read_text())
            self._restore(start, state)
            data_state = state["data"]
        self.pipeline = Pipeline(
            data,
            self.processor,
            budget=recipe.batch_tokens,
            seed=recipe.seed,
            workers=recipe.workers,
            max_sample_len=recipe.max_sample_len,
            rank=self.group.rank(),
            world=self.group.size(),
            shuffle=recipe.shuffle,
            start=data_state,
            log=log,
        )
        if self.writes:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            config.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
            for name in ("metrics.jsonl", SAMPLES):
                _keep_steps(self.folder / name, self.trainer.steps_done)

    def train(self, report: Report = lambda metrics: None) -> bool:
        """Run to the last step, or to where `patience` ends; False if Ctrl-C came before (the state is saved then).

        Args:
            report: called with each step's metrics.
        """
        recipe, trainer = self.recipe, self.trainer
        mx.reset_peak_memory()
        with _interrupts() as interrupted, self.pipeline, self._metrics_file() as write:
            if self.held_out and recipe.fine_tune_type and self.before is None:
                self.before = self._validate(self.held_out)
                self.log(f"validation loss before training: {self.before:.4f}")
            while trainer.steps_done < recipe.iters and not self.stalled and not interrupted():
                started, waited = time.perf_counter(), self.pipeline.stats.seconds_waited
                packs = list(islice(self.pipeline, recipe.grad_accumulation_steps))
                result = trainer.step(packs)
                metrics = self._metrics(result, packs, time.perf_counter() - started)
                metrics["data_wait"] = round(self.pipeline.stats.seconds_waited - waited, 4)
                last = result.step == recipe.iters
                if self.held_out and (last or result.step % recipe.steps_per_eval == 0):
                    metrics["valid_loss"] = self._validate(self.held_out)
                    if not self.best or metrics["valid_loss"] < self.best["valid_loss"]:
                        self.best = {"step": result.step, "valid_loss": metrics["valid_loss"]}
                write(metrics)
                report(metrics)
                if last or result.step % recipe.steps_per_save == 0 or self.best.get("step") == result.step:
                    self.save()
            if interrupted() or self.stalled:
                self.save()
        return trainer.steps_done >= recipe.iters or self.stalled

    @property
    def stalled(self) -> bool:
        """Whether so many validations as the recipe's patience have brought nothing better."""
        recipe = self.recipe
        if not self.best or not recipe.patience:
            return False
        return (self.trainer.steps_done - self.best["step"]) // recipe.steps_per_eval >= recipe.patience

    def _validate(self, held_out: Source) -> float:
        """The loss on held-out data; captions of its first pictures go to the run folder."""
        self.last = self.validate(held_out)
        if self.writes and self.recipe.valid_captions:
            with self.trainer.computing() as model, (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
                records = _first(held_out, self.processor, self.recipe.valid_captions)
                for sample in spoken(model, self.processor, records):
                    file.write(json.dumps({"step": self.trainer.steps_done} | sample, ensure_ascii=False) + "\n")
        return self.last

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
            "before": self.before,
            "last": self.last,
            "data": self.pipeline.state(),
        }
        optimizer: dict[str, mx.array] = {}
        tree_flatten(self.trainer.optimizer.state, destination=optimizer)
        with model_folder(folder) as temporary:
            if self.adapters is not None:
                self._write_adapters(temporary)
            else:
                write_model(temporary, self.trainer.model, self.processor, folder.name, self.recipe.init_from)
            with (temporary / "optimizer.safetensors").open("wb") as file:
                tensors = {name: LazyTensor.of(value) for name, value in optimizer.items()}
                write_safetensors(file, tensors, {"format": "mlx"}, lambda nbytes: None)
            (temporary / "run.json").write_text(json.dumps(state) + "\n")
        for old in folder.parent.glob("step-*"):
            if old != folder and old.name != f"step-{self.best.get('step')}":
                shutil.rmtree(old, ignore_errors=True)
        if self.adapters is not None and self.best.get("step", self.trainer.steps_done) == self.trainer.steps_done:
            self._write_adapters(self.adapter_path)

    def _write_adapters(self, folder: Path) -> None:
        assert self.adapters is not None
        content = self.recipe.to_dict() | {
            "model": self.recipe.init_from,
            "lora_parameters": self.adapters.lora_parameters,
        }
        write_adapters(folder, adapter_tensors(self.trainer.model), content)

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        optimizer = cast(dict[str, mx.array], mx.load(str(checkpoint / "optimizer.safetensors")))
        self.trainer.optimizer.state = tree_unflatten(list(optimizer.items()))
        self.trainer.steps_done, self.trainer.bad_steps = state["step"], state["bad_steps"]
        self.best, self.before, self.last = state["best"], state.get("before"), state.get("last")
        if self.adapters is not None:
            fill(self.trainer.model, checkpoint, mx.float32)

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
    """The model folder that `init_from` names; None for a model made anew."""
    return None if recipe.init_from is None else resolve(recipe.init_from)


def open_data(recipe: Recipe) -> tuple[Source, Source | None]:
    """What a recipe trains on, and its held-out data, if any.

    Raises:
        SourceError: if there is nothing of the kind.
    """
    columns = {name: getattr(recipe, name) for name in ("image_column", "caption_column", "prompt_column")}
    data = open_source(recipe.data, **columns)
    if recipe.valid_data is not None:
        return data, open_source(recipe.valid_data, **columns, split="validation")
    return set_aside(data, recipe.valid_share, recipe.seed) if recipe.valid_share else (data, None)


def _first(source: Source, processor: Processor, count: int) -> Iterator[Record]:
    """Of the first records, those that can be used."""
    for _, number in islice(source.places(0, None), count):
        with suppress(RecordError):  # validation leaves it out as well
            record = source[number]
            record.text(processor)
            yield record


def spoken(model: GenLIP, processor: Processor, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """What a model says of records' pictures, greedily, beside what it should say."""
    from ..generate import captions

    for record in records:
        prompt, reference = record.question
        (said,) = captions(model, processor, [record.image], prompt, max_tokens=SAMPLE_TOKENS)
        yield {"image": record.picture, "prompt": prompt, "reference": reference, "caption": said.caption}


def make_processor(recipe: Recipe, source: Path | None) -> Processor:
    """Pictures as the recipe says, words as its tokenizer does, or else that of the model started from."""
    if recipe.fine_tune_type is not None and source is not None:
        return Processor.from_pretrained(source)
    if recipe.tokenizer is None and source is not None:
        return replace(Processor.from_pretrained(source), image_processor=_image_processor(recipe))
    return Processor(_image_processor(recipe), load_tokenizer(Path(recipe.tokenizer or "")))


def _make_model(recipe: Recipe, source: Path | None) -> GenLIP:
    """The model to train, what is trained of it in float32: that of a folder, or made anew."""
    if source is None:
        model = GenLIP(recipe.config())
        initialize(model, mx.random.key(recipe.seed))
        mx.eval(model.parameters())
        return model
    trainable_config(recipe, source)
    model = load_model(source, "float32" if recipe.adapters() is None else recipe.dtype)
    if recipe.fine_tune_type is not None:
        prepare(model, recipe, parse_dtype(recipe.dtype) or default_dtype())
    if recipe.drop_path_rate is not None:
        model.config = replace(model.config, drop_path_rate=recipe.drop_path_rate)
    return model


def trainable_config(recipe: Recipe, source: Path | None) -> GenLIPConfig:
    """The config of the model that a recipe trains.

    Raises:
        RunError: if it cannot be trained in this way.
        CheckpointError, ConfigError: if it cannot be read.
    """
    if source is None:
        return recipe.config()
    config = open_checkpoint(source).config
    if config.vision_only:
        raise RunError(f"{source}: is vision-only; training needs a text embedding and a head")
    if config.quantization is not None and recipe.adapters() is None:
        remedy = ", or train adapters beside it (lora, dora)" if recipe.fine_tune_type else ""
        raise RunError(f"{source}: is quantized; dequantize it first{remedy}")
    return config


def _image_processor(recipe: Recipe) -> ImageProcessor:
    return ImageProcessor(
        native=recipe.native, size=recipe.image_size, min_pixels=recipe.min_pixels, max_pixels=recipe.max_pixels
    )


def _keep_steps(path: Path, steps: int) -> None:
    """Drop the lines that were written after the checkpoint a run goes on from, and a line cut by a crash."""
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
