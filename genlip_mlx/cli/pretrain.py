"""genlip-mlx pretrain and plot"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    report_to: Annotated[
        str | None, typer.Option(help="Also tell wandb or swanlab, as mlx-lm does.", show_default=False)
    ] = None,
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
    from .training import check_services, reporting_service, training_reporter

    if (recipe is None) == (resume is None):
        raise typer.BadParameter("name either --recipe or --resume")
    if resume is not None and (changes or dry_run or run_dir):
        raise typer.BadParameter("--resume takes the run as it is; leave out the other options")
    if report_to is not None:
        check_services(report_to)
    loaded = load_recipe(recipe, changes or []) if recipe is not None else None
    if dry_run and loaded is not None:
        for line in describe(loaded):
            print(line)
        return
    folder = resume or run_dir
    if folder is None:
        raise typer.BadParameter("a new run needs --run-dir")
    run = Run(folder, loaded, resume=resume is not None, log=note)
    if run.writes:
        every = run.recipe.steps_per_report
        service = reporting_service(report_to, folder, run.recipe.to_dict(), every) if report_to else None
        with training_reporter(run.recipe.iters, every, service) as report:
            finished = run.train(report)
    else:
        finished = run.train()
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
