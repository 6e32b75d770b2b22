"""The `genlip-mlx` command: its table of commands, and what happens to errors.

Commands import what is heavy inside themselves, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from .. import __version__
from .attention import attention
from .caption import caption
from .console import note
from .convert import convert
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .features import features
from .finetune import finetune
from .fuse import fuse
from .info import info
from .pretrain import plot, pretrain
from .probe import probe
from .quantize import dequantize, quantize
from .readout import readout
from .report import report
from .synth import synth
from .tokenizer import app as tokenizer
from .zeroshot import zeroshot

INTERRUPTED = 130  # the exit code of a shell command that Ctrl-C ended

app = typer.Typer(
    name="genlip-mlx",
    help="GenLIP on MLX: one Transformer that reads a picture's patches and speaks its caption.",
    epilog="Any command takes --debug, which shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (convert, quantize, dequantize, export, caption, features, info, doctor, pretrain, plot, synth):
    app.command()(command)
app.command()(zeroshot)
app.command()(report)
app.command()(probe)
app.command()(evaluate)
app.command()(finetune)
app.command()(fuse)
app.command()(readout)
app.command()(attention)
app.add_typer(tokenizer, name="tokenizer")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Run the command; one clear line for an error (exit code 1; 2 for bad usage, 130 for Ctrl-C)."""
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    for stream in (sys.stdout, sys.stderr):  # a file name may hold what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code: int
    try:
        code = app(arguments, prog_name="genlip-mlx", standalone_mode=False) or 0
        if code == INTERRUPTED:
            note("interrupted")
    except typer.TyperException as error:  # a wrong or missing option
        code = error.exit_code
        if message := error.format_message():  # none if no command was given and the help is shown
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "genlip-mlx"
            note(f"error: {' '.join(message.split())} (see {command} --help)")
    except (ValueError, OSError) as error:
        code = _report(error, debug, str(error) or type(error).__name__)
    except Exception as error:
        code = _report(error, debug, f"unexpected {type(error).__name__}: {error} (--debug shows where)")
    sys.exit(code)


def _report(error: Exception, debug: bool, message: str) -> int:
    if debug:
        traceback.print_exception(error)
    note(f"error: {' '.join(message.split())}")
    return 1
