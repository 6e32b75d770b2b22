"""genlip-mlx doctor"""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import progress, size

if TYPE_CHECKING:
    from ..doctor import Device, Kernel, Parity, Report

LABEL = 15  # columns of the names on the left
CELL = 11  # columns of a number
WIDTH = 110  # columns in all


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Also load this model (folder or hub repo id) and time it.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine: device, versions, speed, and that results are the reference's.

    Golden parity recomputes two small models with known results. The exit code is 1
    if a check fails; warnings leave it 0.

    Examples:

        genlip-mlx doctor

        genlip-mlx doctor --model genlip-l16
    """
    from ..doctor import examine

    with progress("checking", "steps") as advance:
        report = examine(model, advance)
    print(_json(report) if as_json else "\n".join(_lines(report)))
    if report.failed:
        raise typer.Exit(1)


def _json(report: Report) -> str:
    import dataclasses
    import json

    return json.dumps(_finite(dataclasses.asdict(report) | {"failed": report.failed}), indent=2)


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(report: Report) -> list[str]:
    sections = [_machine(report), _parity(report.golden, report.device), _kernels(report.kernels), _checks(report)]
    return [line for section in sections if section for line in (*section, "")][:-1]


def _row(label: str, text: str) -> str:
    return f"{label:<{LABEL}}  {text}"


def _machine(report: Report) -> list[str]:
    device = report.device
    facts = [device.name if device.backend == "CPU" else f"{device.backend}: {device.name}"]
    if device.cores is not None:
        facts.append(f"{device.cores} CPU cores, no GPU in use")
    if device.memory_bytes is not None:
        facts.append(f"{size(device.memory_bytes)} memory")
    if device.usable_bytes is not None:
        facts.append(f"{size(device.usable_bytes)} {'for the GPU' if device.backend == 'Metal' else 'free'}")
    versions = dict(report.versions)
    system = versions.pop("system")
    listed = textwrap.wrap(", ".join(f"{name} {version}" for name, version in versions.items()), WIDTH - LABEL - 2)
    return [
        _row("device", ", ".join(facts)),
        _row("system", system),
        *(_row("" if number else "versions", line) for number, line in enumerate(listed)),
        _row("BLAS (CPU)", report.blas),
    ]


def _parity(golden: tuple[Parity, ...], device: Device) -> list[str]:
    if not golden:
        return []
    lines = [
        "Golden parity: largest difference from the reference implementation's results, in float32",
        _row("", "".join(f"{case:>{CELL}}" for case in (*(parity.case for parity in golden), "at most"))),
    ]
    for same in zip(*(parity.differences for parity in golden)):
        cells = "".join(f"{_number(difference.value):>{CELL}}" for difference in same)
        lines.append(_row(same[0].quantity, f"{cells}{_number(same[0].tolerance):>{CELL}}"))
    counts = [f"{parity.greedy_identical} of {parity.greedy_captions}" for parity in golden]
    lines.append(_row("same captions", "".join(f"{count:>{CELL}}" for count in counts)))
    if golden[0].bfloat16_cosine is not None:
        cosines = "".join(f"{parity.bfloat16_cosine:>{CELL}.5f}" for parity in golden)
        lines.append(_row("bfloat16 cosine", f"{cosines}   features in bfloat16 against the reference's; 1 is equal"))
    if device.backend != "CPU":
        lines.append("A GPU may round float32 inputs of matrix products to 10 bits, so it may differ more than a CPU.")
    return lines


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _kernels(kernels: tuple[Kernel, ...]) -> list[str]:
    if not kernels:
        return []
    by_dim: dict[int, list[Kernel]] = {}
    for kernel in kernels:
        by_dim.setdefault(kernel.head_dim, []).append(kernel)
    first = next(iter(by_dim.values()))
    lines = [
        "Fused attention: one GPU kernel that stores no score matrix, by head dim, use and mask",
        _row("head dim", "".join(f"{f'{kernel.use}, {kernel.mask}':>17}" for kernel in first)),
    ]
    return lines + [
        _row(str(head_dim), "".join(f"{kernel.result:>17}" for kernel in row)) for head_dim, row in by_dim.items()
    ]


def _checks(report: Report) -> list[str]:
    width = max(len(check.name) for check in report.checks)
    lines = []
    for check in report.checks:
        lines.append(f"{check.status:<14}  {check.name:<{width}}  {check.message}")
        if check.remedy is not None:
            lines.append(f"{'':<14}  {'':<{width}}  -> {check.remedy}")
    return lines
