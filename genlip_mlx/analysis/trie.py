"""Many candidate texts after the same pictures, at the cost of the tokens in which they differ.

Texts that begin alike share the nodes of a token trie. Its nodes stand in depth-first order, so that the
descendants of a node are the run right behind it: node j is an ancestor of node i (or i itself)
exactly if j <= i < ends[j]. So one attention call with that mask serves any run of nodes at once; all it needs of
what lies before the run is the path from the root to its first node. Every node is computed once, the
pictures' keys and values are shared by all, and memory is that of one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from ..model.cache import Cache, CachedContext
from ..model.genlip import GenLIP

ROOT = -1  # the parent of first tokens: the end of the prompt
RUN_ROWS = 256  # rows that go through the model together
CHUNK_LOGITS = 2**26  # logits in memory at a time: 256 MB in float32


@dataclass(frozen=True)
class Trie:
    """Texts as a tree. Nodes are numbered depth first; a node stands for a token after those of its ancestors."""

    tokens: np.ndarray  # int32 [N]
    parents: np.ndarray  # int32 [N]; ROOT for first tokens
    depths: np.ndarray  # int32 [N]; 0 for first tokens
    paths: tuple[np.ndarray, ...]  # the nodes of each text, int32, in the order the texts were given

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> Trie:
        """The trie of token sequences, each of one token or more."""
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        paths: list[np.ndarray] = [np.zeros(0, np.int32)] * len(texts)
        path: list[int] = []
        before: Sequence[int] = ()
        for number in sorted(range(len(texts)), key=lambda i: tuple(texts[i])):
            text = texts[number]
            common = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), min(len(before), len(text)))
            del path[common:]
            for depth in range(common, len(text)):
                parents.append(path[-1] if path else ROOT)
                path.append(len(tokens))
                tokens.append(text[depth])
                depths.append(depth)
            paths[number] = np.array(path, np.int32)
            before = text
        return cls(np.array(tokens, np.int32), np.array(parents, np.int32), np.array(depths, np.int32), tuple(paths))

    @cached_property
    def rows(self) -> np.ndarray:
        """The nodes that have children, in order, int32 [R]: those whose output is needed."""
        return np.unique(self.parents[self.parents != ROOT]).astype(np.int32)

    @cached_property
    def row_ends(self) -> np.ndarray:
        """One past each row's last descendant among the rows, int32 [R]."""
        ends = np.arange(1, len(self.tokens) + 1)
        for node in range(len(ends) - 1, -1, -1):
            if (parent := self.parents[node]) != ROOT:
                ends[parent] = max(ends[parent], ends[node])
        return np.searchsorted(self.rows, ends[self.rows]).astype(np.int32)

    def ancestors(self, row: int) -> np.ndarray:
        """The rows above a row, from the root down."""
        above = []
        node = self.parents[self.rows[row]]
        while node != ROOT:
            above.append(node)
            node = self.parents[node]
        return np.searchsorted(self.rows, above[::-1])

    def sums(self, node_scores: np.ndarray) -> np.ndarray:
        """Scores of nodes [..., N], added up along each text: float64 [..., texts]."""
        starts = np.cumsum([0, *(len(path) for path in self.paths[:-1])])
        flat = np.concatenate(self.paths)
        return np.add.reduceat(node_scores[..., flat].astype(np.float64), starts, axis=-1)


KeysValues = tuple[mx.array, mx.array]  # [B, H, columns, width] each


class Branch:
    """What a run of rows sees of one layer besides itself: pictures and prompt, and the path to the run."""

    def __init__(self, prefix: KeysValues, path: KeysValues, next_path: mx.array):
        self.prefix, self.path, self.next_path = prefix, path, next_path

    def extend(self, keys: mx.array, values: mx.array) -> KeysValues:
        """The run's own put behind it; `path` becomes that to the next run."""
        new = [mx.concatenate([old, x], axis=2) for old, x in zip(self.path, (keys, values))]
        self.path = (new[0][:, :, self.next_path], new[1][:, :, self.next_path])
        k, v = (mx.concatenate([old, x], axis=2) for old, x in zip(self.prefix, new))
        return k, v


def node_log_probs(
    model: GenLIP,
    trie: Trie,
    logits: mx.array,
    cache: Cache,
    run_rows: int = RUN_ROWS,
    chunk_logits: int = CHUNK_LOGITS,
) -> np.ndarray:
    """log P(token of a node | picture, prompt, tokens of its ancestors).

    Args:
        logits: [B, V] of each picture's last row or of the prompt's end, which predict first tokens.
        cache: what the model keeps of pictures and prompt; read, not changed.
        run_rows: rows of all pictures together that go through the model at a time.
        chunk_logits: how many logits exist at a time.

    Returns:
        float32 [B, N].
    """
    batch = cache.batch_size
    scores = np.empty((batch, len(trie.tokens)), np.float32)
    # Nodes by the row that predicts them; those of the root come first.
    children = np.argsort(trie.parents, kind="stable")
    predictors = np.searchsorted(trie.rows, trie.parents[children])
    first = int(np.searchsorted(trie.parents[children], ROOT, side="right"))
    scores[:, children[:first]] = _log_probs(logits[:, None], np.zeros(first, int), trie.tokens[children[:first]])
    if not len(trie.rows):
        return scores
    children, predictors = children[first:], predictors[first:]
    chunk = max(1, chunk_logits // (batch * model.config.vocab_size))
    for start, features in _runs(model, trie, cache, max(1, run_rows // batch)):
        for low in range(start, start + features.shape[1], chunk):
            part = features[:, low - start : low - start + chunk]
            begin, end = np.searchsorted(predictors, [low, low + part.shape[1]])
            nodes = children[begin:end]
            rows = predictors[begin:end] - low
            scores[:, nodes] = _log_probs(model.logits(part), rows, trie.tokens[nodes])
    return scores


def _log_probs(logits: mx.array, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities [B, n] of tokens [n] at rows [n] of logits [B, L, V]."""
    logits = logits.astype(mx.float32)
    index = mx.array(rows)
    return np.array(logits[:, index, mx.array(tokens)] - mx.logsumexp(logits, axis=-1)[:, index])


def _runs(model: GenLIP, trie: Trie, cache: Cache, most: int) -> Iterator[tuple[int, mx.array]]:
    """The first row of each run of at most `most` rows, and its `ln_post` features [B, L, D]."""
    total, batch = len(trie.rows), cache.batch_size
    length = -(-total // -(-total // most))  # runs of one length, so that there is one set of shapes
    width = int(trie.depths.max())  # of the longest path
    prefixes = [(k[:, :, : cache.length], v[:, :, : cache.length]) for k, v in cache.layers]
    seen = mx.arange(cache.length) >= cache.padding[:, None, None, None]  # [B, 1, 1, M + prompt]
    empty = mx.zeros((*prefixes[0][0].shape[:2], width, prefixes[0][0].shape[-1]), prefixes[0][0].dtype)
    paths = [(empty, empty)] * len(prefixes)
    path = np.zeros(0, int)
    for start in range(0, total, length):
        rows = np.arange(start, min(start + length, total))
        fill = length - len(rows)
        tokens, depths = (np.pad(values[trie.rows[rows]], (0, fill)) for values in (trie.tokens, trie.depths))
        # A column's row and the end of its descendants; what fills up has none.
        columns = np.concatenate([path, np.zeros(width - len(path), int), np.arange(start, start + length)])
        ends = np.concatenate([trie.row_ends[path], np.zeros(width - len(path), int), trie.row_ends[rows], [0] * fill])
        own = mx.arange(start, start + length)[:, None]
        inside = (mx.array(columns) <= own) & (own < mx.array(ends))
        shape = (batch, 1, length)
        mask = mx.concatenate(
            [mx.broadcast_to(seen, (*shape, cache.length)), mx.broadcast_to(inside, (*shape, inside.shape[-1]))],
            axis=-1,
        )
        positions = (cache.next_position[:, None] + mx.array(depths)).reshape(-1, 1)
        table = cache.rope.table(mx.broadcast_to(positions, (positions.shape[0], 3)))
        following = trie.ancestors(start + length) if start + length < total else np.zeros(0, int)
        # Where the next run's path stands among this one's path and rows.
        held = np.where(following >= start, following - start + width, np.searchsorted(path, following))
        next_path = mx.array(np.pad(held, (0, width - len(held))))
        x = model.embed_text(mx.array(np.tile(tokens, batch)))
        for number, layer in enumerate(model.visual.layers):
            branch = Branch(prefixes[number], paths[number], next_path)
            x = layer(x, CachedContext(branch.extend, (batch, length), table, mask))
            paths[number] = branch.path
        features = model.ln_post(x).reshape(batch, length, -1)[:, : len(rows)]
        mx.eval(features, paths)
        yield start, features
        path = following
