"""genlip-mlx readout"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from . import options

ROWS = 12  # of the printed table


def readout(
    image: Annotated[str, typer.Argument(help="A picture: a file or an http(s) address.", show_default=False)],
    model: options.Model,
    top: Annotated[int, typer.Option(min=1, help="Tokens of each patch.")] = 5,
    query: Annotated[
        str | None, typer.Option(help="Draw this word's probability over the patches instead.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Figure to write: F.png, F.pdf or F.svg.", show_default=False)
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write grid, top tokens and probabilities here.", show_default=False)
    ] = None,
    dtype: options.LoadDtype = options.Dtype.auto,
    revision: options.Revision = None,
) -> None:
    """Read out what each patch of a picture would say.

    Prints the words that most patches say; draws the tokens over the picture, and its regions by token. Drawings and
    the table leave punctuation out; the JSON file leaves out nothing. A --query word counts by its whole token,
    with and without a space before it; if it has none, by the first token it begins with.

    Examples:

        genlip-mlx readout cat.jpg --model genlip-l16 --output tokens.png --json tokens.json

        genlip-mlx readout cat.jpg --model genlip-l16 --query cat --output cat.png
    """
    from ..analysis import figures
    from ..analysis.picture import read_picture
    from ..analysis.readout import draw, draw_word, drawn_tokens, find_word, groups
    from ..analysis.readout import readout as read_out
    from ..checkpoint.load import load
    from ..files import atomic_file
    from ..model.genlip import VisionOnlyError
    from .console import note

    if output is not None:
        figures.check_figure(output)
    loaded, processor = load(model, dtype.value, revision)
    tokenizer = processor.tokenizer
    if tokenizer is None:
        raise VisionOnlyError
    word = None if query is None else find_word(tokenizer, query)
    if word is not None and not word.whole:
        firsts = " or ".join(repr(tokenizer.id_to_text(i)) for i in word.ids)
        note(f"{word.text!r} is several tokens; counted is the first, {firsts}")
    picture = read_picture(processor.image_processor, image)
    result = read_out(loaded, picture.patches, picture.grid, top, word)
    tokens = drawn_tokens(tokenizer, result)
    h, w = result.grid

    if json_file is not None:
        rows = zip(result.ids.tolist(), result.p.tolist())
        listed = [[{"id": i, "token": tokenizer.id_to_text(i), "p": p} for i, p in zip(ids, ps)] for ids, ps in rows]
        content: dict[str, Any] = {"image": image, "model": model, "grid": [h, w], "top": listed}
        if word is not None and result.word is not None:
            content["query"] = {"word": word.text, "ids": word.ids, "whole": word.whole, "p": result.word.tolist()}
        with atomic_file(json_file, text=True) as file:
            json.dump(content, file, ensure_ascii=False)
        note(f"tokens of {h * w} patches written to {json_file}")
    if output is not None:
        if word is not None and result.word is not None:
            draw_word(output, picture, word, result.word)
        else:
            draw(output, picture, tokens)
        note(f"figure written to {output}")

    print(f"{image}: {h} x {w} patches")
    if word is not None and result.word is not None:
        best = int(result.word.argmax())
        print(
            f"{word.text!r}: mean probability {result.word.mean():.4f}, highest {result.word[best]:.4f} "
            f"in row {best // w}, column {best % w} (from 0)"
        )
        return
    print(f"{'patches':>7}  {'mean p':>6}  likeliest token")
    for group in groups(tokens)[:ROWS]:
        print(f"{len(group.patches):>7}  {group.p:>6.3f}  {group.token}")
