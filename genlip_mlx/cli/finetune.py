"""genlip-mlx finetune"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import note

if TYPE_CHECKING:
    from ..train.recipe import Recipe
    from ..train.run import Run

# What differs from pretraining, before the config file and the options have their say.
DEFAULTS: dict[str, Any] = {
    "fine_tune_type": "lora",
    "iters": 1000,
    "batch_tokens": 4096,
    "warmup": 0.03,
    "drop_path_rate": 0.0,
    "valid_share": 0.1,
    "valid_captions": 4,
}


class FineTuneType(str, Enum):
    lora = "lora"
    dora = "dora"
    full = "full"


class Optimizer(str, Enum):
    adamw = "adamw"
    muon = "muon"


class LrSchedule(str, Enum):
    cosine = "cosine"
    constant = "constant"


def finetune(
    model: Annotated[
        str | None, typer.Option(help="Model folder, run folder, or hub repo id (owner/name).", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="JSONL file, image folder, tars, parquet or hub name.", show_default=False)
    ] = None,
    fine_tune_type: Annotated[
        FineTuneType | None, typer.Option(help="What is trained; lora if not given.", show_default=False)
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Blocks to fine-tune, from the last; all if not given.", show_default=False)
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            help="Of a full fine-tuning: vision, text, head, or some of them with commas.", show_default=False
        ),
    ] = None,
    iters: Annotated[int | None, typer.Option(help="Steps; 1000 if not given.", show_default=False)] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Times through the data, instead of --iters.", show_default=False)
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Image and text tokens a step; 4096 if not given.", show_default=False)
    ] = None,
    grad_accumulation_steps: Annotated[
        int | None, typer.Option(help="Packs of --batch-tokens a step.", show_default=False)
    ] = None,
    grad_checkpoint: Annotated[bool, typer.Option("--grad-checkpoint", help="Less memory, a third more time.")] = False,
    optimizer: Annotated[Optimizer | None, typer.Option(help="adamw if not given.", show_default=False)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest rate; 1e-4, or 1e-5 for full, if not given.", show_default=False)
    ] = None,
    lr_schedule: Annotated[LrSchedule | None, typer.Option(help="cosine if not given.", show_default=False)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="0.01 if not given.", show_default=False)] = None,
    grad_clip: Annotated[
        float | None, typer.Option(help="Largest gradient norm; 1.0 if not given.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type to compute in: auto, float32, float16, bfloat16.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the order, the adapters and the held-out share.", show_default=False)
    ] = None,
    caption_column: Annotated[str | None, typer.Option(help="Field of the caption.", show_default=False)] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Field of the prompt.", show_default=False)] = None,
    val_data: Annotated[
        str | None,
        typer.Option(help="Held-out data; if not given, the data's own split or a tenth of it.", show_default=False),
    ] = None,
    val_batches: Annotated[int | None, typer.Option(help="Packs of it that are used; 25.", show_default=False)] = None,
    no_validate: Annotated[bool, typer.Option("--no-validate", help="Train on all of the data.")] = False,
    steps_per_eval: Annotated[
        int | None, typer.Option(help="Steps between validations; a tenth of all.", show_default=False)
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Validations without improvement that end the run.", show_default=False)
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="YAML of a recipe's fields; options go before it.", show_default=False),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of a recipe, such as lora_parameters.rank=16.", show_default=False),
    ] = None,
    run_dir: Annotated[str | None, typer.Option(help="Run folder to make.", show_default=False)] = None,
    adapter_path: Annotated[
        str | None, typer.Option(help="Where the adapter goes: by default RUN_DIR/adapters.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --run-dir.")] = False,
) -> None:
    """Teach a model your own pictures and captions.

    Validates on held-out data, keeps the best, and says at the end whether it got better. Ctrl-C saves and
    leaves; --resume goes on. Without --run-dir, the run is kept in the folder of --adapter-path.

    Examples:

        genlip-mlx finetune --model genlip-l16-4bit --data receipts.jsonl --run-dir runs/receipts

        genlip-mlx finetune --model genlip-l16 --data photos/ --fine-tune-type full --parts head --epochs 3 --run-dir r

        genlip-mlx finetune --resume --run-dir runs/receipts
    """
    folder = run_dir or adapter_path
    if folder is None:
        raise typer.BadParameter("name the run folder: --run-dir (or --adapter-path)")
    if iters is not None and epochs is not None:
        raise typer.BadParameter("name either --iters or --epochs")
    if no_validate and val_data is not None:
        raise typer.BadParameter("--no-validate leaves no use for --val-data")

    from ..train.plan import describe_fine_tuning
    from ..train.run import Run

    options: dict[str, Any] = {
        "init_from": model,
        "data": data,
        "fine_tune_type": fine_tune_type and fine_tune_type.value,
        "num_layers": num_layers,
        "parts": parts and [part.strip() for part in parts.split(",")],
        "iters": iters,
        "batch_tokens": batch_tokens,
        "grad_accumulation_steps": grad_accumulation_steps,
        "grad_checkpoint": grad_checkpoint or None,
        "optimizer": optimizer and optimizer.value,
        "learning_rate": learning_rate,
        "lr_schedule": lr_schedule and lr_schedule.value,
        "weight_decay": weight_decay,
        "grad_clip": grad_clip,
        "dtype": dtype,
        "seed": seed,
        "caption_column": caption_column,
        "prompt_column": prompt_column,
        "valid_data": val_data,
        "valid_batches": val_batches,
        "steps_per_eval": steps_per_eval,
        "patience": patience,
        "adapter_path": adapter_path if run_dir is not None else folder,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if resume:
        if given.keys() - {"adapter_path"} or epochs or config or changes or no_validate:
            raise typer.BadParameter("--resume takes the run as it is; leave out the other options")
        recipe = None
    else:
        recipe = _recipe(given, config, changes or [], epochs, no_validate)
        for line in describe_fine_tuning(recipe):
            note(line)
    run = Run(folder, recipe, resume=resume, log=note)
    _train(run, folder)


def _recipe(
    given: dict[str, Any], config: str | None, changes: list[str], epochs: float | None, no_validate: bool
) -> Recipe:
    """Options over the config file over the defaults."""
    from ..data.held_out import find_splits
    from ..train.recipe import change, read_recipe, recipe_from

    content = dict(DEFAULTS)
    if config is not None:
        content |= read_recipe(config)
        if "model" in content:  # mlx-lm's word; in a recipe it is a preset
            content["init_from"] = content.pop("model")
    content |= given
    for key_value in changes:
        change(content, key_value)
    for name, option in (("init_from", "--model"), ("data", "--data")):
        if not content.get(name):
            raise typer.BadParameter(f"Missing option '{option}'")
    if content["fine_tune_type"] == "full" and content.get("adapter_path"):
        raise typer.BadParameter("full fine-tuning makes a whole model, not an adapter: name --run-dir alone")
    if no_validate:
        content |= {"valid_data": None, "valid_share": 0.0}
    elif not content.get("valid_data"):
        content["data"], content["valid_data"] = find_splits(str(content["data"]))
    if epochs is not None:
        content["iters"] = _iterations(recipe_from(content), epochs)
    content.setdefault("learning_rate", 1e-5 if content["fine_tune_type"] == "full" else 1e-4)
    # A tenth of the steps between validations, unless told.
    content.setdefault("steps_per_eval", max(1, content["iters"] // 10) if isinstance(content["iters"], int) else 1)
    content.setdefault("steps_per_save", content["steps_per_eval"])
    return recipe_from(content)


def _iterations(recipe: Recipe, epochs: float) -> int:
    """Steps that so many times through the data take, measured on up to 10000 records."""
    import math

    from ..data.pipeline import survey
    from ..train.run import make_processor, open_data, starting_point

    if not epochs > 0:
        raise typer.BadParameter(f"--epochs must be positive, not {epochs:g}")
    data, _ = open_data(recipe)
    found = survey(
        data,
        make_processor(recipe, starting_point(recipe)),
        samples=10_000,
        budget=recipe.batch_tokens,
        seed=recipe.seed,
        max_sample_len=recipe.max_sample_len,
    )
    steps = max(1, math.ceil(epochs * found.packs_per_epoch / recipe.grad_accumulation_steps))
    note(f"{epochs:g} times through {found.records} records: {steps} steps")
    return steps


def _train(run: Run, folder: str) -> None:
    from .training import training_reporter

    if run.writes:
        with training_reporter(run.recipe.iters, run.recipe.steps_per_report) as report:
            finished = run.train(report)
    else:
        finished = run.train()
    if not run.writes:
        return
    if not finished:
        note(f"{folder}: stopped and saved at step {run.trainer.steps_done}; go on with --resume")
        raise typer.Exit(130)
    if run.stalled and run.trainer.steps_done < run.recipe.iters:
        note(f"ended at step {run.trainer.steps_done}: {run.recipe.patience} validations brought nothing better")
    _tell(run)


def _tell(run: Run) -> None:
    """Validation before and after, and where the result is."""
    from ..checkpoint.hub import best_checkpoint

    if run.held_out is not None:
        import math

        rows = [
            ("before", 0, run.before),
            ("best", run.best.get("step"), run.best.get("valid_loss")),
            ("last", run.trainer.steps_done, run.last),
        ]
        print(f"{'validation':10} {'step':>6} {'nll':>9} {'perplexity':>11}")
        for name, step, loss in rows:
            if loss is not None:
                print(f"{name:10} {step:6} {loss:9.4f} {math.exp(min(loss, 700)):11.2f}")
    if run.adapters is not None:
        size = sum(path.stat().st_size for path in run.adapter_path.glob("adapters.safetensors"))
        print(f"adapter    {run.adapter_path} ({size / 1e6:.2f} MB)")
    else:
        print(f"model      {best_checkpoint(Path(run.folder))}")
