"""A prefill that goes layer by layer, with keys and values of a few layers on the device at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdual.engine.layerwise.programs import LayerPrograms
from jaxdual.engine.paged import GroupTable
from jaxdual.telemetry import CompileCounter
from models import Decoder
from pallas_kernels.kv_blocks import gather_blocks, scatter_blocks
from tests.engine.models import load

PAGE, PAGES, WIDTH, CHUNK = 4, 12, 4, 8
gather = jax.jit(gather_blocks, static_argnames="rows_per_block")
scatter = jax.jit(scatter_blocks, donate_argnums=0)


class LayerwisePrefill:
    """Two sequences whose keys and values wait outside the device, a Layer Block for each layer and page."""

    def __init__(self, model: Decoder, slots: int) -> None:
        config = model.config
        self.programs = LayerPrograms(model, page_size=PAGE, slots=slots)
        row = (PAGE, config.num_kv_heads, config.head_dim)
        (device,) = self.programs.embedding.devices()
        self.arena = jax.device_put(jnp.full((PAGES * slots * 2, *row), jnp.nan, jnp.float32), device)
        self.pages = np.random.default_rng(1).permutation(PAGES)[: 2 * WIDTH].reshape(2, WIDTH).astype(np.int32)
        self.outside = {layer: np.zeros((2 * WIDTH, 2, *row), np.float32) for layer in range(config.num_layers)}
        self.slots = slots

    def chunk(self, tokens: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> jax.Array:
        """Last residual stream of each sequence."""
        programs = self.programs
        x, rope = programs.begin(programs.embedding, tokens, starts)
        for layer in range(programs.num_layers):
            blocks = self.pages.reshape(-1) * self.slots + layer % self.slots
            self.arena = scatter(self.arena, blocks, self.outside[layer])
            self.arena, x = programs.layer(layer, x, self.arena, rope, starts, counts, GroupTable(self.pages))
            self.outside[layer] = np.array(gather(self.arena, blocks, rows_per_block=2))
        return programs.end(x, counts)


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe_mixed", "mistral", "pruned"])
def test_chunks_layer_by_layer_give_the_logits_of_the_whole_model(name: str, slots: int) -> None:
    model = load(name)
    prefill = LayerwisePrefill(model, slots)
    prompts = np.random.default_rng(2).integers(model.config.vocab_size, size=(2, 13)).astype(np.int32)
    prefill.chunk(prompts[:, :CHUNK], np.zeros(2, np.int32), np.array([8, 3], np.int32))
    rest = np.zeros((2, CHUNK), np.int32)
    rest[0, :5], rest[1, :7] = prompts[0, 8:], prompts[1, 3:10]
    last = prefill.chunk(rest, np.array([8, 3], np.int32), np.array([5, 7], np.int32))
    logits = np.asarray(model.head(last))
    for row, length in enumerate((13, 10)):
        want = np.asarray(model.logits(prompts[row : row + 1, :length]))[0, -1]
        np.testing.assert_allclose(logits[row], want, atol=2e-5)


def test_layers_of_one_kind_share_their_programs() -> None:
    prefill = LayerwisePrefill(load("qwen3_moe_mixed"), 2)
    tokens, numbers = np.zeros((2, CHUNK), np.int32), np.zeros(2, np.int32)
    kinds = len({prefill.programs.kind_of(layer) for layer in range(prefill.programs.num_layers)})
    assert kinds == 2 < prefill.programs.num_layers  # dense and sparse
    prefill.chunk(tokens, numbers, numbers + 1)
    with CompileCounter() as counter:
        prefill.chunk(tokens, numbers + CHUNK, numbers + 2)
    assert counter.compilations == 0
    assert prefill.programs.layer_program._cache_size() == kinds


def test_layers_of_different_widths_are_kinds_of_their_own() -> None:
    programs = LayerPrograms(load("pruned"), page_size=PAGE, slots=2)
    assert programs.one_of_each_kind == (2, 1, 0)


def test_the_arena_is_written_in_place() -> None:
    prefill = LayerwisePrefill(load("qwen3"), 3)
    address = prefill.arena.unsafe_buffer_pointer()
    numbers = np.zeros(2, np.int32)
    programs = prefill.programs
    x, rope = programs.begin(programs.embedding, np.zeros((2, CHUNK), np.int32), numbers)
    for layer in range(programs.num_layers):
        prefill.arena, x = programs.layer(layer, x, prefill.arena, rope, numbers, numbers, GroupTable(prefill.pages))
    assert prefill.arena.unsafe_buffer_pointer() == address
