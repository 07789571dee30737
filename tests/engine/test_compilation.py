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
from jaxdual.engine.layerwise.programs import LayerPrograms
from jaxdual.engine.paged import GroupTable
from jaxdual.engine.steps import Programs
from jaxdual.kv.layout import KVLayout
from jaxdual.telemetry import CompileCounter
from tests.engine.models import folder, load

LAYOUTS = [
    KVLayout.of_layers(
        windows, kv_heads=2, head_dim=16, page_size=64, dtype="float32", itemsize=4, every_head=every_head
    )
    for windows, every_head in (
        ((None,) * 4, ()),
        ((None, 70, None, 130), ()),
        ((70,) * 4, ()),
        ((6, 6, None), (0, 1)),
    )
]
PAGES = 512
I32 = jnp.int32


def spec(*shape: int, dtype: object = I32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "mistral_mixed", "mistral", "iha"])
def test_nothing_compiles_after_warm_up(name: str) -> None:
    """A mixed load: prompts of all lengths, sampling of all kinds, cache hits, preemption by swap, cancellation."""
    llm = LLM(
        folder(name),
        block_size=8,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        max_model_len=160,
        num_kv_blocks=16 if name == "mistral" else 32,
        host_cache_bytes=1 << 20,
        preemption_mode="swap",
    )
    shapes: list[str] = []
    llm.warmup(lambda name, seconds: shapes.append(name))
    assert len(shapes) == len(set(shapes))
    rng, vocab_size = random.Random(0), load(name).config.vocab_size
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
                length = rng.choice([1, 2, 7, 8, 9, 31, 64, 65, 120])
                prompt = [rng.randrange(vocab_size) for _ in range(length)]
                params = SamplingParams(max_tokens=rng.randint(4, 40), **kinds[number % len(kinds)])
                llm.submit({"prompt_token_ids": prompt}, params, f"{round_}-{number}")
                if number % 9 == 5:
                    llm.step()
                    llm.abort(f"{round_}-{number}")
            while llm.has_unfinished:
                llm.step()
    # Behind windows alone a sequence hardly grows after its prompt, so nothing has to give way.
    assert llm.stats().preemptions > 0 or name == "mistral"
    llm.check_integrity()
    assert counter.compilations == 0


def arenas_of(layout: KVLayout) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(spec(*layout.arena_shape(PAGES, group), dtype=jnp.float32) for group in range(len(layout.groups)))


def tables_of(layout: KVLayout, rows: int, width: int) -> tuple[GroupTable, ...]:
    return tuple(GroupTable(spec(rows, width), None if g.window is None else spec(rows)) for g in layout.groups)


def assert_in_place(
    compiled: jax.stages.Compiled, arenas: tuple[jax.ShapeDtypeStruct, ...], *, max_temporaries: int
) -> None:
    """The arenas are aliased, and nothing as large as one is copied or allocated."""
    sizes = [int(np.prod(arena.shape)) * 4 for arena in arenas]
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(sizes)
    assert memory.temp_size_in_bytes <= max_temporaries < min(sizes)
    for arena in arenas:
        shape = ",".join(map(str, arena.shape))
        assert not re.findall(rf"f32\[{shape}\]\S* copy\(", compiled.as_text())


@pytest.mark.parametrize("layout", LAYOUTS, ids=["full", "full_and_windows", "windows", "pseudo_heads"])
def test_fused_steps_alias_the_arenas_and_copy_no_pool(layout: KVLayout) -> None:
    programs = Programs(load("qwen3" if layout.num_layers == 4 else "iha"), layout)
    arenas = arenas_of(layout)
    width, rows, chunk = 4, 4, 32
    tables = tables_of(layout, rows, width)
    gathered = 2 * rows * width * layout.page_size * layout.kv_heads * layout.head_dim * 4
    decode = programs.decode.lower(
        programs.leaves, arenas, spec(5), spec(rows), spec(rows), spec(rows), tables
    ).compile()
    assert_in_place(decode, arenas, max_temporaries=6 * gathered)
    prefill = programs.prefill.lower(
        programs.leaves, arenas, spec(rows, chunk), spec(rows), spec(rows), tables
    ).compile()
    scores = rows * chunk * width * layout.page_size * 8 * 4
    assert_in_place(prefill, arenas, max_temporaries=6 * (gathered + scores))
    for group, arena in enumerate(arenas):
        blocks = spec(8, *layout.block_shape(group), dtype=jnp.float32)
        scatter = programs.scatter.lower(arena, spec(8), blocks).compile()
        assert_in_place(scatter, (arena,), max_temporaries=layout.full_block_bytes(group) * 16)


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_a_layer_by_itself_aliases_its_arena_and_copies_none_of_it(name: str) -> None:
    slots, tokens, width = 3, 8, 4
    programs = LayerPrograms(load(name), page_size=64, slots=slots)
    x, rope = jax.eval_shape(programs.begin, programs.embedding, spec(1, tokens), spec(1))
    _, _, kv_heads, head_dim = LAYOUTS[0].arena_shape(PAGES)
    arena = spec(PAGES * slots * 2, 64, kv_heads, head_dim, dtype=jnp.float32)
    compiled = programs.layer_program.lower(
        programs.kind_of(1),
        **programs.arrays_of(1),
        x=x,
        arena=arena,
        rope=rope,
        starts=spec(1),
        counts=spec(1),
        table=GroupTable(spec(1, width)),
    ).compile()
    assert_in_place(compiled, (arena,), max_temporaries=1 << 22)


def test_sampling_updates_its_state_in_place() -> None:
    programs = Programs(load("qwen3"), LAYOUTS[0])
    state = jax.eval_shape(lambda: sampler.new_state(65, 320))
    inputs = sampler.pack([None] * 4, 64, 320)
    compiled = programs.sample.lower(programs.leaves, spec(4, 64, dtype=jnp.float32), state, inputs).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in state)
