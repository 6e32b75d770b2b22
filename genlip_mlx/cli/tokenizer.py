"""`tokenizer train`: a vocabulary made from one's own captions."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import note, progress

app = typer.Typer(no_args_is_help=True, help="Make a tokenizer for a model of one's own.")


@app.callback()
def _group() -> None:
    # With a callback, `train` stays a word of its own although it is the only command.
    pass


@app.command()
def train(
    data: Annotated[
        str,
        typer.Option(
            help="JSONL file, folder, tars or parquet by name or pattern, hub data set, or synth:SPLIT:SIZE.",
            show_default=False,
        ),
    ],
    output: Annotated[str, typer.Option(help="Folder to write tokenizer.model into.", show_default=False)],
    vocab_size: Annotated[int, typer.Option(help="Pieces, 262 special ones and bytes included.")] = 4096,
    caption_column: Annotated[
        str | None,
        typer.Option(help="Field of the captions or conversations, if not a usual one.", show_default=False),
    ] = None,
) -> None:
    """Train a SentencePiece model on the captions of a data set.

    It takes any text: what the vocabulary lacks is spelled in bytes. The special tokens that training and
    captioning need are in it. Give the folder to `pretrain` as `tokenizer:`.

    Examples:

        genlip-mlx tokenizer train --data captions.jsonl --vocab-size 16384 --output tokenizer
    """
    from ..data.sources import open_source
    from ..data.tokenizer import train as run

    source = open_source(data, caption_column=caption_column)
    with progress("reading", "records") as advance:
        trained = run(source, vocab_size, output, advance)
    for reason, count in trained.skipped.items():
        note(f"skipped {count} records: {reason}")
    print(
        f"{trained.path}: {trained.vocab_size} pieces from {trained.records} records, "
        f"{trained.characters_per_token:.2f} characters a token"
    )
