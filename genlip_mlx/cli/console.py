"""What every command prints with: results on stdout, everything about the work on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[float, float], None]

PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal


def note(message: str) -> None:
    """One line about the work, on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, unit: str = "", hidden: bool = False) -> Iterator[Advance]:
    """A progress bar on a terminal, a line now and then elsewhere; nothing for work under a second.

    Yields:
        a function to call with (done, total) as the work goes on.
    """
    if hidden:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _bar(label, unit) as advance:
            yield advance
    else:
        last = time.monotonic()

        def plain(done: float, total: float) -> None:
            nonlocal last
            if time.monotonic() - last >= PLAIN_INTERVAL:
                last = time.monotonic()
                note(f"{label}: {done:.0f} of {total:.0f}{unit and ' '}{unit} ({done / total:.0%})")

        yield plain


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=None)

    def advance(done: float, total: float) -> None:
        if not bar.live.is_started and time.monotonic() - started > 1 and done < total:
            bar.start()
        bar.update(task, completed=int(done), total=int(total))

    try:
        yield advance
    finally:
        bar.stop()


def size(nbytes: float) -> str:
    """Bytes for a reader: 1.3 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
