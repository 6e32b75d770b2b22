"""Models that run: loaded from either layout, at each precision, and saved again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from genlip_mlx.checkpoint.convert import convert
from genlip_mlx.checkpoint.errors import CheckpointError
from genlip_mlx.checkpoint.load import default_dtype, load, load_model, save
from genlip_mlx.checkpoint.quantization import choose
from genlip_mlx.checkpoint.reading import open_checkpoint

from .conftest import Folder, listing

if TYPE_CHECKING:
    from conftest import Golden


def features(folder: Path, case: Golden, lazy: bool = False) -> np.ndarray:
    """Of a case's first picture, through a whole loaded folder."""
    model, processor = load(folder, "float32", lazy=lazy)
    patches, grid = processor.images([case.image_path(0)])[0]
    assert not model.training
    return np.array(model.encode(mx.array(patches), [grid]))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over patches."""
    return float(np.mean((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)))


def test_both_layouts_give_the_golden_features(case: Golden, tmp_path: Path) -> None:
    convert(case.folder, tmp_path / "ours")
    published = features(case.folder, case)
    assert np.abs(case.rows(published, "0.features") - case.expected("0.features")).max() < 5e-5
    assert np.array_equal(published, features(tmp_path / "ours", case))
    assert np.array_equal(published, features(case.folder, case, lazy=True))


def test_load_gives_model_and_processor(tiny: Folder) -> None:
    model, processor = load(str(tiny.path))
    assert model.config.hidden_size == 64
    assert processor.tokenizer is not None
    assert processor.tokenizer.decode(processor.tokenizer.encode("a cat")) == "a cat"


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_a_gpu(tiny: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.cpu, 0))
        assert default_dtype() == mx.float32
        assert load_model(tiny.path).ln_post.weight.dtype == mx.float32
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.gpu, 0))
        assert default_dtype() == mx.bfloat16
    assert load_model(tiny.path, "bfloat16").ln_post.weight.dtype == mx.bfloat16


# Mean cosine to the unquantized features; a prototype had 0.9998 and 0.965 at 8 and 4 bits.
@pytest.mark.parametrize(
    ("options", "floor"),
    [
        ({"bits": 8}, 0.999),
        ({"bits": 4}, 0.95),
        ({"bits": 5, "group_size": 32}, 0.98),
        ({"recipe": "mixed_4_8"}, 0.95),
        ({"mode": "mxfp8"}, 0.98),
        ({"mode": "mxfp4"}, 0.9),
        ({"mode": "nvfp4"}, 0.9),
    ],
)
def test_quantized_features_stay_close(golden_dir: Path, tmp_path: Path, options: dict[str, Any], floor: float) -> None:
    folder = golden_dir / "tiny-224"
    convert(folder, tmp_path / "packed", quantization=choose(**options))
    plain, processor = load(folder, "float32")
    packed = load_model(tmp_path / "packed", "float32")
    assert isinstance(packed.embeddings, nn.QuantizedEmbedding)
    assert isinstance(packed.lm_head, nn.QuantizedLinear)
    assert isinstance(packed.vision_embeddings.patch_embedding, nn.Linear)
    pixels, grid = processor.images([golden_dir / "images" / "astronaut.jpg"])[0]
    patches = mx.array(pixels)
    assert cosine(np.array(plain.encode(patches, [grid])), np.array(packed.encode(patches, [grid]))) > floor
    ids = mx.array([[1, 2, 3]])
    _, cache = packed.prefill(patches, [grid])
    assert packed.extend(ids, cache).shape == (1, 448)


def test_packed_weights_keep_their_type_whatever_the_rest_is(tiny: Folder, tmp_path: Path) -> None:
    for mode, scales in (("affine", mx.float16), ("mxfp4", mx.uint8)):
        convert(tiny.path, tmp_path / mode, quantization=choose(mode=mode))
        model = load_model(tmp_path / mode, "float16")
        assert model.lm_head.weight.dtype == mx.uint32
        assert model.lm_head.scales.dtype == scales
        assert model.ln_post.weight.dtype == mx.float16


def test_layers_left_unquantized_load_as_they_are(navit: Folder, tmp_path: Path) -> None:
    convert(navit.path, tmp_path / "out", quantization=choose(group_size=32))
    model = load_model(tmp_path / "out", "float32")
    assert isinstance(model.embeddings, nn.QuantizedEmbedding)
    assert type(model.visual.layers[0].self_attn.q_proj) is nn.Linear


def test_a_vision_only_model_has_no_tokenizer(navit: Folder, tmp_path: Path) -> None:
    convert(navit.path, tmp_path / "out", vision_only=True)
    model, processor = load(tmp_path / "out")
    assert processor.tokenizer is None
    assert "embeddings" not in model
    assert model.encode(mx.zeros((4, 768)), [(2, 2)]).shape == (4, 144)
    save(model, processor, tmp_path / "again")
    load(tmp_path / "again")


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_saved_loads_the_same(navit: Folder, tmp_path: Path, packed: bool) -> None:
    convert(navit.path, tmp_path / "first", "float32", choose(group_size=32) if packed else None)
    model, processor = load(tmp_path / "first", "float32")
    save(model, processor, tmp_path / "second", source="YanFang/GenLIP-L16-NaViT")
    again, other = load(tmp_path / "second", "float32")
    assert again.config == model.config
    assert other.image_processor == processor.image_processor
    before, after = dict(tree_flatten(model.parameters())), dict(tree_flatten(again.parameters()))
    assert set(before) == set(after)
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    card = (tmp_path / "second" / "README.md").read_text()
    assert "base_model: YanFang/GenLIP-L16-NaViT" in card
    assert json.loads((tmp_path / "second" / "config.json").read_text())["torch_dtype"] == "float32"


def test_save_keeps_what_is_there(tiny: Folder, tmp_path: Path) -> None:
    model, processor = load(tiny.path)
    save(model, processor, tmp_path / "out")
    before = listing(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out: exists already"):
        save(model, processor, tmp_path / "out")
    assert listing(tmp_path / "out") == before
    save(model, processor, tmp_path / "out", overwrite=True)
    open_checkpoint(tmp_path / "out")


def test_a_model_that_is_not_its_config_is_not_saved(tiny: Folder, tmp_path: Path) -> None:
    model, processor = load(tiny.path)
    nn.quantize(model, 32, 4)
    with pytest.raises(CheckpointError, match=r"out: the tensors do not fit config\.json; unexpected .*scales"):
        save(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()
