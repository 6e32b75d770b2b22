"""What the reference implementation computed, and what this package computes.

The model alone is at trial here: pictures are cut into patches by a few plain lines, and weights
are read without `genlip_mlx.checkpoint`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import Golden
from mlx.utils import tree_flatten
from model.dense import Dense, interleave, predicting_rows
from PIL import Image
from safetensors.numpy import load_file

from genlip_mlx.config import GenLIPConfig
from genlip_mlx.model.genlip import GenLIP
from genlip_mlx.model.sequence import PackedSequence

STATES = 5e-5
LOGITS = 2e-4
SLACKS = (0.0, 1.0)  # every sample by itself; samples of different sizes in one call, with padding masks


@dataclass(frozen=True)
class Trial:
    """A golden case, ready to be computed."""

    golden: Golden
    config: GenLIPConfig
    weights: dict[str, mx.array]
    model: GenLIP

    @property
    def samples(self) -> range:
        return range(len(self.golden.samples))

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [(s["grid"][0], s["grid"][1]) for s in self.golden.samples]

    def patches(self, sample: int) -> mx.array:
        """[h*w, 768]: bilinear resize to the grid, channels from -1 to 1, row-major patches."""
        (h, w), p = self.grids[sample], self.config.patch_size
        picture = Image.open(self.golden.image_path(sample)).convert("RGB")
        pixels = np.asarray(picture.resize((w * p, h * p), Image.Resampling.BILINEAR), dtype=np.float32)
        pixels = (pixels / 255 - 0.5) / 0.5
        return mx.array(pixels.reshape(h, p, w, p, 3).transpose(0, 2, 4, 1, 3).reshape(h * w, -1))

    def all_patches(self) -> mx.array:
        return mx.concatenate([self.patches(i) for i in self.samples])

    def texts(self) -> list[np.ndarray]:
        return [self.golden.expected(f"{i}.input_ids").astype(np.int32) for i in self.samples]

    def all_ids(self) -> mx.array:
        return mx.array(np.concatenate(self.texts()))

    def sequence(self, slack: float) -> PackedSequence:
        return PackedSequence(self.grids, [len(text) for text in self.texts()], slack=slack)

    def prompt(self, sample: int) -> list[int]:
        return [int(token) for token in self.texts()[sample][: self.golden.samples[sample]["n_prompt"]]]

    def greedy(self, sample: int) -> list[int]:
        ids: list[int] = self.golden.samples[sample]["greedy_ids"]
        return ids

    def loss(self, model: GenLIP, patches: mx.array, sequence: PackedSequence) -> mx.array:
        """Mean cross-entropy over the label tokens of the pack."""
        labels = np.concatenate([np.append(self.golden.expected(f"{i}.labels"), -100) for i in self.samples])
        rows = np.flatnonzero(labels != -100)
        features = model.outputs(patches, self.all_ids(), sequence)[mx.array(rows)]
        return nn.losses.cross_entropy(model.logits(features), mx.array(labels[rows]), reduction="mean")


def fresh_model(config: GenLIPConfig, weights: dict[str, mx.array]) -> GenLIP:
    model = GenLIP(config)
    model.load_weights(list(weights.items()))
    return model


@pytest.fixture(scope="module")
def trial(case: Golden) -> Trial:
    arrays = {}
    for file in case.folder.glob("model*.safetensors"):
        arrays |= load_file(file)
    weights = {name: mx.array(w.reshape(len(w), -1) if w.ndim == 4 else w) for name, w in arrays.items()}
    config = GenLIPConfig.from_file(case.folder / "config.json")
    embed_dim = weights["embeddings.weight"].shape[1]
    if embed_dim != config.hidden_size:
        config = dataclasses.replace(config, text_embed_dim=embed_dim)
    model = fresh_model(config, weights)
    model.eval()
    return Trial(case, config, weights, model)


def assert_within(ours: mx.array | np.ndarray, expected: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=atol)


def test_patches_are_the_references(trial: Trial) -> None:
    for i in trial.samples:
        assert_within(trial.golden.rows(trial.patches(i), f"{i}.patches"), trial.golden.expected(f"{i}.patches"), 1e-6)


def test_positions(trial: Trial) -> None:
    offsets = np.cumsum([0] + [h * w for h, w in trial.grids])
    text_offsets = offsets[-1] + np.cumsum([0] + [len(text) for text in trial.texts()])
    packed = np.asarray(trial.sequence(0).positions).T
    for i in trial.samples:
        expected = trial.golden.expected(f"{i}.position_ids")
        alone = PackedSequence([trial.grids[i]], [len(trial.texts()[i])])
        np.testing.assert_array_equal(np.asarray(alone.positions).T, expected)
        image, text = slice(*offsets[i : i + 2]), slice(*text_offsets[i : i + 2])
        np.testing.assert_array_equal(np.concatenate([packed[:, image], packed[:, text]], axis=1), expected)


def assert_states(trial: Trial, sample: int, states: list[mx.array], features: mx.array) -> None:
    assert len(states) == trial.config.num_hidden_layers + 1
    for name, ours in [*((f"hidden.{i}", state) for i, state in enumerate(states)), ("features", features)]:
        full = f"{sample}.{name}"
        assert_within(trial.golden.rows(ours, full), trial.golden.expected(full), STATES)


def test_hidden_states_and_features_of_one_picture(trial: Trial) -> None:
    for i in trial.samples:
        patches, grids = trial.patches(i), [trial.grids[i]]
        assert_states(trial, i, trial.model.hidden_states(patches, grids), trial.model.encode(patches, grids))


def test_hidden_states_and_features_of_all_pictures_in_one_call(trial: Trial) -> None:
    patches = trial.all_patches()
    states, features = trial.model.hidden_states(patches, trial.grids), trial.model.encode(patches, trial.grids)
    start = 0
    for i, (h, w) in enumerate(trial.grids):
        end = start + h * w
        assert_states(trial, i, [state[start:end] for state in states], features[start:end])
        start = end


def test_readout(trial: Trial) -> None:
    for i in trial.samples:
        logits = np.asarray(trial.model.logits(trial.model.encode(trial.patches(i), [trial.grids[i]])))
        top = np.argsort(-logits, axis=-1)[:, :5]
        np.testing.assert_array_equal(
            trial.golden.rows(top, f"{i}.readout_top5"), trial.golden.expected(f"{i}.readout_top5")
        )


def test_logits_of_one_sample(trial: Trial) -> None:
    for i, text in enumerate(trial.texts()):
        sequence = PackedSequence([trial.grids[i]], [len(text)])
        logits = trial.model(trial.patches(i), mx.array(text), sequence)
        assert_within(logits, trial.golden.expected(f"{i}.logits"), LOGITS)


@pytest.mark.parametrize("slack", SLACKS)
def test_logits_of_the_pack(trial: Trial, slack: float) -> None:
    logits = trial.model(trial.all_patches(), trial.all_ids(), trial.sequence(slack))
    assert_within(logits, np.concatenate([trial.golden.expected(f"{i}.logits") for i in trial.samples]), LOGITS)


def test_the_plain_model_agrees_too(trial: Trial) -> None:
    # dense.py is the measure of all other shapes, so it is measured itself.
    text = trial.texts()[1]
    rows = interleave([trial.grids[1]], [len(text)])
    dense = Dense(trial.config, trial.weights)
    state = dense.states(rows, trial.patches(1), mx.array(text))[-1]
    assert_within(dense.logits(state[predicting_rows(rows)]), trial.golden.expected("1.logits"), LOGITS)


def test_greedy_ids_alone(trial: Trial) -> None:
    for i in trial.samples:
        logits, cache = trial.model.prefill(trial.patches(i), [trial.grids[i]])
        if trial.prompt(i):
            logits = trial.model.extend(mx.array([trial.prompt(i)]), cache)
        spoken = []
        for _ in trial.greedy(i):
            token = mx.argmax(logits, axis=-1)
            spoken.append(token.item())
            logits = trial.model.extend(token[:, None], cache)
        assert spoken == trial.greedy(i)


def test_greedy_ids_of_all_samples_in_one_batch(trial: Trial) -> None:
    # Prompts differ in length. The shorter ones are filled up with the first words of their own
    # answer, whose prediction is then read from the same call.
    block = max(len(trial.prompt(i)) for i in trial.samples)
    given = mx.array([(trial.prompt(i) + trial.greedy(i))[:block] for i in trial.samples])
    first, cache = trial.model.prefill(trial.all_patches(), trial.grids)
    logits = mx.concatenate([first[:, None], trial.model.extend(given, cache, all_logits=True)], axis=1)
    columns = [mx.argmax(logits, axis=-1)]
    for _ in trial.greedy(0):
        columns.append(mx.argmax(trial.model.extend(columns[-1][:, -1:], cache), axis=-1, keepdims=True))
    spoken = mx.concatenate(columns, axis=1).tolist()
    for i in trial.samples:
        start = len(trial.prompt(i))
        assert spoken[i][start : start + len(trial.greedy(i))] == trial.greedy(i)


@pytest.mark.parametrize("slack", SLACKS)
def test_loss_and_gradients_of_the_pack(trial: Trial, slack: float) -> None:
    sequence = trial.sequence(slack)
    if slack:
        assert len(sequence.buckets) == 1
    patches, golden = trial.all_patches(), trial.golden
    loss, tree = nn.value_and_grad(trial.model, lambda m: trial.loss(m, patches, sequence))(trial.model)
    grads = {name: np.asarray(grad) for name, grad in tree_flatten(tree)}

    assert loss.item() == pytest.approx(golden.expected_json["packed_loss"], rel=1e-5)
    norms = {name: float(np.linalg.norm(grad)) for name, grad in grads.items()}
    assert norms == pytest.approx(golden.expected_json["grad_norms"], rel=1e-4, abs=0)
    total = float(np.linalg.norm(list(norms.values())))
    assert total == pytest.approx(golden.expected_json["grad_global_norm"], rel=1e-4)
    names = [name.removeprefix("grad.") for name in golden.tensors if name.startswith("grad.")]
    assert names
    for name in names:
        expected = golden.expected(f"grad.{name}")
        ours = golden.rows(grads[name].reshape(len(grads[name]), *expected.shape[1:]), f"grad.{name}")
        assert np.linalg.norm(ours - expected) <= 1e-4 * np.linalg.norm(expected), name


def test_clipping_is_torchs() -> None:
    # torch scales by max_norm / (norm + 1e-6), and not at all where that is above 1.
    grads = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}
    clipped, norm = optim.clip_grad_norm(grads, 1.0)
    assert norm.item() == 5
    factor = 1 / (5 + 1e-6)
    np.testing.assert_allclose(np.asarray(clipped["a"]), [3 * factor, 0], rtol=1e-7)
    np.testing.assert_allclose(np.asarray(clipped["b"]), [[4 * factor]], rtol=1e-7)
    same, _ = optim.clip_grad_norm(grads, 6.0)
    np.testing.assert_array_equal(np.asarray(same["a"]), [3, 0])


@pytest.mark.parametrize("slack", SLACKS)
def test_five_steps_of_adamw(trial: Trial, slack: float) -> None:
    sequence, patches = trial.sequence(slack), trial.all_patches()
    model = fresh_model(trial.config, trial.weights)
    model.train()
    optimizer = optim.AdamW(1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.01, bias_correction=True)
    step = nn.value_and_grad(model, lambda m: trial.loss(m, patches, sequence))
    losses = []
    for _ in trial.golden.expected_json["adamw_5_step_losses"]:
        loss, grads = step(model)
        clipped, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, clipped)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    assert losses == pytest.approx(trial.golden.expected_json["adamw_5_step_losses"], rel=1e-3)
