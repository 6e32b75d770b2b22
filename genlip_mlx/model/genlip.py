"""GenLIP: one Transformer that reads patches and speaks text.

Notable:
- attribute names are the published tensor names, so weights load by name;
- patches come in flattened, and the patch convolution is one matrix product;
- positions follow from the grids: no caller passes, or forgets, any;
- visual features are the output of `ln_post`, the same that the language head reads.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..config import GenLIPConfig
from .attention import Context, PackedContext
from .blocks import Block
from .cache import Cache
from .rope import Rope
from .sequence import Grid, PackedSequence


class VisionEmbeddings(nn.Module):
    """The patch embedding: a convolution with stride and kernel p, here a product on flat patches."""

    def __init__(self, config: GenLIPConfig):
        super().__init__()
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size)

    def __call__(self, patches: mx.array) -> mx.array:
        """[P, 3*p*p] -> [P, D]."""
        return self.patch_embedding(patches)


class Visual(nn.Module):
    """The trunk: a list of blocks, named as published."""

    def __init__(self, config: GenLIPConfig):
        super().__init__()
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]


class VisionOnlyError(ValueError):
    """A model without text embedding and head was asked for text."""

    def __init__(self) -> None:
        super().__init__(
            "this model is vision-only: it has no text embedding and no head; convert without --vision-only"
        )


class GenLIP(nn.Module):
    """The model. Weights are uninitialised random numbers of MLX's layers until loaded or `initialize`d."""

    def __init__(self, config: GenLIPConfig):
        super().__init__()
        self.config = config
        dim, embed = config.hidden_size, config.embed_dim
        self.vision_embeddings = VisionEmbeddings(config)
        self.visual = Visual(config)
        self.ln_post = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        if not config.vision_only:
            self.embeddings = nn.Embedding(config.vocab_size, embed)
            self.lm_head = nn.Linear(embed, config.vocab_size, bias=False)
            if embed != dim:
                self.in_proj = nn.Linear(embed, dim)
                self.proj = nn.Linear(dim, embed)

    def __call__(self, patches: mx.array, input_ids: mx.array, sequence: PackedSequence) -> mx.array:
        """Next-token logits of a pack, from the last image row of each sample on.

        Args:
            patches: [P, 3*p*p] normalised pixels, pictures one after another, row-major.
            input_ids: int [T], texts one after another.
            sequence: grids and text lengths of the samples.

        Returns:
            [n + T, V]: for each sample one row for its last image row, then one for each token.

        Raises:
            ValueError: if the arrays do not hold the rows that `sequence` names.
            VisionOnlyError: if the model has no text side.
        """
        return self.logits(self.outputs(patches, input_ids, sequence))

    def outputs(
        self,
        patches: mx.array,
        input_ids: mx.array,
        sequence: PackedSequence,
        checkpoint: bool = False,
        every_row: bool = False,
    ) -> mx.array:
        """As a call, before the head: `ln_post` features [n + T, D] of the rows that predict text.

        In training mode samples drop paths at the config's rate.

        Args:
            checkpoint: keep no activations inside blocks; the backward pass computes them again.
            every_row: give all rows [P + T, D] instead.
        """
        x = self.embed(patches, input_ids, sequence)
        layers, rate = self.visual.layers, self.config.drop_path_rate
        table = Rope(self.config).table(sequence.positions)
        # Drawn here and not inside blocks, which a backward pass may run a second time.
        drop = self.training and rate > 0
        kept = drop_path_factors(rate, len(layers), len(sequence.grids)) if drop else [None] * len(layers)
        last = None if every_row else layers[-1]
        for number, layer in enumerate(layers):
            context = PackedContext(sequence, table, outputs_only=layer is last, kept=kept[number])
            x = _checkpointed(layer, context)(x) if checkpoint else layer(x, context)
        return self.ln_post(x)

    def logits(self, features: mx.array) -> mx.array:
        """Scores of the vocabulary for `ln_post` features: [..., D] -> [..., V]."""
        if self.config.vision_only:
            raise VisionOnlyError
        return self.lm_head(self.proj(features) if "proj" in self else features)

    def encode(self, patches: mx.array, grids: Seq[Grid]) -> mx.array:
        """Visual features of pictures, many of different sizes in one call.

        Args:
            patches: [P, 3*p*p] normalised pixels, pictures one after another, row-major.
            grids: (h, w) of each picture in patches; the products add up to P.

        Returns:
            [P, D] output of `ln_post`, the features that the paper hands to an LLM.

        Raises:
            ValueError: if the grids do not add up to P.
        """
        return self.ln_post(self._encode(patches, grids))

    def hidden_states(self, patches: mx.array, grids: Seq[Grid]) -> list[mx.array]:
        """All layers' states of pictures: N + 1 arrays [P, D], the embeddings first.

        `ln_post` of the last one gives the features of `encode`.
        """
        states: list[mx.array] = []
        self._encode(patches, grids, states.append)
        return states

    def prefill(self, patches: mx.array, grids: Seq[Grid]) -> tuple[mx.array, Cache]:
        """Read pictures, one for each caption to be spoken.

        Returns:
            logits [B, V] of each picture's last row, which predict the first token where there is
            no prompt; and the cache that `extend` continues.
        """
        sequence = PackedSequence(grids)
        cache = Cache(self.config, sequence.grids)
        table = Rope(self.config).table(sequence.positions)
        x = self.embed_images(patches, sequence)
        *layers, last = self.visual.layers
        context = PackedContext(sequence, table, observe=cache.add_images)
        for layer in layers:
            x = layer(x, context)
        x = last(x, PackedContext(sequence, table, outputs_only=True, observe=cache.add_images))
        return self.logits(self.ln_post(x)), cache

    def extend(self, input_ids: mx.array, cache: Cache, all_logits: bool = False) -> mx.array:
        """Append tokens [B, L] to every sequence: a prompt, or the token just spoken.

        Returns:
            logits [B, V] of the last of them, or [B, L, V] with `all_logits`.

        Raises:
            ValueError: if there is not one row a sequence, or no token.
        """
        if input_ids.ndim != 2 or input_ids.shape[0] != cache.batch_size or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids {input_ids.shape} must be [{cache.batch_size}, tokens], a row a sequence")
        batch, tokens = input_ids.shape
        x = self.embed_text(input_ids.flatten())
        for layer, context in zip(self.visual.layers, cache.contexts(tokens)):
            x = layer(x, context)
        cache.advance(tokens)
        x = x.reshape(batch, tokens, -1)
        return self.logits(self.ln_post(x if all_logits else x[:, -1]))

    def embed(self, patches: mx.array, input_ids: mx.array, sequence: PackedSequence) -> mx.array:
        """Both streams before the first block, [P + T, D]; arguments and errors as a call."""
        return mx.concatenate([self.embed_images(patches, sequence), self.embed_text(input_ids, sequence)])

    def embed_text(self, input_ids: mx.array, sequence: PackedSequence | None = None) -> mx.array:
        """int [T] -> [T, D].

        Raises:
            ValueError: if `sequence` names another number of tokens.
            VisionOnlyError: if the model has no text side.
        """
        if self.config.vision_only:
            raise VisionOnlyError
        if sequence is not None and input_ids.shape != (sequence.num_text_rows,):
            raise ValueError(
                f"input_ids {input_ids.shape} do not hold the {sequence.num_text_rows} tokens of the texts"
            )
        x = self.embeddings(input_ids)
        return self.in_proj(x) if "in_proj" in self else x

    def embed_images(self, patches: mx.array, sequence: PackedSequence) -> mx.array:
        """[P, 3*p*p] -> [P, D], before the first block.

        Raises:
            ValueError: if the grids of `sequence` need another number of patches.
        """
        expected = (sequence.num_image_rows, self.config.patch_dim)
        if patches.shape != expected:
            raise ValueError(f"patches {patches.shape} do not fit the grids, which need {expected}")
        # The model computes in the type of this norm, which is never quantized nor adapted.
        return self.vision_embeddings(patches.astype(self.ln_post.weight.dtype))

    def _encode(
        self, patches: mx.array, grids: Seq[Grid], observe: Callable[[mx.array], None] | None = None
    ) -> mx.array:
        sequence = PackedSequence(grids)
        x = self.embed_images(patches, sequence)
        context: Context = PackedContext(sequence, Rope(self.config).table(sequence.positions))
        if observe is not None:
            observe(x)
        for layer in self.visual.layers:
            x = layer(x, context)
            if observe is not None:
                observe(x)
        return x


def drop_path_factors(rate: float, layers: int, samples: int) -> mx.array:
    """Stochastic depth (arXiv 1603.09382): 0 for a branch left out, 1 / (1 - rate) for one kept, so that the mean is 1.

    Returns:
        [layers, 2, samples]: a block's attention and feed-forward branch, for each sample.
    """
    return mx.random.bernoulli(1 - rate, (layers, 2, samples)) / (1 - rate)


def _checkpointed(layer: Block, context: Context) -> Callable[[mx.array], mx.array]:
    return nn.utils.checkpoint(layer, lambda x: layer(x, context))


def initialize(model: GenLIP, key: mx.array) -> None:
    """Random weights for pretraining, in place (section 7 of the method's description).

    normal(initializer_range) for linears, embeddings and the patch kernel, zero biases, Xavier
    uniform for attention projections, LayerNorm 1 and 0, LayerScale its initial value.
    """
    std = model.config.initializer_range
    weights: dict[str, mx.array] = {}
    tree_flatten(model.parameters(), destination=weights)
    for name, value in weights.items():
        if name.endswith("bias"):
            value = mx.zeros_like(value)
        elif name.endswith("lambda1"):
            value = mx.full(value.shape, model.config.ls_init_value, value.dtype)
        elif value.ndim == 1:
            value = mx.ones_like(value)
        elif name.endswith("_proj.weight") and ".self_attn." in name:
            key, draw = mx.random.split(key)
            bound = (6 / sum(value.shape)) ** 0.5
            value = mx.random.uniform(-bound, bound, value.shape, value.dtype, draw)
        else:
            key, draw = mx.random.split(key)
            value = std * mx.random.normal(value.shape, value.dtype, key=draw)
        weights[name] = value
    model.update(tree_unflatten(list(weights.items())))
