"""The layer of Interleaved Head Attention against its oracle, its special cases and its examples."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import RopeConfig
from models.attention import causal_attention, pseudo_attention
from models.config import IHAConfig
from models.families import to_hf
from models.iha import (
    collapse,
    initial_collapse,
    initial_mixing,
    is_mixing,
    num_mixing_parameters,
    pseudo_queries,
    schedule,
)
from models.rope import Rope, exact_rope_table, rotate
from models.shapes import parameter_path
from pallas_kernels.pseudo_heads import PseudoHeads
from tests.engine.models import folder, load
from tests.iha_models import KINDS, config_of, reference_logits
from tests.models.iha_oracle import collapsed, pseudo_outputs, rotated, visible

MASKS, ROPES, WINDOWS = ("flat", "token"), ("virtual", "token", "scaled", "none"), (None, 1, 2, 3)
THETA = 10000.0


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def tables(places: np.ndarray, head_dim: int) -> Rope:
    """Rotary tables in float64."""
    angles = np.asarray(places, np.float64)[:, None] * THETA ** (-np.arange(head_dim // 2) / (head_dim // 2))
    return Rope(jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles)))


class Layer:
    """The parts of a layer with random weights, in float64, put together as the model does."""

    def __init__(
        self,
        mask: str,
        window: int | None,
        rope: str,
        *,
        pseudo: int = 2,
        heads: int = 4,
        kv_heads: int = 2,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.mask, self.window, self.rope, self.pseudo, self.head_dim = mask, window, rope, pseudo, 6
        self.heads, self.kv_heads = heads, kv_heads
        self.alpha_q = rng.normal(size=(heads, heads, pseudo))
        self.alpha_k, self.alpha_v = rng.normal(size=(2, kv_heads, heads, pseudo))
        self.rng = rng

    def tokens(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q = self.rng.normal(size=(count, self.heads, self.head_dim))
        k, v = self.rng.normal(size=(2, count, self.kv_heads, self.head_dim))
        return q, k, v

    def rope_of(self, places: np.ndarray) -> Rope:
        """Of tokens, without what pseudo heads add."""
        return tables(places * {"virtual": self.pseudo, "none": 0}.get(self.rope, 1), self.head_dim)

    @property
    def phase(self) -> Rope:
        step = {"virtual": 1, "scaled": 1 / self.pseudo}.get(self.rope, 0)
        return tables(np.arange(self.pseudo) * step, self.head_dim)

    @property
    def pseudo_heads(self) -> PseudoHeads:
        alphas = jnp.asarray(self.alpha_k), jnp.asarray(self.alpha_v)
        return PseudoHeads(*alphas, *self.phase[:2], mask=self.mask, window=self.window)  # type: ignore[arg-type]

    def projected(self, q: np.ndarray, k: np.ndarray, first: int = 0) -> tuple[jax.Array, jax.Array]:
        """Pseudo queries, and keys as they are cached, of tokens from position `first` on."""
        rope = self.rope_of(np.arange(first, first + len(q)))
        return pseudo_queries(jnp.asarray(q), jnp.asarray(self.alpha_q), rope, self.phase), rotate(jnp.asarray(k), rope)

    def forward(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, library: bool = False) -> np.ndarray:
        queries, keys = self.projected(q, k)
        out = pseudo_attention(1, queries, keys, jnp.asarray(v), self.pseudo_heads, library=library)
        return np.asarray(out)

    def oracle(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        return pseudo_outputs(
            q, k, v, self.alpha_q, self.alpha_k, self.alpha_v, mask=self.mask, window=self.window, rope=self.rope
        )


@pytest.mark.parametrize(("mask", "window", "rope"), list(itertools.product(MASKS, WINDOWS, ROPES)))
def test_random_unsymmetric_mixing_gives_what_loops_over_indices_do(mask: str, window: int | None, rope: str) -> None:
    layer = Layer(mask, window, rope, pseudo=3)
    tokens = layer.tokens(7)
    np.testing.assert_allclose(layer.forward(*tokens), layer.oracle(*tokens), atol=1e-12)


@pytest.mark.parametrize("form", ["global", "per_head"])
def test_collapse(form: str) -> None:
    rng = np.random.default_rng(1)
    out = rng.normal(size=(5, 4, 3, 6))
    weights = rng.normal(size=initial_collapse(4, 3, form).shape)
    np.testing.assert_allclose(collapse(jnp.asarray(out), jnp.asarray(weights)), collapsed(out, weights), atol=1e-12)


def test_masks_are_those_of_the_worked_example() -> None:
    places = [(n, p) for n in range(2) for p in range(2)]
    wanted = {
        ("flat", None): "1000 1100 1110 1111",
        ("token", None): "1100 1100 1111 1111",
        ("flat", 1): "1000 1100 0110 0011",
        ("token", 1): "1100 1100 0011 0011",
    }
    layer_values = np.eye(4)
    for (mask, window), rows in wanted.items():
        found = [[visible(query, key, 2, mask, window) for key in places] for query in places]
        assert found == [[digit == "1" for digit in row] for row in rows.split()]
        # What is not seen gets no weight: one-hot values show the weights themselves.
        pseudo = PseudoHeads(
            jnp.zeros((2, 1, 2)), jnp.eye(2)[:, None], *tables(np.zeros(2), 4)[:2], mask=mask, window=window
        )
        values = layer_values.reshape(2, 2, 4)  # token, source head: one-hot in (token, pseudo)
        out = pseudo_attention(1, jnp.zeros((2, 1, 2, 4)), jnp.zeros((2, 2, 4)), jnp.asarray(values), pseudo)
        np.testing.assert_array_equal(np.asarray(out)[:, 0].reshape(4, 4) > 0, found)


@pytest.mark.parametrize("pseudo", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 5])
def test_flat_mask_is_a_band_of_tokens_for_each_pair_of_pseudo_heads(pseudo: int, window: int | None) -> None:
    for n, m, p, r in itertools.product(range(9), range(9), range(pseudo), range(pseudo)):
        later = int(r > p)
        in_band = later <= n - m and (window is None or n - m <= window - 1 + later)
        assert visible((n, p), (m, r), pseudo, "flat", window) == in_band


@pytest.mark.parametrize(("mask", "wanted"), [("flat", (1 / 3, 1 / 2)), ("token", (1 / 2, 1 / 2))])
def test_example_of_two_tokens_with_equal_logits(mask: str, wanted: tuple[float, float]) -> None:
    pseudo = PseudoHeads(jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2)), *tables(np.zeros(2), 2)[:2], mask=mask)  # type: ignore[arg-type]
    v = jnp.asarray([[[0.0, 0.0]], [[1.0, 1.0]]])
    out = pseudo_attention(1, jnp.zeros((2, 1, 2, 2)), jnp.zeros((2, 1, 2)), v, pseudo)
    np.testing.assert_allclose(out[1, 0, :, 0], wanted, atol=1e-15)
    mean = collapse(out, jnp.asarray(initial_collapse(1, 2, "global"), jnp.float64))[1, 0, 0]
    assert float(mean) == pytest.approx(5 / 12 if mask == "flat" else 1 / 2, abs=1e-7)


EXACT = 1e-12
# (rope, mask): whether IHA of replicated heads is plain attention if the collapse takes the first, the last, the mean.
SPECIAL_CASES = {
    ("none", "flat"): (False, True, False),
    ("none", "token"): (True, True, True),
    ("token", "flat"): (False, True, False),
    ("token", "token"): (True, True, True),
    ("virtual", "flat"): (False, False, False),
    ("virtual", "token"): (False, False, False),
    ("scaled", "flat"): (False, False, False),
    ("scaled", "token"): (False, False, False),
}


@pytest.mark.parametrize("window", [None, 2, 3])
@pytest.mark.parametrize(("rope", "mask"), SPECIAL_CASES)
def test_where_copies_of_heads_are_plain_attention(rope: str, mask: str, window: int | None) -> None:
    layer = Layer(mask, window, rope, pseudo=3, kv_heads=4, seed=7)
    layer.alpha_q = layer.alpha_k = layer.alpha_v = initial_mixing(4, 4, 3).astype(np.float64)
    q, k, v = layer.tokens(7)
    plain = plain_attention(q, k, v, window, rotary=rope != "none")
    out = jnp.asarray(layer.forward(q, k, v))
    for select, exact in zip((0, 2, None), SPECIAL_CASES[rope, mask], strict=True):
        weights = np.full((4, 3), 1 / 3) if select is None else np.eye(3)[[select] * 4]
        difference = np.abs(np.asarray(collapse(out, jnp.asarray(weights))) - plain).max()
        assert difference < EXACT if exact else difference > 1e-2, (select, difference)


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None, *, rotary: bool) -> np.ndarray:
    if rotary:
        q, k = (np.array([[rotated(head, n, THETA) for head in heads] for n, heads in enumerate(x)]) for x in (q, k))
    out = causal_attention(*(jnp.asarray(x)[None] for x in (q, k, v)), window=window)
    return np.asarray(out[0])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rope", ROPES)
def test_one_pseudo_head_that_is_its_own_head_is_grouped_query_attention(mask: str, rope: str) -> None:
    layer = Layer(mask, 3, rope, pseudo=1)
    layer.alpha_q = initial_mixing(4, 4, 1).astype(np.float64)
    layer.alpha_k = layer.alpha_v = initial_mixing(2, 4, 1).astype(np.float64)
    q, k, v = layer.tokens(7)
    plain = plain_attention(q, k, v, 3, rotary=rope != "none")
    np.testing.assert_allclose(layer.forward(q, k, v)[:, :, 0], plain, atol=EXACT)


@pytest.mark.parametrize("mask", MASKS)
def test_later_tokens_change_nothing_before_them(mask: str) -> None:
    layer = Layer(mask, None, "virtual", pseudo=3)
    q, k, v = layer.tokens(8)
    before = layer.forward(q, k, v)
    for changed in (q, k, v):
        changed[5:] += 1.0
    after = layer.forward(q, k, v)
    np.testing.assert_array_equal(after[:5], before[:5])
    assert (after[5:] != before[5:]).any()


@pytest.mark.parametrize("window", WINDOWS)
def test_the_attention_of_the_library_agrees_under_the_flat_mask(window: int | None) -> None:
    layer = Layer("flat", window, "virtual", pseudo=2)
    tokens = layer.tokens(9)
    np.testing.assert_allclose(layer.forward(*tokens, library=True), layer.oracle(*tokens), atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_a_model_are_those_of_the_plain_forward_pass(name: str) -> None:
    config = config_of(name)
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, 26)
    with jax.enable_x64(False):
        logits = load(name).logits(tokens[None])[0]
    np.testing.assert_allclose(logits, reference_logits(folder(name), config, tokens), atol=2e-3, rtol=1e-4)


def test_mixing_weights_are_counted_and_stay_in_float32(tmp_path: Path) -> None:
    for name, each in (("iha", 4 * 16 * 2 - 2 * 2 * 4 * 2), ("iha_token", 3 * (16 + 2 * 8) + 12)):
        config = config_of(name)
        with jax.enable_x64(False):
            model = models.init(config, dtype="bfloat16")
            models.save(model, tmp_path / name, dtype="bfloat16")
            loaded = models.load(tmp_path / name, dtype="bfloat16")
        assert loaded.config == config
        found = jax.tree_util.tree_leaves_with_path(nnx.state(loaded))
        mixing = {parameter_path(path): leaf for path, leaf in found if is_mixing(parameter_path(path))}
        assert sum(leaf.size for leaf in mixing.values()) == num_mixing_parameters(config)
        assert num_mixing_parameters(config) == each * len(config.iha.layers)  # type: ignore[union-attr]
        assert {leaf.dtype for leaf in mixing.values()} == {jnp.dtype("float32")}
        assert loaded.embedding[...].dtype == jnp.bfloat16
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
            if parameter_path(path) in mixing:
                np.testing.assert_array_equal(mixing[parameter_path(path)], leaf)


def test_a_layer_of_as_many_heads_adds_four_heads_squared_pseudo_parameters() -> None:
    for heads, pseudo, form, wanted in ((20, 20, "global", 32000), (20, 20, "per_head", 24400), (8, 2, "global", 512)):
        config = dataclasses.replace(
            config_of("iha_full"),
            num_heads=heads,
            num_kv_heads=heads,
            num_layers=1,
            iha=IHAConfig(pseudo_heads=pseudo, layers=(0,), collapse=form),
        )
        assert num_mixing_parameters(config) == wanted


@pytest.mark.parametrize(
    ("layers", "context", "pseudo", "windows"),
    [
        (10, 8192, 2, (1024,) * 4 + (None,) + (1024,) * 4 + (None,)),
        (6, 8192, 20, (10,) * 4 + (None, None)),
        (2, 4, 4, (1, None)),
    ],
)
def test_schedule_of_four_local_layers_and_a_global_one(
    layers: int, context: int, pseudo: int, windows: tuple[int | None, ...]
) -> None:
    assert schedule(layers, context, pseudo) == (windows, tuple(i for i, one in enumerate(windows) if one is not None))
    assert schedule(layers, context, pseudo, iha_global=True) == (windows, tuple(range(layers)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iha_pseudo_heads": 0}, "iha_pseudo_heads is 0; it must be 1"),
        ({"iha_pseudo_heads": None}, "iha_pseudo_heads' is missing"),
        ({"iha_mask": "none"}, "iha_mask is 'none'; known: flat, token"),
        ({"iha_rope": "linear"}, "iha_rope is 'linear'; known: virtual, token, scaled, none"),
        ({"iha_collapse": 3}, "iha_collapse' is 3; a string is expected"),
        ({"iha_layers": [0, 3]}, r"iha_layers is \[0, 3\]; layers are 0 to 2"),
        ({"iha_layers": [1, 0]}, "in order are expected"),
        ({"iha_layers": []}, "in order are expected"),
        ({"iha_pseudo_keys": 3}, "may change the mathematics"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    keys = {key: value for key, value in (to_hf(config_of("iha")) | values).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(models.ModelError, match=message):
        models.load_config(tmp_path)


def test_rotary_tables_stay_exact_over_a_million_positions() -> None:
    config = RopeConfig(theta=500_000.0)
    positions = np.array([0, 1, 1023, 1024, 163_839, 1_310_719])
    with jax.enable_x64(False):
        rope = exact_rope_table(config, 128, jnp.asarray(positions, jnp.int32), 1_310_720)
    angles = positions[:, None] * 500_000.0 ** (-np.arange(64) / 64)
    np.testing.assert_allclose(rope.cos, np.cos(angles), atol=3e-7)
    np.testing.assert_allclose(rope.sin, np.sin(angles), atol=3e-7)
