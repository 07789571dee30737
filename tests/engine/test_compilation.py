"""Programs: none is compiled after warm-up, and none copies the arena."""

from __future__ import annotations

import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdual import LLM, SamplingParams
from jaxdual.engine import sampler
from jaxdual.engine.paged import decode_attend, prefill_attend
from jaxdual.engine.steps import Programs
from jaxdual.kv.layout import KVLayout
from jaxdual.telemetry import CompileCounter
from tests.engine.models import FIXTURES, load

LAYOUT = KVLayout.of_layers((None,) * 4, kv_heads=2, head_dim=16, page_size=64, dtype="float32", itemsize=4)
PAGES = 512
I32 = jnp.int32


def spec(*shape: int, dtype: object = I32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.slow
def test_nothing_compiles_after_warm_up() -> None:
    """A mixed load: prompts of all lengths, sampling of all kinds, cache hits, preemption by swap, cancellation."""
    llm = LLM(
        FIXTURES / "qwen3",
        block_size=8,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        max_model_len=160,
        num_kv_blocks=48,
        host_cache_bytes=1 << 20,
        preemption_mode="swap",
    )
    shapes: list[str] = []
    llm.warmup(lambda name, seconds: shapes.append(name))
    assert len(shapes) == len(set(shapes))
    rng = random.Random(0)
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01},
        {"temperature": 0.9, "presence_penalty": 0.4, "repetition_penalty": 1.2},
        {"temperature": 0, "logit_bias": {3: 5.0}, "min_tokens": 4},
        {"temperature": 0, "logprobs": 5},
        {"temperature": 0, "prompt_logprobs": 3},
        {"temperature": 1.0, "n": 3},
    ]
    with CompileCounter() as counter:
        for round_ in range(2):
            for number in range(40):
                prompt = [rng.randrange(320) for _ in range(rng.choice([1, 2, 7, 8, 9, 31, 64, 65, 120]))]
                params = SamplingParams(max_tokens=rng.randint(1, 30), **kinds[number % len(kinds)])
                llm.submit({"prompt_token_ids": prompt}, params, f"{round_}-{number}")
                if number % 9 == 5:
                    llm.step()
                    llm.abort(f"{round_}-{number}")
            while llm.has_unfinished:
                llm.step()
    assert llm.stats().preemptions > 0
    llm.check_integrity()
    assert counter.compilations == 0


def assert_in_place(compiled: jax.stages.Compiled, *, max_temporaries: int) -> None:
    """The arena is aliased, and nothing as large as it is copied or allocated."""
    arena = int(np.prod(LAYOUT.arena_shape(PAGES))) * 4
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= arena
    assert memory.temp_size_in_bytes <= max_temporaries < arena
    shape = ",".join(map(str, LAYOUT.arena_shape(PAGES)))
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", compiled.as_text())


def test_fused_steps_alias_the_arena_and_copy_no_pool() -> None:
    programs = Programs(load("qwen3"), LAYOUT)
    arena = spec(*LAYOUT.arena_shape(PAGES), dtype=jnp.float32)
    width, rows, chunk = 4, 4, 32
    gathered = 2 * rows * width * LAYOUT.page_size * LAYOUT.kv_heads * LAYOUT.head_dim * 4
    decode = programs.decode.lower(
        programs.leaves, arena, spec(5), spec(rows), spec(rows), spec(rows), spec(rows, width)
    ).compile()
    assert_in_place(decode, max_temporaries=6 * gathered)
    prefill = programs.prefill.lower(
        programs.leaves, arena, spec(rows, chunk), spec(rows), spec(rows), spec(rows, width)
    ).compile()
    scores = rows * chunk * width * LAYOUT.page_size * 8 * 4
    assert_in_place(prefill, max_temporaries=6 * (gathered + scores))
    scatter = programs.scatter.lower(arena, spec(8), spec(8, *LAYOUT.block_shape(), dtype=jnp.float32)).compile()
    assert_in_place(scatter, max_temporaries=LAYOUT.full_block_bytes * 16)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_single_layer_aliases_the_arena_and_copies_no_pool(kind: str) -> None:
    """Layerwise prefill runs layers one by one."""
    model = load("qwen3")
    tokens, width = 8, 4

    def layer(x: jax.Array, arena: jax.Array, positions: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        if kind == "decode":
            attend = decode_attend(LAYOUT, positions, table)
        else:
            attend = prefill_attend(LAYOUT, positions[:1], positions[:1] + 1, table[:1], tokens)
        return model.layer(2, x, model.rope(positions), attend, arena)

    arena = spec(*LAYOUT.arena_shape(PAGES), dtype=jnp.float32)
    compiled = (
        jax.jit(layer, donate_argnums=1)
        .lower(spec(tokens, 64, dtype=jnp.float32), arena, spec(tokens), spec(tokens, width))
        .compile()
    )
    assert_in_place(compiled, max_temporaries=1 << 22)


def test_sampling_updates_its_state_in_place() -> None:
    programs = Programs(load("qwen3"), LAYOUT)
    state = jax.eval_shape(lambda: sampler.new_state(64, 320))
    inputs = sampler.pack([None] * 4, 64, 320)
    compiled = programs.sample.lower(programs.leaves, spec(4, 64, dtype=jnp.float32), state, inputs).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in state)
