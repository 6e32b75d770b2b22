"""Where attention goes: how much of it each block spends on the first token and on the picture, and on which patches.

The one idea: attention is linear in its values. Columns appended to a block's values, 1 for the keys of interest and 0
elsewhere, come out of the very call that computes the block's own output as the probability that each query gives
those keys. So there is no second copy of attention to keep right, and no matrix of scores to store: a single
column for the first token, one for all of the picture, and a column a patch only where a map is wanted.

The first token is the first patch, in the upper left corner. A share of attention on it that is far above an even
share, in every picture, is an attention sink (section 3.2 and figure 3 of the paper).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..data.records import Record
from ..generate import Speaker
from ..model.attention import PackedContext
from ..model.genlip import GenLIP, VisionOnlyError
from ..model.rope import Rope
from ..model.sequence import PackedSequence
from ..processing.processor import DEFAULT_PROMPT, Processor
from ..processing.reader import Reading
from . import figures
from .picture import Picture, read_picture

CLOSED = 0.1  # a gate below this counts as closed
MAPPED = 4  # blocks whose maps are shown unless others are asked for
FIGURE_PIXELS = 1200  # width
CURVES_PIXELS = 380  # height of a row of curves
LABEL_PIXELS = 130  # titles and axes of a row of maps


class LayerError(ValueError):
    """A block that the model does not have."""


@dataclass(frozen=True)
class Allocation:
    """Shares of attention by block, first block first: means over queries, heads and samples; float64 [N].

    Each sample counts the same, however long its text; prompt, caption and end tokens are its text.
    """

    vision_to_first: np.ndarray  # what a patch gives the first patch
    text_to_first: np.ndarray  # what a text token gives the first patch
    text_to_vision: np.ndarray  # what a text token gives all patches, the first included
    gate_mean: np.ndarray | None  # mean of the gate, 0 to 1, over all tokens and channels; None without one
    gate_closed: np.ndarray | None  # share of the gate below CLOSED
    even: float  # what a patch would give the first patch if it gave all the same: mean of 1 / patches
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in asdict(self).items()}


@dataclass(frozen=True)
class Maps:
    """Mean attention over heads that each patch gets in one block; float32 [h, w]."""

    from_text: np.ndarray  # from the text tokens; adds up to the block's text_to_vision
    from_vision: np.ndarray  # from the patches; adds up to 1


class WatchedContext(PackedContext):
    """A `PackedContext` that also keeps how much attention each row gives to chosen keys.

    Args:
        columns: float [P + T, c]; column by column the weight of each row as a key, 1 or 0.

    Attributes:
        given: [P + T, H, c] after `attend`: attention probabilities, summed over each column's keys.
    """

    given: mx.array

    def __init__(self, sequence: PackedSequence, table: tuple[mx.array, mx.array], columns: mx.array):
        super().__init__(sequence, table)
        self.columns = columns

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        shape = (*values.shape[:2], self.columns.shape[1])
        columns = mx.broadcast_to(self.columns[:, None].astype(values.dtype), shape)
        out = super().attend(queries, keys, mx.concatenate([values, columns], axis=-1))
        out, self.given = mx.split(out, [values.shape[-1]], axis=-1)
        return out


def first_and_vision(sequence: PackedSequence) -> mx.array:
    """Columns for `WatchedContext`, [P + T, 2]: each sample's first patch; all patches."""
    rows = np.arange(sequence.num_image_rows + sequence.num_text_rows)
    starts = np.cumsum([0, *sequence.image_lengths[:-1]])
    return mx.array(np.stack([np.isin(rows, starts), rows < sequence.num_image_rows], axis=1).astype(np.float32))


def look(
    model: GenLIP, patches: np.ndarray, grid: tuple[int, int], input_ids: Sequence[int], layers: Sequence[int] = ()
) -> tuple[Allocation, dict[int, Maps]]:
    """The attention of one sample, block by block; memory is that of one block.

    Args:
        patches: float32 [h*w, 3*p*p].
        input_ids: the text, at least one token.
        layers: blocks to map, 1 for the first; memory for a block's map is patches x rows x heads numbers.

    Returns:
        The shares, and a map for each of `layers`.

    Raises:
        VisionOnlyError: if the model has no text side.
        LayerError: if there is no such block.
        ValueError: if there is no text.
    """
    check_layers(model, layers)
    if not len(input_ids):
        raise ValueError("attention from text needs a text of one token or more")
    sequence = PackedSequence([grid], [len(input_ids)])
    text = mx.array(np.asarray(input_ids, np.int32))
    x = model.embed(mx.array(patches), text, sequence)
    table = Rope(model.config).table(sequence.positions)
    columns, count = first_and_vision(sequence), len(patches)
    each = mx.eye(len(x), count)
    shares: list[mx.array] = []
    gates: list[mx.array] = []
    maps: dict[int, Maps] = {}
    for number, layer in enumerate(model.visual.layers, 1):
        mapped = number in layers
        context = WatchedContext(sequence, table, mx.concatenate([columns, each], axis=1) if mapped else columns)
        _, gate = layer.self_attn.query_and_gate(layer.layer_norm1(x))
        x = layer(x, context)
        given = context.given.astype(mx.float32).mean(axis=1)  # [P + T, c]
        vision, said = given[:count].mean(axis=0), given[count:].mean(axis=0)
        shares.append(mx.stack([vision[0], said[0], said[1]]))
        if gate is not None:
            gates.append(mx.stack([gate.astype(mx.float32).mean(), (gate < CLOSED).mean()]))
        mx.eval(x, shares[-1], gates[-1:], vision, said)
        if mapped:
            maps[number] = Maps(np.array(said[2:]).reshape(grid), np.array(vision[2:]).reshape(grid))
    table_of = np.array(mx.stack(shares)).astype(np.float64)
    gate_of = np.array(mx.stack(gates)).astype(np.float64) if gates else np.zeros((0, 2))
    mean, closed = (gate_of[:, 0], gate_of[:, 1]) if gates else (None, None)
    return Allocation(table_of[:, 0], table_of[:, 1], table_of[:, 2], mean, closed, 1 / count, 1), maps


def allocation(model: GenLIP, processor: Processor, samples: Iterable[Record]) -> Allocation:
    """Shares of attention, averaged over pictures with captions, for example of `genlip_mlx.data.sources.open_source`.

    Raises:
        VisionOnlyError: if the model has no text side.
        RecordError, ImageError: if a sample cannot be read.
        ValueError: if there is no sample.
    """
    if model.config.vision_only:
        raise VisionOnlyError
    found = []
    for record in samples:
        picture = read_picture(processor.image_processor, record.image, record.picture)
        text = record.text(processor).input_ids
        found.append(look(model, picture.patches, picture.grid, text.tolist())[0])
    return mean_allocation(found)


def mean_allocation(found: Sequence[Allocation]) -> Allocation:
    """The mean over samples of one model.

    Raises:
        ValueError: if there is none.
    """
    if not found:
        raise ValueError("attention is averaged over samples, and there is none")
    weights = np.array([one.samples for one in found], float)
    weights /= weights.sum()

    def mean(name: str) -> Any:
        values = [getattr(one, name) for one in found]
        return None if values[0] is None else sum(w * value for w, value in zip(weights, values))

    names = ("vision_to_first", "text_to_first", "text_to_vision", "gate_mean", "gate_closed", "even")
    return Allocation(**{name: mean(name) for name in names}, samples=sum(one.samples for one in found))


def own_words(model: GenLIP, processor: Processor, picture: Picture) -> tuple[list[int], str]:
    """A picture's text as the model itself would have it, and the greedy caption in it.

    Returns:
        ids of prompt, caption and, if the caption came to its end, end tokens; the caption.

    Raises:
        VisionOnlyError: if the model has no text side.
    """
    speaker = Speaker(model, processor, DEFAULT_PROMPT)
    (spoken,) = speaker.speak([Reading(picture.name, picture.patches, picture.grid)])
    ends = speaker.tokenizer.eos_ids if spoken.finish_reason == "stop" else []
    return [*speaker.prompt_ids, *spoken.tokens, *ends], spoken.caption or ""


def spread(model: GenLIP) -> list[int]:
    """Up to MAPPED blocks from the first to the last, evenly spread."""
    last = model.config.num_hidden_layers
    return sorted({round(number) for number in np.linspace(1, last, min(MAPPED, last))})


def check_layers(model: GenLIP, layers: Sequence[int]) -> None:
    """Whether a model has these blocks, 1 for the first.

    Raises:
        LayerError: if it does not.
    """
    last = model.config.num_hidden_layers
    for layer in layers:
        if not 1 <= layer <= last:
            raise LayerError(f"there is no block {layer}: 1 is the first, {last} the last")


@dataclass(frozen=True)
class Drawn:
    """What a figure shows of one model."""

    name: str
    allocation: Allocation
    picture: Picture  # the one that maps are drawn over
    maps: dict[int, Maps]


def draw(path: str | Path, models: Sequence[Drawn]) -> None:
    """Curves of all models over each other, and below the maps of one picture, two rows a model.

    Models of as many blocks are drawn by block; of different ones by depth.

    Raises:
        ValueError, OSError: as `figures.figure`.
    """
    heights = []
    for drawn in models:
        if drawn.maps:
            image = drawn.picture.image
            row = FIGURE_PIXELS / max(len(drawn.maps), 3) * 0.85 * image.height / image.width + LABEL_PIXELS
            heights += [row, row]
    with figures.figure(path, FIGURE_PIXELS, 2 * CURVES_PIXELS + sum(heights)) as figure:
        heights = [2 * CURVES_PIXELS, *heights]
        curves, *rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        _draw_curves(curves, models)
        titles = ((drawn, source) for drawn in models if drawn.maps for source in ("text", "vision"))
        for row, (drawn, source) in zip(rows, titles):
            _draw_maps(row, drawn, source)


def _draw_curves(figure: Any, models: Sequence[Drawn]) -> None:
    from matplotlib.lines import Line2D

    depths = {len(drawn.allocation.vision_to_first) for drawn in models}
    ((first, text), (vision, gate)) = figure.subplots(2, 2)
    legend = []
    for drawn, color, marker in zip(models, figures.COLORS * len(models), figures.MARKERS * len(models)):
        shares = drawn.allocation
        count = len(shares.vision_to_first)
        block = np.arange(1, count + 1) if len(depths) == 1 else np.arange(1, count + 1) / count * 100
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
        legend.append(Line2D([], [], **style, label=drawn.name))
        first.plot(block, shares.vision_to_first * 100, **style)
        first.axhline(shares.even * 100, color=color, linestyle="--", linewidth=1)
        text.plot(block, shares.text_to_first * 100, **style)
        vision.plot(block, shares.text_to_vision * 100, **style)
        if shares.gate_mean is not None and shares.gate_closed is not None:
            gate.plot(block, shares.gate_mean * 100, **style)
            gate.plot(block, shares.gate_closed * 100, **style, linestyle=":")
    for axes, title in (
        (first, "vision to the first token (dashed: if all patches got the same)"),
        (text, "text to the first token"),
        (vision, "text to vision"),
        (gate, f"gate: mean (solid), share below {CLOSED:.0%} open (dotted)"),
    ):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("block" if len(depths) == 1 else "depth, % of the model's blocks")
        axes.set_ylabel("openness or share, %" if axes is gate else "share of attention, %")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.08 if axes in (first, text) else 105)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if not gate.lines:
        gate.text(0.5, 0.5, "no gate", transform=gate.transAxes, ha="center")
    figure.legend(handles=legend, loc="outside upper center", ncols=min(len(legend), 3), frameon=False)


def _draw_maps(figure: Any, drawn: Drawn, source: str) -> None:
    kind = "the text" if source == "text" else "all patches"
    figure.suptitle(f"{drawn.name}: attention from {kind} to each patch of {Path(drawn.picture.name).name}")
    row = figure.subplots(1, max(len(drawn.maps), 3), squeeze=False)[0]
    for axes in row[len(drawn.maps) :]:
        axes.set_axis_off()
    for axes, (block, maps) in zip(row, drawn.maps.items()):
        values = maps.from_text if source == "text" else maps.from_vision
        largest = max(float(values.max()), 1e-9)
        heat = figures.show_heat(axes, drawn.picture.image, values / largest * 100, 100)
        axes.set_title(f"block {block}, largest {values.max():.1%}")
        axes.label_outer(remove_inner_ticks=False)
    figure.colorbar(heat, ax=list(row), label="% of the largest", fraction=0.02)
