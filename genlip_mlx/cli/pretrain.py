"""genlip-mlx pretrain and plot"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import note


def pretrain(
    recipe: Annotated[
        str | None, typer.Option(help="YAML file, or the name of a recipe that comes along.", show_default=False)
    ] = None,
    run_dir: Annotated[str | None, typer.Option(help="Run folder to make.", show_default=False)] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the recipe; may be repeated.", show_default=False)
    ] = None,
    resume: Annotated[str | None, typer.Option(help="Run folder to go on with.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would be, and check the data.")] = False,
) -> None:
    """Pretrain a model on pictures with captions.

    Ctrl-C saves and leaves; --resume goes on. On several machines: mlx.launch, with the same words on each.

    Examples:

        genlip-mlx pretrain --recipe tiny-stage1 --run-dir runs/stage1 --set data=scenes/train.jsonl

        genlip-mlx pretrain --resume runs/stage1
    """
    from ..train.plan import describe
    from ..train.recipe import load_recipe
    from ..train.run import Run

    if (recipe is None) == (resume is None):
        raise typer.BadParameter("name either --recipe or --resume")
    if resume is not None and (changes or dry_run or run_dir):
        raise typer.BadParameter("--resume takes the run as it is; leave out the other options")
    loaded = load_recipe(recipe, changes or []) if recipe is not None else None
    if dry_run and loaded is not None:
        for line in describe(loaded):
            print(line)
        return
    folder = resume or run_dir
    if folder is None:
        raise typer.BadParameter("a new run needs --run-dir")
    run = Run(folder, loaded, resume=resume is not None, log=note)
    finished = run.train(_reporter(run.recipe.iters, run.recipe.steps_per_report) if run.writes else lambda _: None)
    if run.writes:
        _draw(folder)
        note(f"{folder}: {'finished' if finished else 'stopped and saved'} at step {run.trainer.steps_done}")
    if not finished:
        raise typer.Exit(130)


def plot(
    runs: Annotated[list[str], typer.Argument(help="Run folders.", show_default=False)],
    output: Annotated[str | None, typer.Option(help="Picture to write.", show_default=False)] = None,
) -> None:
    """Draw the curves of runs, several over each other.

    Example:

        genlip-mlx plot runs/stage1 runs/stage2 --output curves.png
    """
    from ..train.plot import plot as run

    target = output or str(Path(runs[0]) / "curves.png")
    run(runs, target)
    print(target)


def _draw(folder: str) -> None:
    from ..train.plot import plot as run

    try:
        run([folder], Path(folder) / "curves.png")
    except ValueError as error:
        note(str(error))


def _reporter(total: int, every: int) -> Callable[[dict[str, Any]], None]:
    """A line every few steps: loss, speed, memory, time left."""
    started = time.monotonic()
    first: int | None = None

    def report(metrics: dict[str, Any]) -> None:
        nonlocal first
        step = metrics["step"]
        first = step - 1 if first is None else first
        if "valid_loss" in metrics:
            note(f"step {step}: validation loss {metrics['valid_loss']:.4f}")
        if metrics.get("skipped"):
            note(f"step {step}: the loss was not finite; nothing was changed")
        if step % every == 0 or step == total:
            left = (time.monotonic() - started) / (step - first) * (total - step)
            note(
                f"step {step}/{total}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
                f"{metrics['tokens_per_second']:.0f} tokens/s  {metrics['peak_memory_gb']:.2f} GB  "
                f"{int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02} left"
            )

    return report
