"""What each patch would say: the language head on the features of single patches.

The one idea: a patch's feature is what the head reads anyway (section 3.1 of the paper: the text is predicted from the
same `ln_post` output), so its likeliest next tokens name what the patch stands for. A vocabulary of 151936 tokens
times 1024 patches would fill 600 MB, so the patches go through the head in parts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..model.genlip import GenLIP, VisionOnlyError
from ..processing.tokenizer import Tokenizer
from . import figures
from .picture import Picture

CHUNK_LOGITS = 2**24  # logits in memory at a time: 64 MB in float32
PATCH_PIXELS = 56  # side of a drawn patch at least, so that its token can be read
FIGURE_PIXELS = 1200  # the longer side of a drawn picture at least
LABEL_PIXELS = 90  # around a drawn picture, for its title and axes; and for a legend
BAR_PIXELS = 160  # for a colour bar


class WordError(ValueError):
    """A word that no patch of this model can say."""


@dataclass(frozen=True)
class Readout:
    """The likeliest tokens of each patch, best first, patches in row-major order."""

    grid: tuple[int, int]  # h, w in patches
    ids: np.ndarray  # int32 [h*w, top]
    p: np.ndarray  # float32 [h*w, top], probabilities
    word: np.ndarray | None  # float32 [h*w], probability of a word, if one was asked for


@dataclass(frozen=True)
class Word:
    """How a model would begin to say a word.

    With byte-level and SentencePiece vocabularies alike " cat" after a word and "cat" at the start of a text
    are different tokens; a patch says the word by either.
    """

    text: str
    ids: tuple[int, ...]  # alternatives: probabilities are added
    whole: bool  # False: the word is several tokens, and these are first ones


@dataclass(frozen=True)
class Group:
    """Patches whose drawn token is the same word."""

    token: str
    patches: tuple[int, ...]  # row-major numbers
    p: float  # mean probability


def readout(
    model: GenLIP, patches: np.ndarray, grid: tuple[int, int], top: int = 5, word: Word | None = None
) -> Readout:
    """The `top` likeliest tokens of each patch of a picture, nothing left out.

    Args:
        patches: float32 [h*w, 3*p*p].
        word: also give each patch's probability of this one.

    Raises:
        VisionOnlyError: if the model has no head.
        ValueError: if there are fewer than `top` tokens.
    """
    vocabulary = model.config.vocab_size
    if model.config.vision_only:
        raise VisionOnlyError
    if not 1 <= top <= vocabulary:
        raise ValueError(f"top must lie in 1 to {vocabulary}, the size of the vocabulary, not {top}")
    features = model.encode(mx.array(patches), [grid])
    rows = max(1, CHUNK_LOGITS // vocabulary)
    parts: list[list[np.ndarray]] = []
    for start in range(0, len(patches), rows):
        logits = model.logits(features[start : start + rows]).astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        ids = mx.argpartition(-logits, top - 1, axis=-1)[:, :top] if top < vocabulary else mx.argsort(-logits, axis=-1)
        best = mx.take_along_axis(logits, ids, axis=-1)
        order = mx.argsort(-best, axis=-1)
        ids, best = mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(best, order, axis=-1)
        said = mx.exp(logits[:, mx.array(word.ids)] - total).sum(axis=-1) if word else total[:, 0]
        parts.append([np.array(ids.astype(mx.int32)), np.array(mx.exp(best - total)), np.array(said)])
    all_ids, p, word_p = (np.concatenate(column) for column in zip(*parts))
    return Readout(grid, all_ids, p, word_p if word else None)


def find_word(tokenizer: Tokenizer, text: str) -> Word:
    """The tokens by which a patch may say a word: the whole word where one token is, else the first of several.

    Raises:
        WordError: if it is not one word, or its beginning is not in the vocabulary.
    """
    text = text.strip()
    if len(text.split()) != 1:
        raise WordError(f"query {text!r}: a single word is needed")
    spellings = []
    for spelling in (text, f" {text}"):
        # A space that is a token of its own says nothing of the word.
        ids = [i for i in tokenizer.encode(spelling) if tokenizer.id_to_text(i).strip()]
        if ids and text.startswith(tokenizer.id_to_text(ids[0]).strip()):
            spellings.append(ids)
    if not spellings:
        raise WordError(f"query {text!r}: the word is not in the vocabulary of this model, not even its beginning")
    whole = [ids for ids in spellings if len(ids) == 1]
    return Word(text, tuple(dict.fromkeys(ids[0] for ids in whole or spellings)), bool(whole))


def is_word(tokenizer: Tokenizer, token_id: int) -> bool:
    """The stop list of drawings: False for punctuation, blanks, special tokens and parts of characters."""
    if not tokenizer.token_bytes(token_id):
        return False
    try:
        text = tokenizer.token_bytes(token_id).decode()
    except UnicodeDecodeError:
        return False
    return any(c.isalnum() for c in text)


def drawn_tokens(tokenizer: Tokenizer, result: Readout) -> list[list[tuple[str, float]]]:
    """Each patch's tokens that a drawing shows, with probabilities: `result` less the stop list, each word once."""
    shown = []
    for ids, p in zip(result.ids.tolist(), result.p.tolist()):
        words: dict[str, float] = {}
        for i, share in zip(ids, p):
            if is_word(tokenizer, i):
                words.setdefault(" ".join(tokenizer.id_to_text(i).split()), share)
        shown.append(list(words.items()))
    return shown


def groups(tokens: Sequence[Sequence[tuple[str, float]]]) -> list[Group]:
    """Patches by their first drawn token, capitals aside; the largest group first."""
    members: dict[str, list[int]] = defaultdict(list)
    for patch, words in enumerate(tokens):
        if words:
            members[words[0][0].casefold()].append(patch)
    found = []
    for patches in members.values():
        spelling = Counter(tokens[i][0][0] for i in patches).most_common(1)[0][0]
        found.append(Group(spelling, tuple(patches), float(np.mean([tokens[i][0][1] for i in patches]))))
    return sorted(found, key=lambda group: (-len(group.patches), group.token))


def regions(patches: Sequence[int], width: int) -> list[list[int]]:
    """The connected parts of a set of patches (neighbours share a side)."""
    left, parts = set(patches), []
    while left:
        part = [left.pop()]
        for patch in part:  # grows while it is walked
            row, column = divmod(patch, width)
            near = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
            for neighbour in (r * width + c for r, c in near if 0 <= c < width):
                if neighbour in left:
                    left.remove(neighbour)
                    part.append(neighbour)
        parts.append(sorted(part))
    return sorted(parts)


def draw(path: str | Path, picture: Picture, tokens: Sequence[Sequence[tuple[str, float]]]) -> None:
    """Draw each patch's tokens over the picture, and below (or beside, if tall) its regions by token.

    Args:
        tokens: of each patch, from `drawn_tokens`.

    Raises:
        ValueError, OSError: as `figures.figure`.
    """
    tall = picture.image.height > picture.image.width
    cell, width, height = _sizes(picture)
    width, height = width + LABEL_PIXELS, height + LABEL_PIXELS
    size = (2 * width, height) if tall else (width, 2 * height)
    with figures.figure(path, size[0], size[1] + LABEL_PIXELS) as figure:  # and the legend
        each, regional = figure.subplots(*((1, 2) if tall else (2, 1)))
        _draw_tokens(each, picture, tokens, cell)
        legend = _draw_regions(regional, picture, groups(tokens), cell)
        figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)


def draw_word(path: str | Path, picture: Picture, word: Word, p: np.ndarray) -> None:
    """Draw the probability of a word over the patches.

    Args:
        p: float32 [h*w].

    Raises:
        ValueError, OSError: as `figures.figure`.
    """
    _, width, height = _sizes(picture)
    with figures.figure(path, width + LABEL_PIXELS, height + LABEL_PIXELS + BAR_PIXELS) as figure:
        axes = figure.subplots()
        heat = figures.show_heat(axes, picture.image, p.reshape(picture.grid), float(p.max()))
        label = "probability" if word.whole else "probability of the word's first token"
        figure.colorbar(heat, ax=axes, location="bottom", fraction=20 / height, aspect=40, shrink=0.6, label=label)
        axes.set_title(f"“{word.text}” in each patch")


def _sizes(picture: Picture) -> tuple[tuple[float, float], float, float]:
    """Pixels of a drawn patch (height, width), and width and height of the drawn picture."""
    h, w = picture.grid
    ratio = picture.image.height / picture.image.width
    width = max(w * PATCH_PIXELS, FIGURE_PIXELS if ratio <= 1 else FIGURE_PIXELS / ratio)
    return (width * ratio / h, width / w), width, width * ratio


def _draw_tokens(
    axes: Any, picture: Picture, tokens: Sequence[Sequence[tuple[str, float]]], cell: tuple[float, float]
) -> None:
    h, w = picture.grid
    figures.show_picture(axes, picture.image, picture.grid, fade=0.45)
    figures.show_borders(axes, np.arange(h * w).reshape(h, w), colors="white", linewidths=0.6)
    lines = max(1, min(3, int(cell[0] / 24)))  # tokens that fit above each other
    for patch, words in enumerate(tokens):
        row, column = divmod(patch, w)
        for line, (word, _) in enumerate(words[:lines]):
            y = row + (line + 1) / (min(lines, len(words)) + 1)
            style = {"weight": "bold"} if line == 0 else {"alpha": 0.75}
            figures.write(axes, column + 0.5, y, word, 0.94 * cell[1], min(20, 0.8 * cell[0] / lines), **style)
    axes.set_title("likeliest tokens of each patch, punctuation left out")


def _draw_regions(axes: Any, picture: Picture, found: Sequence[Group], cell: tuple[float, float]) -> list[Any]:
    """Draws the regions; returns what the legend shows."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    h, w = picture.grid
    figures.show_picture(axes, picture.image, picture.grid, fade=0.3, grey=True)
    number = np.full(h * w, -1)
    fill = np.zeros((h * w, 4))
    legend = []
    for i, group in enumerate(found):
        number[list(group.patches)] = i
        if i < len(figures.FILLS):
            fill[list(group.patches)] = to_rgba(figures.FILLS[i], 0.55)
            label = f"{group.token}: {len(group.patches)} of {h * w} patches, mean probability {group.p:.2f}"
            legend.append(Patch(facecolor=fill[group.patches[0]], edgecolor="black", label=label))
    axes.imshow(fill.reshape(h, w, 4), extent=(0, w, h, 0), aspect=axes.get_aspect(), interpolation="nearest")
    figures.show_borders(axes, number.reshape(h, w), colors="black", linewidths=0.8)
    for group in found:
        for region in regions(group.patches, w):
            row, start, end = _widest_row(region, w)
            room = 0.94 * cell[1] * (end - start)
            figures.write(axes, (start + end) / 2, row + 0.5, group.token, room, min(26, 0.5 * cell[0]), weight="bold")
    axes.set_title("regions of the same likeliest token")
    return legend


def _widest_row(region: Sequence[int], width: int) -> tuple[int, int, int]:
    """Where a label of a region has most room: the longest run of patches as (row, first column, column after it)."""
    runs: list[tuple[int, int, int]] = []
    for row, column in (divmod(patch, width) for patch in region):
        if runs and runs[-1][0] == row and runs[-1][2] == column:
            runs[-1] = (row, runs[-1][1], column + 1)
        else:
            runs.append((row, column, column + 1))
    longest = max(end - start for _, start, end in runs)
    return [run for run in runs if run[2] - run[1] == longest][-1 - sum(r[2] - r[1] == longest for r in runs) // 2]
