"""A recipe: everything that makes a training run, as data. The trainer executes, recipes describe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ..checkpoint.adapters import AdapterConfig, AdapterError
from ..config import PRESETS, ConfigError, GenLIPConfig

FINE_TUNE_TYPES = ("lora", "dora", "full")
PARTS = ("vision", "text", "head")
OPTIMIZERS = ("adamw", "muon")


class RecipeError(ValueError):
    """A recipe that is unreadable, or a field of it that is unknown or impossible."""


@dataclass(frozen=True)
class Recipe:
    """One run. Names follow mlx-lm's where it has one; defaults are the paper's stage 1.

    Raises:
        RecipeError: naming the field, if a value is impossible.
    """

    data: str  # training data; see `genlip_mlx.data.sources.open_source`
    iters: int  # optimiser steps
    model: str | None = None  # a preset, for a model made anew
    init_from: str | None = None  # a model folder, hub repo or run to start from instead
    model_config: dict[str, Any] = field(default_factory=dict)  # fields of GenLIPConfig to change
    fine_tune_type: str | None = None  # lora, dora, full: pictures are then read as init_from's processor says
    num_layers: int = -1  # blocks that are fine-tuned, counted from the last; -1 for all
    lora_parameters: dict[str, Any] = field(default_factory=dict)  # rank, scale, dropout, keys: see AdapterConfig
    adapter_path: str | None = None  # folder for the best adapters, by default `adapters` in the run folder
    parts: list[str] = field(default_factory=list)  # of a full fine-tuning: vision, text, head; none stands for all
    tokenizer: str | None = None  # folder of a tokenizer; by default that of init_from
    native: bool = False  # keep pictures' aspect ratio (stage 2), or resize to image_size (stage 1)
    image_size: int = 224  # pixels a side, if not native
    min_pixels: int = 4096  # if native
    max_pixels: int = 262144  # if native
    image_column: str | None = None  # fields of a record, where they have other than the usual names
    caption_column: str | None = None
    prompt_column: str | None = None
    shuffle: bool = True  # False takes the records in their own order: data that is a course
    valid_data: str | None = None  # held-out data
    valid_share: float = 0.0  # without valid_data: share of the records of `data` that are held out
    valid_batches: int = 25  # packs of it that are used
    valid_captions: int = 0  # held-out pictures that are captioned at each validation
    patience: int = 0  # validations without improvement that end the run; 0 never ends it
    batch_tokens: int = 16384  # a pack: image and text tokens
    max_sample_len: int = 4096  # tokens of one sample
    grad_accumulation_steps: int = 1  # packs a step, on each machine
    optimizer: str = "adamw"  # or muon: for the blocks' matrices, the rest by AdamW
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-6
    lr_schedule: str = "cosine"  # or constant
    warmup: float = 0.007  # share of iters
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 1.0
    drop_path_rate: float | None = None  # by default the model's own
    dtype: str = "auto"  # of the computation; weights and optimiser are float32
    grad_checkpoint: bool = False  # less memory for a third more time
    attention_slack: float = 0.1  # attention work that may go into padding: see PackedSequence
    workers: int = 2  # processes that prepare data
    seed: int = 0
    steps_per_report: int = 10
    steps_per_eval: int = 200
    steps_per_save: int = 500

    def __post_init__(self) -> None:
        at_least = {"iters": 1, "batch_tokens": 16, "max_sample_len": 16, "grad_accumulation_steps": 1, "workers": 0}
        at_least |= {"steps_per_report": 1, "steps_per_eval": 1, "steps_per_save": 1, "valid_batches": 1}
        at_least |= {"valid_captions": 0, "patience": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise RecipeError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip", "adam_eps"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name} must be positive, not {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise RecipeError(f"optimizer must be adamw or muon, not {self.optimizer!r}")
        if self.lr_schedule not in ("cosine", "constant"):
            raise RecipeError(f"lr_schedule must be cosine or constant, not {self.lr_schedule!r}")
        if not 0 <= self.valid_share < 1:
            raise RecipeError(f"valid_share is a share of the records in [0, 1), not {self.valid_share}")
        self._check_fine_tuning()
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"warmup is a share of iters in [0, 1), not {self.warmup}")
        if (self.model is None) == (self.init_from is None):
            raise RecipeError("name either model (a preset, made anew) or init_from (a model to start from)")
        if self.model is not None and self.model not in PRESETS:
            raise RecipeError(f"unknown model {self.model!r}; presets are {', '.join(PRESETS)}")
        if self.model is not None and self.tokenizer is None:
            raise RecipeError("a model made anew needs a tokenizer: name its folder")

    def _check_fine_tuning(self) -> None:
        if self.fine_tune_type not in (None, *FINE_TUNE_TYPES):
            raise RecipeError(f"fine_tune_type must be {', '.join(FINE_TUNE_TYPES)}, not {self.fine_tune_type!r}")
        if self.fine_tune_type is not None and self.init_from is None:
            raise RecipeError("fine-tuning needs a model to start from: init_from")
        for part in self.parts:
            if part not in PARTS:
                raise RecipeError(f"parts are {', '.join(PARTS)}, not {part!r}")
        if self.parts and self.fine_tune_type != "full":
            raise RecipeError("parts are for fine_tune_type full; lora and dora take lora_parameters: {keys: [...]}")
        if not (self.num_layers == -1 or self.num_layers > 0):
            raise RecipeError(f"num_layers must be at least 1, or -1 for all, not {self.num_layers}")
        if self.grad_checkpoint and self.lora_parameters.get("dropout"):
            raise RecipeError("grad_checkpoint would draw another dropout in the backward pass; use one of the two")
        try:
            self.adapters()
        except AdapterError as error:
            raise RecipeError(str(error)) from None

    def adapters(self) -> AdapterConfig | None:
        """What is adapted; None where the model's own weights are trained."""
        if self.fine_tune_type not in ("lora", "dora"):
            return None
        return AdapterConfig.of(self.fine_tune_type, self.num_layers, self.lora_parameters)

    def config(self) -> GenLIPConfig:
        """The shape of a model made anew.

        Raises:
            RecipeError: if model_config does not fit.
        """
        base = PRESETS[self.model or "tiny"]
        changes = dict(self.model_config)
        if "mrope_section" in changes:
            changes["mrope_section"] = tuple(changes["mrope_section"])
        if self.drop_path_rate is not None:
            changes["drop_path_rate"] = self.drop_path_rate
        try:
            return dataclasses.replace(base, **changes)
        except (TypeError, ConfigError) as error:
            raise RecipeError(f"model_config: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, or one of `genlip_mlx/recipes` by name.

    Args:
        changes: as `change` takes them, applied over the file.

    Raises:
        RecipeError: naming file and field.
    """
    content = read_recipe(path)
    for key_value in changes:
        change(content, key_value)
    try:
        return recipe_from(content)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML recipe, or of one of `genlip_mlx/recipes` by name, as they stand there.

    Raises:
        RecipeError: if there is no such file, or it is no mapping.
    """
    path = Path(path)
    if not path.exists():
        named = Path(__file__).parent.parent / "recipes" / f"{path.name.removesuffix('.yaml')}.yaml"
        if not named.exists():
            known = ", ".join(sorted(p.stem for p in named.parent.glob("*.yaml")))
            raise RecipeError(f"{path}: no such recipe; a YAML file, or one of {known}")
        path = named
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields")
    return content


def change(content: dict[str, Any], key_value: str) -> None:
    """Set one field, given as "key=value"; the value is YAML, and the key may reach into a mapping:
    model_config.hidden_size=192.

    Raises:
        RecipeError: if it has not this form.
    """
    key, equals, value = key_value.partition("=")
    if not equals:
        raise RecipeError(f"--set takes key=value, not {key_value!r}")
    *outer, last = key.strip().split(".")
    for name in outer:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise RecipeError(f"--set {key}: {name} is no mapping")
    content[last] = yaml.safe_load(value)


def recipe_from(content: Mapping[str, Any]) -> Recipe:
    """A recipe from a mapping, with types checked.

    Raises:
        RecipeError: for an unknown, missing or ill-typed field.
    """
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    hints = get_type_hints(Recipe)
    unknown = sorted(map(str, content.keys() - fields.keys()))
    if unknown:
        raise RecipeError(f"unknown field {', '.join(unknown)}; known: {', '.join(fields)}")
    for name in ("data", "iters"):
        if content.get(name) is None:
            raise RecipeError(f"field {name} is missing")
    return Recipe(**{name: _typed(name, value, hints[name]) for name, value in content.items()})


def _typed(name: str, value: Any, hint: Any) -> Any:
    accepted: tuple[type, ...] = {
        bool: (bool,),
        int: (int,),
        float: (int, float),
        str: (str,),
        str | None: (str, type(None)),
        list[str]: (list,),
        float | None: (int, float, type(None)),
    }.get(hint, (dict,))
    if isinstance(value, str) and float in accepted:
        with suppress(ValueError):
            value = float(value)  # YAML reads 1e-3, without a point, as a word
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(f"{name} has the wrong type: {value!r}")
    return float(value) if isinstance(value, int) and float in accepted else value
