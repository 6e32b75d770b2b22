"""What a GenLIP model is: one dataclass, read from and written to a Hugging Face ``config.json``.

Field names are the published ones. Sizes that a published config leaves out or gets wrong
are read from the tensors by `genlip_mlx.checkpoint`; this module only describes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL_TYPE = "genlip"
ARCHITECTURE = "GenLIPModel"


class ConfigError(ValueError):
    """A config.json that is missing, unreadable, of another model, or inconsistent."""


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: naming the file, and the remedy if it is missing.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return content


@dataclass(frozen=True)
class GenLIPConfig:
    """Shape and hyper-parameters of a GenLIP model.

    Raises:
        ConfigError: if two fields contradict each other.
    """

    hidden_size: int  # D
    intermediate_size: int  # width of the feed-forward network
    num_hidden_layers: int
    num_attention_heads: int  # H
    vocab_size: int = 151936  # V
    text_embed_dim: int | None = None  # E; None means equal to hidden_size
    num_channels: int = 3
    patch_size: int = 16  # pixels
    hidden_act: str = "silu"
    use_swiglu_ffn: bool = True
    gated_attention: bool = True
    ls_init_value: float = 0.1  # LayerScale exists if above 1e-6
    drop_path_rate: float = 0.0  # one constant rate in every block
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    mrope_section: tuple[int, int, int] = (12, 12, 12)  # frequencies for t, h, w
    mrope_interleaved: bool = True
    max_position_embeddings: int = 16384  # tokens
    vision_only: bool = False  # no text embedding, no head
    quantization: dict[str, Any] | None = None  # as mlx-lm writes it
    extra: dict[str, Any] = field(default_factory=dict, compare=False)  # unknown fields, kept for export

    def __post_init__(self) -> None:
        positive = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "num_channels",
            "patch_size",
        )
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"{name} must be a positive whole number, not {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head dim {self.head_dim} is odd; rotary embeddings turn pairs of numbers")
        if len(self.mrope_section) != 3 or any(n < 0 for n in self.mrope_section):
            raise ConfigError(f"mrope_section must be three counts (t, h, w), not {list(self.mrope_section)}")
        if not self.mrope_interleaved and sum(self.mrope_section) != self.head_dim // 2:
            raise ConfigError(
                f"mrope_section {list(self.mrope_section)} adds up to {sum(self.mrope_section)}; "
                f"chunked MRoPE needs half the head dim, {self.head_dim // 2}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"unknown hidden_act {self.hidden_act!r}; known: {', '.join(ACTIVATIONS)}")
        if not 0 <= self.drop_path_rate < 1:
            raise ConfigError(f"drop_path_rate must lie in [0, 1), not {self.drop_path_rate}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def embed_dim(self) -> int:
        """E, the width of the text embedding and of the head's input."""
        return self.text_embed_dim or self.hidden_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels * patch_size**2."""
        return self.num_channels * self.patch_size**2

    @property
    def use_layer_scale(self) -> bool:
        return self.ls_init_value > 1e-6

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> GenLIPConfig:
        """Read a published or a converted config; unknown fields are kept in `extra`.

        Raises:
            ConfigError: if the model type is another one, or a field is missing or wrong.
        """
        config = dict(config)
        model_type = config.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ConfigError(f"model_type is {model_type!r}; this package runs {MODEL_TYPE!r} only")
        architectures = config.pop("architectures", None)
        if architectures and not any("genlip" in str(name).lower() for name in architectures):
            raise ConfigError(f"unknown architecture {', '.join(map(str, architectures))}; expected {ARCHITECTURE}")
        # `type` is "mrope" in files and "default" once the reference has loaded one: both mean the same.
        scaling = config.pop("rope_scaling", None) or config.pop("rope_parameters", None) or {}
        if "mrope_section" in scaling:
            config["mrope_section"] = scaling["mrope_section"]
        for name in ("rope_theta", "mrope_interleaved"):
            if name in scaling:
                config.setdefault(name, scaling[name])
        if "mrope_section" in config:
            try:
                config["mrope_section"] = tuple(int(n) for n in config["mrope_section"])
            except (TypeError, ValueError):
                raise ConfigError(f"mrope_section must be three counts, not {config['mrope_section']!r}") from None
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "extra"}
        required = [name for name, f in fields.items() if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in config]
        if missing:
            raise ConfigError(f"missing field {', '.join(missing)}")
        if config.get("text_embed_dim") == config["hidden_size"]:
            config["text_embed_dim"] = None
        known = {name: config.pop(name) for name in fields if name in config}
        return cls(**known, extra=config)

    @classmethod
    def from_file(cls, path: Path) -> GenLIPConfig:
        """Read a config.json.

        Raises:
            ConfigError: naming the file, if it is missing, not JSON, or inconsistent.
        """
        config = read_json(path, "a model folder needs a config.json")
        try:
            return cls.from_dict(config)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The published layout, with `text_embed_dim` always stated."""
        config = dict(self.extra)
        for f in dataclasses.fields(self):
            if f.name not in ("extra", "mrope_section", "vision_only", "quantization"):
                config[f.name] = getattr(self, f.name)
        config["text_embed_dim"] = self.embed_dim
        config["rope_scaling"] = {"type": "mrope", "mrope_section": list(self.mrope_section)}
        if self.vision_only:
            config["vision_only"] = True
        if self.quantization is not None:
            config["quantization"] = self.quantization
        config["architectures"] = [ARCHITECTURE]
        config["model_type"] = MODEL_TYPE
        return config


ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def _preset(
    layers: int, hidden: int, heads: int, ffn: int, embed: int, section: tuple[int, int, int], **more: Any
) -> GenLIPConfig:
    return GenLIPConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=ffn,
        text_embed_dim=None if embed == hidden else embed,
        mrope_section=section,
        **more,
    )


# The published sizes (table 1 of the paper and the repository's config files, which differ
# for L/16 and g/16) and three small ones to pretrain at home.
PRESETS: dict[str, GenLIPConfig] = {
    "tiny": _preset(6, 256, 4, 704, 256, (12, 10, 10), vocab_size=4096),
    "small": _preset(12, 384, 6, 1024, 384, (12, 10, 10), vocab_size=16384),
    "base": _preset(12, 768, 12, 2048, 768, (12, 10, 10), vocab_size=32768),
    "L16": _preset(24, 1024, 16, 2816, 1024, (8, 12, 12), drop_path_rate=0.1),
    "L16-config": _preset(24, 1152, 16, 2752, 1024, (8, 12, 12), drop_path_rate=0.1),
    "So16": _preset(27, 1152, 16, 3072, 1152, (12, 12, 12), drop_path_rate=0.1),
    "g16": _preset(40, 1536, 24, 4096, 1024, (16, 16, 16), drop_path_rate=0.2),
    "g16-config": _preset(40, 1536, 16, 4096, 1024, (16, 16, 16), drop_path_rate=0.2),
}


def estimate_parameters(config: GenLIPConfig) -> dict[str, int]:
    """Parameters by part: patch_embedding, trunk, text_embedding, head."""
    d, f, e = config.hidden_size, config.intermediate_size, config.embed_dim
    q_out = 2 * d if config.gated_attention else d
    attention = d * q_out + q_out + 3 * (d * d + d)
    up = (2 if config.use_swiglu_ffn else 1) * (d * f + f)
    block = attention + up + f * d + d + 4 * d + (2 * d if config.use_layer_scale else 0)
    parts = {
        "patch_embedding": config.patch_dim * d + d,
        "trunk": config.num_hidden_layers * block + 2 * d,
        "text_embedding": 0,
        "head": 0,
    }
    if not config.vision_only:
        bridged = e != d
        parts["text_embedding"] = config.vocab_size * e + (e * d + d if bridged else 0)
        parts["head"] = config.vocab_size * e + (d * e + e if bridged else 0)
    return parts
