"""Quantizing by data: bits where they matter, rounding that keeps outputs, scales learned from the full model.

Three steps, each measured against plain rounding on captions that no step has seen:
`sensitivity` chooses the bits of each layer (only if a budget is given), `rounding` the integers, `distillation` the
scales.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import mlx.core as mx

from ..checkpoint.card import describe
from ..checkpoint.convert import Report, check_unquantized, origin, report_on
from ..checkpoint.errors import DiskFullError
from ..checkpoint.hub import check_upload, resolve, upload
from ..checkpoint.lazy import LazyTensor, dtype_name
from ..checkpoint.load import default_dtype, load_model
from ..checkpoint.names import matrices
from ..checkpoint.quantization import (
    Packing,
    Quantization,
    QuantizationError,
    estimate_size,
    packings,
    stored_layout,
)
from ..checkpoint.reading import open_checkpoint
from ..checkpoint.writing import copy_processor, model_folder, write_weights
from ..config import GenLIPConfig, estimate_parameters
from ..data.pipeline import Pipeline
from ..data.sources import open_source
from ..model.genlip import GenLIP
from ..processing.processor import Processor
from .distillation import Divergence, distil, divergence, make_student, packed_parts, restore
from .objective import Batch
from .rounding import round_layers
from .sensitivity import BITS, rounding_costs, spend

HELD_BACK = 4  # packs that the result is measured on
MEASURED = 8  # packs that layers' inputs and sensitivities are measured on

Advance = Callable[[str, float, float], None]
"""Called with the name of a step, and what is done of it and in all."""


@dataclass(frozen=True)
class Calibration:
    """How to calibrate."""

    data: str  # as `data.sources.open_source` takes it
    iters: int = 200
    learning_rate: float = 0.01  # see `distillation.distil`
    batch_tokens: int = 4096  # image and text tokens a pack
    target_bpw: float | None = None  # bits a weight, scales and unquantized weights included; None: bits are given


@dataclass(frozen=True)
class Outcome:
    """What calibration gained, on packs held back from it."""

    plain: Divergence  # rounded plainly, to the same bits
    rounded: Divergence  # rounded by data
    distilled: Divergence

    @property
    def best(self) -> Divergence:
        """Of the three; a result that is no number, as after too high a learning rate, is never it."""
        found = (self.distilled, self.rounded, self.plain)
        return min(found, key=lambda one: math.inf if math.isnan(one.total) else one.total)


def calibrate(
    model: str | Path,
    mlx_path: str | Path,
    quantization: Quantization,
    calibration: Calibration,
    revision: str | None = None,
    upload_repo: str | None = None,
    overwrite: bool = False,
    log: Callable[[str], None] | None = None,
    advance: Advance = lambda step, done, total: None,
) -> tuple[Report, Outcome]:
    """A quantized copy of a model, calibrated on captions.

    What is not packed is copied as it is. In memory: the full model, the quantized one, and what one pack needs.

    Args:
        model: folder or hub repo id.
        mlx_path: folder to write; it must not exist, be empty, or, with `overwrite`, hold a model.
        quantization: of affine mode. With a `target_bpw` it gives the group size.
        log: called with one line for each of the first skipped records of a kind.
        advance: told how the work goes.

    Raises:
        QuantizationError: if the mode is not affine, the model is quantized or vision-only, or the target out of reach.
        DataError: if no record has a caption that can be used.
        CheckpointError, FileExistsError, DiskFullError, HubError: as `checkpoint.convert.convert`.
    """
    if quantization.default.mode != "affine":
        raise QuantizationError(
            f"calibration learns scales and biases, which quantization mode {quantization.default.mode} does not have; "
            "choose affine, or leave out --calibrate"
        )
    if upload_repo is not None:
        check_upload(upload_repo)
    source = open_checkpoint(resolve(model, revision))
    check_unquantized(source)
    if source.config.vision_only:
        raise QuantizationError(
            f"{source.folder}: is vision-only, and calibration needs its text side; calibrate the whole model, then "
            "make an encoder of it with convert --vision-only"
        )
    config = quantization.apply(source.config)
    if calibration.target_bpw is not None:
        _check_target(calibration.target_bpw, quantization, config, source.dtype)
    processor = Processor.from_pretrained(source.folder)
    target = Path(mlx_path).expanduser().resolve()
    with model_folder(target, overwrite) as folder:
        _check_room(folder, target, estimate_size(config, source.dtype))
        copy_processor(source.folder, folder, vision_only=False)
        # A CPU is quick in float32 alone; a GPU need not round what the folder will keep.
        computing = "float32" if default_dtype() == mx.float32 else dtype_name(source.dtype)
        full = load_model(source.folder, computing)
        with Pipeline(
            open_source(calibration.data), processor, budget=calibration.batch_tokens, workers=0, log=log
        ) as pipeline:
            batches = (batch for pack in pipeline if (batch := Batch.of(pack)).label_tokens)
            held_back, measured = list(islice(batches, HELD_BACK)), list(islice(batches, MEASURED))
            if calibration.target_bpw is not None:
                config = _within_budget(full, measured, quantization, calibration.target_bpw, source.dtype, advance)
            student, outcome = _learn(full, config, held_back, measured, batches, calibration, source.dtype, advance)
        tensors = dict(source.tensors)
        for path, parts in packed_parts(student, packings(config)).items():
            for part, value in parts.items():
                tensors[f"{path}.{part}"] = LazyTensor.of(value).cast(source.dtype)
        tensors = {name: tensors[name] for name in stored_layout(config, source.dtype)}
        describe(folder, config, source.dtype, upload_repo or target.name, origin(model))
        write_weights(folder, tensors, "mlx")
    if upload_repo is not None:
        upload(target, upload_repo)
    return report_on(Path(mlx_path), config, tensors), outcome


def _learn(
    full: GenLIP,
    config: GenLIPConfig,
    held_back: list[Batch],
    measured: list[Batch],
    batches: Iterator[Batch],
    calibration: Calibration,
    dtype: mx.Dtype,
    advance: Advance,
) -> tuple[GenLIP, Outcome]:
    """The best student on the packs held back, whichever step it comes from."""
    packed = packings(config)
    student = make_student(full, config, packed, dtype)
    stages = [(packed_parts(student, packed), divergence(student, full, held_back))]
    round_layers(student, full, measured, packed, dtype, lambda done, total: advance("rounding", done, total))
    stages.append((packed_parts(student, packed), divergence(student, full, held_back)))
    distil(
        student,
        full,
        batches,
        packed,
        dtype,
        calibration.iters,
        calibration.learning_rate,
        lambda done, total: advance("distilling", done, total),
    )
    stages.append((packed_parts(student, packed), divergence(student, full, held_back)))
    outcome = Outcome(*(found for _, found in stages))
    restore(student, next(parts for parts, found in stages if found == outcome.best))
    return student, outcome


def _check_target(target_bpw: float, quantization: Quantization, config: GenLIPConfig, dtype: mx.Dtype) -> None:
    weights = sum(estimate_parameters(config).values())
    low, high = (
        8 * estimate_size(quantization.with_bits(dict.fromkeys(packings(config), bits)).apply(config), dtype) / weights
        for bits in (min(BITS), max(BITS))
    )
    if not low <= target_bpw <= high:
        raise QuantizationError(
            f"--target-bpw {target_bpw:g} is out of reach: with {min(BITS)} to {max(BITS)} bits, groups of "
            f"{quantization.default.group_size} and {dtype_name(dtype)} scales this model takes "
            f"{math.ceil(100 * low) / 100:.2f} to {math.floor(100 * high) / 100:.2f} bits a weight"
        )


def _within_budget(
    full: GenLIP,
    batches: list[Batch],
    quantization: Quantization,
    target_bpw: float,
    dtype: mx.Dtype,
    advance: Advance,
) -> GenLIPConfig:
    """The config whose bits cost least of all that fit the target."""
    shapes = {path: matrices(full.config)[path] for path in packings(quantization.apply(full.config))}
    ladder = [dataclasses.replace(quantization.default, bits=bits) for bits in BITS]
    costs = rounding_costs(
        full, batches, dict.fromkeys(shapes, ladder), report=lambda done, total: advance("measuring", done, total)
    )

    def nbytes(path: str, packing: Packing) -> int:
        return packing.nbytes(shapes[path], dtype)

    lowest = quantization.with_bits(dict.fromkeys(shapes, min(BITS))).apply(full.config)
    fixed = estimate_size(lowest, dtype) - sum(nbytes(path, ladder[0]) for path in shapes)
    budget = int(target_bpw * sum(estimate_parameters(full.config).values()) / 8) - fixed
    chosen = spend(costs, nbytes, budget)
    return quantization.with_bits({path: packing.bits for path, packing in chosen.items()}).apply(full.config)


def _check_room(folder: Path, target: Path, nbytes: int) -> None:
    """Before the work, not after it."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise DiskFullError(
            f"{target}: needs {nbytes / 1e6:.1f} MB, and the disk has {free / 1e6:.1f} MB left; nothing was changed. "
            "Free some space or choose another disk"
        )
