"""What of a model is trained: all of it, some parts, or adapters beside it.

Whatever is chosen here is what `trainable_parameters` names, and the trainer is the same for all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map

from ..checkpoint.adapters import attach
from ..model.genlip import GenLIP
from .recipe import Recipe, RecipeError

# The layers of each part; the blocks of the trunk, which belong to the vision, are chosen by number.
_LAYERS = {"vision": ("vision_embeddings", "ln_post"), "text": ("embeddings", "in_proj"), "head": ("proj", "lm_head")}


def prepare(model: GenLIP, recipe: Recipe, dtype: mx.Dtype) -> None:
    """Choose what is trained, in float32; what is frozen is cast to `dtype`, that of the computation.

    Raises:
        AdapterError, RecipeError: if the model does not have what should be trained.
    """
    mx.random.seed(recipe.seed)  # of the adapters' random half
    choose(model, recipe)
    trained = tree_map(lambda value: value.astype(mx.float32), model.trainable_parameters())
    model.apply(lambda value: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value)
    model.update(trained)
    mx.eval(model.parameters())


def choose(model: GenLIP, recipe: Recipe) -> None:
    """Freeze what a recipe does not train, and attach adapters if it trains any; nothing is computed yet.

    Raises:
        AdapterError, RecipeError: if the model does not have what should be trained.
    """
    adapters, blocks = recipe.adapters(), model.config.num_hidden_layers
    if adapters is not None:
        attach(model, adapters)
    elif recipe.parts or recipe.num_layers > 0:
        if recipe.num_layers > blocks:
            raise RecipeError(f"num_layers is {recipe.num_layers}, but the model has {blocks} blocks")
        model.freeze()
        for module in _chosen(model, recipe.parts or ("vision",), recipe.num_layers):
            module.unfreeze()


def _chosen(model: GenLIP, parts: Sequence[str], num_layers: int) -> list[nn.Module]:
    """The modules of parts; with a number of layers, only so many blocks and what comes after them."""
    names = [name for part in parts for name in _LAYERS[part]]
    if "vision" not in parts:
        return [model[name] for name in names if name in model]
    if num_layers > 0:
        names.remove("vision_embeddings")
    return [model[name] for name in names if name in model] + model.visual.layers[-max(num_layers, 0) :]
