"""What a training step will need in memory, known before the first one.

Weights and optimiser are counted. Activations are numbers a token and block, fitted to peaks measured on a CPU: for
LoRA, DoRA and full training of models 256 to 1024 wide, on packs of few large and of many small pictures. On a GPU
attention's scores are computed again in the backward pass, so only one block's count there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint.lazy import parse_dtype
from ..checkpoint.load import default_dtype, empty_model
from ..checkpoint.names import matrices
from ..checkpoint.quantization import choose as choose_quantization
from ..checkpoint.quantization import estimate_size
from ..config import GenLIPConfig
from ..data.packing import Pack
from ..model.exponential import on_cpu
from .adapters import choose
from .objective import CHUNK_LOGITS
from .optimizer import orthogonalized
from .recipe import Recipe

# Numbers that a block keeps of a token for its backward pass: so many times D, and so many times F.
_KEPT = {"lora": (15.0, 6.0), "dora": (22.5, 8.0), "full": (21.0, 5.5)}
_WORKING = 2.2  # what the block at work needs, as a share of what a block keeps
_HEAD_CHUNKS = 3  # of logits, at a time
_OPENED = 0.75  # of DoRA's quantized weights, unpacked
SMALLEST_PACK = 1024  # tokens that are proposed


class TooLargeError(ValueError):
    """A run that this machine has not the memory for."""


@dataclass(frozen=True)
class Load:
    """What a pack asks of memory."""

    tokens: float
    label_tokens: float
    pairs: float  # of rows that attend to each other, summed over the samples

    @classmethod
    def of(cls, pack: Pack) -> Load:
        sizes = [(h * w, texts) for (h, w), texts in zip(pack.grids, pack.text_lengths)]
        pairs = sum(image * image + text * (image + text) for image, text in sizes)
        return cls(pack.num_tokens, pack.label_tokens, pairs)

    def scaled(self, share: float) -> Load:
        return Load(self.tokens * share, self.label_tokens * share, self.pairs * share)


@dataclass(frozen=True)
class Memory:
    """Bytes of one training run at its peak."""

    weights: float
    optimizer: float
    step: float  # activations or gradients, whichever are more

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.step


@dataclass(frozen=True)
class Trained:
    """What of a model is trained."""

    parameters: int
    orthogonalized: int  # of these, by Muon
    largest: int  # of these, in one array
    head: int  # of these, in lm_head itself
    blocks: int  # that keep activations: from the first that is trained on

    @classmethod
    def of(cls, config: GenLIPConfig, recipe: Recipe) -> Trained:
        """Raises AdapterError, RecipeError: if the model does not have what should be trained."""
        model = empty_model(config)  # which nobody evaluates, so it takes no memory
        choose(model, recipe)
        sizes: dict[str, mx.array] = {}
        tree_flatten(model.trainable_parameters(), destination=sizes)
        numbers = [int(name.split(".")[2]) for name in sizes if name.startswith("visual.layers.")]
        before = any(name.startswith(("vision_embeddings.", "embeddings.", "in_proj.")) for name in sizes)
        first = 0 if before else min(numbers, default=config.num_hidden_layers)
        counts = {name: value.size for name, value in sizes.items()}
        return cls(
            parameters=sum(counts.values()),
            orthogonalized=sum(v.size for k, v in sizes.items() if recipe.optimizer == "muon" and orthogonalized(k, v)),
            largest=max(counts.values()),
            head=counts.get("lm_head.weight", 0),
            blocks=config.num_hidden_layers - first,
        )


def plan(recipe: Recipe, config: GenLIPConfig, load: Load) -> Memory:
    """The peak of a run whose packs are like `load`.

    Raises:
        AdapterError, RecipeError: if the model does not have what should be trained.
    """
    dtype = parse_dtype(recipe.dtype) or default_dtype()
    trained = Trained.of(config, recipe)
    adapters = recipe.adapters()
    weights = float(estimate_size(config, dtype))
    if adapters is not None:
        weights += 4 * trained.parameters
    else:
        weights += (4 - dtype.size) * trained.parameters
    if dtype != mx.float32:
        weights += dtype.size * trained.parameters  # the copies that compute

    wide, inner = _KEPT[adapters.fine_tune_type if adapters is not None else "full"]
    block = dtype.size * load.tokens * (wide * config.hidden_size + inner * config.intermediate_size)
    scores = dtype.size * config.num_attention_heads * load.pairs
    opened = 0.0
    if adapters is not None and adapters.fine_tune_type == "dora" and config.quantization is not None:
        shapes = matrices(config)
        opened = _OPENED * dtype.size * sum(shapes[path][0] * shapes[path][1] for path in adapters.paths(config))
    chunk = 4 * config.vocab_size * min(load.label_tokens, max(1, CHUNK_LOGITS // config.vocab_size))
    head = _HEAD_CHUNKS * chunk + 2 * 4 * trained.head  # its gradient, summed over chunks
    if recipe.grad_checkpoint:
        inputs = dtype.size * load.tokens * config.hidden_size * trained.blocks
        working = _WORKING * block + 3 * scores + opened / max(1, trained.blocks)
        activations = inputs + max(working if trained.blocks else 0, head)
    else:
        kept_scores = trained.blocks * scores if on_cpu() else 3 * scores
        activations = trained.blocks * block + kept_scores + opened + head
    # The update holds all gradients twice, and what leads from one array's to its new value.
    update = 4.0 * (2 * trained.parameters + 6 * trained.largest)
    moments = 8.0 * trained.parameters - 4.0 * trained.orthogonalized  # AdamW keeps two numbers, Muon one
    return Memory(weights, moments, max(activations, update))


def available() -> float:
    """Bytes that this machine's device can hold: Metal's recommended working set, a GPU's memory, or the RAM."""
    if not on_cpu():
        info: dict[str, Any] = mx.device_info()
        for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if name in info:
                return float(info[name])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def check(recipe: Recipe, config: GenLIPConfig, loads: Iterable[Load]) -> tuple[Memory, str]:
    """The plan of the largest of some packs, and a line that tells it.

    Raises:
        TooLargeError: if the machine has less, naming the options that would fit.
    """
    worst = max(loads, key=lambda load: plan(recipe, config, load).total)
    memory, room = plan(recipe, config, worst), available()
    line = (
        f"about {_gb(memory.total)} of {_gb(room)}: weights {_gb(memory.weights)}, optimizer {_gb(memory.optimizer)}, "
        f"{'activations, checkpointed' if recipe.grad_checkpoint else 'activations'} {_gb(memory.step)}"
    )
    if memory.total <= room:
        return memory, line
    fitting = []
    for ways in _alternatives(recipe, config, worst):
        first = next(((words, total) for words, total in ways if total <= room), None)
        fitting += [f"{first[0]} ({_gb(first[1])})"] if first is not None else []
    remedy = f"what would fit: {'; '.join(fitting)}" if fitting else "a smaller model, or a larger machine"
    raise TooLargeError(f"a step needs about {_gb(memory.total)}, and there are {_gb(room)}; {remedy}")


def _alternatives(recipe: Recipe, config: GenLIPConfig, load: Load) -> Iterator[Iterator[tuple[str, float]]]:
    """Options, each with the bytes it would need: by kind, and of a kind from the least to the most that it changes."""

    def packs(recipe: Recipe, words: str, parts: Sequence[int]) -> Iterator[tuple[str, float]]:
        for part in parts:
            tokens, steps = recipe.batch_tokens // part, recipe.grad_accumulation_steps * part
            options = [words] * bool(words) + [f"--batch-tokens {tokens} --grad-accumulation-steps {steps}"] * (
                part > 1
            )
            if part == 1 or tokens >= SMALLEST_PACK:
                yield " ".join(options), plan(recipe, config, load.scaled(1 / part)).total

    def one(recipe: Recipe, config: GenLIPConfig, words: str) -> Iterator[tuple[str, float]]:
        yield words, plan(recipe, config, load).total

    yield packs(recipe, "", (2, 4, 8))
    checkpointed = recipe if recipe.lora_parameters.get("dropout") else replace(recipe, grad_checkpoint=True)
    if checkpointed != recipe:
        yield packs(checkpointed, "--grad-checkpoint", (1, 2, 4, 8))
    if recipe.fine_tune_type == "full":
        lora = replace(checkpointed, fine_tune_type="lora", parts=[])
        yield one(lora, config, "--fine-tune-type lora --grad-checkpoint")
    elif recipe.fine_tune_type == "lora" and config.quantization is None:
        packed = choose_quantization(4).apply(config)
        yield one(checkpointed, packed, "a 4-bit model (genlip-mlx quantize) with --grad-checkpoint")


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
