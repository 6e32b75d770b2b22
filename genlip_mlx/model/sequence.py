"""The packed two-stream sequence: which row belongs to which picture, and who attends to whom.

A pack is two flat streams, all image rows [P, D] then all text rows [T, D]; nothing is padded
outside attention. Inside it, samples of like length form a bucket that one attention call
serves. A pack of samples of equal sizes in order is a plain reshape; otherwise rows move into
their buckets and back by gathers.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import mlx.core as mx
import numpy as np

Grid = tuple[int, int]  # height, width in patches


def image_positions(grid: Grid) -> np.ndarray:
    """(t, h, w) of each patch of a picture, row-major: int32 [h*w, 3]."""
    h, w = grid
    rows, columns = np.divmod(np.arange(h * w, dtype=np.int32), np.int32(w))
    return np.stack([np.zeros_like(rows), rows, columns], axis=1)


def text_start(grid: Grid) -> int:
    """The position of a sample's first text token: one past the largest of its image."""
    return max(grid)


def _attention_work(image: int, text: int) -> int:
    """Query-key pairs of one sample, up to a constant."""
    return image * image + text * (image + text)


@mx.custom_function
def _gather(x: mx.array, index: mx.array, inverse: mx.array, valid: mx.array) -> mx.array:
    return x[index]


@_gather.vjp
def _gather_vjp(primals, cotangent, output):  # type: ignore[no-untyped-def]
    # Each row of x lands in exactly one valid place, so the gradient is a gather as well:
    # no scatter-add, and the same bits every time.
    _, index, inverse, valid = primals
    return cotangent[inverse], mx.zeros_like(index), mx.zeros_like(inverse), mx.zeros_like(valid)


@mx.custom_function
def _gather_back(y: mx.array, index: mx.array, inverse: mx.array, valid: mx.array) -> mx.array:
    return y[inverse]


@_gather_back.vjp
def _gather_back_vjp(primals, cotangent, output):  # type: ignore[no-untyped-def]
    _, index, inverse, valid = primals
    spread = mx.where(valid.reshape(-1, *[1] * (cotangent.ndim - 1)), cotangent[index], 0)
    return spread.astype(cotangent.dtype), mx.zeros_like(index), mx.zeros_like(inverse), mx.zeros_like(valid)


class Arrangement:
    """How the rows of one flat stream fill the rectangles [B, L] of the buckets.

    Args:
        offsets: where each sample starts in the stream.
        lengths: rows of each sample.
        buckets: the samples of each bucket, in order.
    """

    def __init__(self, offsets: Seq[int], lengths: Seq[int], buckets: Seq[Seq[int]]):
        self.shapes = [(len(bucket), max(lengths[i] for i in bucket)) for bucket in buckets]
        index, valid = [], []
        for bucket, (_, width) in zip(buckets, self.shapes):
            column = np.arange(width)
            for i in bucket:
                real = column < lengths[i]
                index.append(np.where(real, offsets[i] + column, 0))
                valid.append(real)
        flat = np.concatenate(index) if index else np.zeros(0, int)
        keep = np.concatenate(valid) if valid else np.zeros(0, bool)
        rows = sum(lengths)
        self.in_order = len(flat) == rows and bool(np.all(flat == np.arange(rows)))
        if not self.in_order:
            inverse = np.zeros(rows, np.int32)
            inverse[flat[keep]] = np.flatnonzero(keep)
            self._maps = (mx.array(flat.astype(np.int32)), mx.array(inverse), mx.array(keep))

    def split(self, x: mx.array) -> list[mx.array]:
        """[N, H, d] of the stream -> [B, L, H, d] of each bucket; padding holds some other row."""
        if not self.in_order:
            x = cast(mx.array, _gather(x, *self._maps))
        ends = np.cumsum([b * n for b, n in self.shapes])[:-1].tolist()
        parts = mx.split(x, ends) if ends else [x]
        return [part.reshape(b, n, *x.shape[1:]) for part, (b, n) in zip(parts, self.shapes)]

    def join(self, parts: Seq[mx.array]) -> mx.array:
        """The way back of `split`; what stands in padding is dropped."""
        flat = [part.reshape(-1, *part.shape[2:]) for part in parts]
        x = mx.concatenate(flat) if len(flat) > 1 else flat[0]
        return x if self.in_order else cast(mx.array, _gather_back(x, *self._maps))


@dataclass(frozen=True)
class PackedSequence:
    """Samples packed into two flat streams.

    Args:
        grids: (h, w) of each sample's picture, in patches.
        text_lengths: text tokens of each sample; left out for pictures alone.
        slack: attention work that may be spent on padding, as a share of the useful work;
            with 0 only samples of equal sizes share a call.

    Raises:
        ValueError: if a grid is empty or the lists differ in length.
    """

    grids: Seq[Grid]
    text_lengths: Seq[int] = field(default=())
    slack: float = 0.0

    def __post_init__(self) -> None:
        grids = tuple((int(h), int(w)) for h, w in self.grids)
        if not grids or any(h < 1 or w < 1 for h, w in grids):
            raise ValueError(f"grids must name at least one (h, w) of one patch or more, not {list(self.grids)}")
        texts = tuple(int(n) for n in self.text_lengths) or (0,) * len(grids)
        if len(texts) != len(grids):
            raise ValueError(f"{len(grids)} grids need as many text lengths, not {len(texts)}")
        if any(n < 0 for n in texts):
            raise ValueError(f"text lengths must not be negative: {list(self.text_lengths)}")
        object.__setattr__(self, "grids", grids)
        object.__setattr__(self, "text_lengths", texts)

    @cached_property
    def image_lengths(self) -> list[int]:
        return [h * w for h, w in self.grids]

    @property
    def num_image_rows(self) -> int:
        return sum(self.image_lengths)

    @property
    def num_text_rows(self) -> int:
        return sum(self.text_lengths)

    @cached_property
    def positions(self) -> mx.array:
        """(t, h, w) of every row, image stream then text stream: int32 [P + T, 3]."""
        image = [image_positions(grid) for grid in self.grids]
        text = [
            np.repeat(text_start(grid) + np.arange(n, dtype=np.int32)[:, None], 3, axis=1)
            for grid, n in zip(self.grids, self.text_lengths)
        ]
        return mx.array(np.concatenate(image + text))

    @cached_property
    def samples(self) -> mx.array:
        """The sample each row belongs to: int32 [P + T]."""
        number = np.arange(len(self.grids), dtype=np.int32)
        return mx.array(np.concatenate([np.repeat(number, self.image_lengths), np.repeat(number, self.text_lengths)]))

    @cached_property
    def output_rows(self) -> mx.array:
        """Rows that predict text: each sample's last image row, then its text. int32 [n + T]."""
        rows: list[int] = []
        for last, start, n in zip(np.cumsum(self.image_lengths), self._text_offsets, self.text_lengths):
            rows += [int(last) - 1, *range(self.num_image_rows + start, self.num_image_rows + start + n)]
        return mx.array(rows)

    @cached_property
    def _image_offsets(self) -> list[int]:
        return [0, *np.cumsum(self.image_lengths)[:-1].tolist()]

    @cached_property
    def _text_offsets(self) -> list[int]:
        return [0, *np.cumsum(self.text_lengths)[:-1].tolist()]

    @cached_property
    def buckets(self) -> list[list[int]]:
        """Samples of each attention call: longest first, joined while padding stays within `slack`."""

        sizes = list(zip(self.image_lengths, self.text_lengths))
        order = sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], -sizes[i][1]))
        buckets: list[list[int]] = []
        useful, widest = 0, (0, 0)
        for i in order:
            wider = (max(widest[0], sizes[i][0]), max(widest[1], sizes[i][1]))
            if buckets and (len(buckets[-1]) + 1) * _attention_work(*wider) <= (1 + self.slack) * (
                useful + _attention_work(*sizes[i])
            ):
                buckets[-1].append(i)
                useful, widest = useful + _attention_work(*sizes[i]), wider
            else:
                buckets.append([i])
                useful, widest = _attention_work(*sizes[i]), sizes[i]
        # Stream order inside and between buckets, so that equal samples need no gather.
        return sorted(sorted(bucket) for bucket in buckets)

    @cached_property
    def image(self) -> Arrangement:
        return Arrangement(self._image_offsets, self.image_lengths, self.buckets)

    @cached_property
    def text(self) -> Arrangement:
        return Arrangement(self._text_offsets, self.text_lengths, self.buckets)

    @cached_property
    def output(self) -> Arrangement:
        """`output_rows` by bucket: the last image row stands before the text."""
        lengths = [n + 1 for n in self.text_lengths]
        return Arrangement([0, *np.cumsum(lengths)[:-1].tolist()], lengths, self.buckets)

    @cached_property
    def image_masks(self) -> list[mx.array | None]:
        """True where an image key is real, [B, 1, 1, M]; None where all are."""
        masks: list[mx.array | None] = []
        for bucket, (_, width) in zip(self.buckets, self.image.shapes):
            lengths = np.array([self.image_lengths[i] for i in bucket])
            full = bool(np.all(lengths == width))
            masks.append(None if full else mx.array((np.arange(width) < lengths[:, None])[:, None, None]))
        return masks

    @cached_property
    def text_masks(self) -> list[mx.array | str]:
        """Keys [image, text] that each text row sees, [B, 1, T, M + T], or "causal".

        "causal" is aligned to the lower right, so text queries over image and text keys see the
        whole image and the text up to themselves; padding at the end of a text is then never seen.
        """
        return [self._prefix_mask(real, n) for real, (_, n) in zip(self.image_masks, self.text.shapes)]

    @cached_property
    def output_masks(self) -> list[mx.array | str]:
        """As `text_masks`, for the rows of `output`: the last image row sees the image alone."""
        return [self._prefix_mask(real, n, before=1) for real, (_, n) in zip(self.image_masks, self.text.shapes)]

    @staticmethod
    def _prefix_mask(image_mask: mx.array | None, texts: int, before: int = 0) -> mx.array | str:
        if image_mask is None:
            return "causal"
        batch, width = image_mask.shape[0], image_mask.shape[-1]
        query, key = np.arange(-before, texts)[:, None], np.arange(texts)
        text = mx.broadcast_to(mx.array(key <= query), (batch, 1, texts + before, texts))
        return mx.concatenate([mx.broadcast_to(image_mask, (batch, 1, texts + before, width)), text], axis=-1)

    @property
    def attention_padding(self) -> float:
        """Attention work spent on padding, as a share of the useful work."""

        useful = sum(map(_attention_work, self.image_lengths, self.text_lengths))
        shapes = zip(self.image.shapes, self.text.shapes)
        return sum(b * _attention_work(m, t) for (b, m), (_, t) in shapes) / useful - 1
