"""Models with packed projections are served like any other, with the tokens of the dense ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import models
from jaxdual import LLM, SamplingParams
from jaxdual.telemetry import CompileCounter
from tests.packed_models import KINDS, dense, write

pytestmark = pytest.mark.usefixtures("shared_programs")

SETTINGS: dict[str, Any] = {"block_size": 8, "max_model_len": 160, "max_num_seqs": 3, "max_num_batched_tokens": 24}
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_greedy_tokens_are_those_of_the_dense_checkpoint_with_zeros(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    inputs = [{"prompt_token_ids": [rng.randrange(96) for _ in range(length)]} for length in (1, 8, 19, 25, 60)]
    models.save(dense(name), tmp_path / "dense", dtype="float32")
    llms = [LLM(folder, **SETTINGS) for folder in (tmp_path / "dense", write(name, tmp_path / "packed"))]
    wanted, got = ([output.outputs[0].token_ids for output in llm.generate(inputs, GREEDY)] for llm in llms)
    assert got == wanted
    again = [output.outputs[0].token_ids for output in llms[1].generate(inputs, GREEDY)]
    assert again == wanted  # from the prefix cache
    for llm in llms:
        llm.check_integrity()


def test_nothing_compiles_after_warm_up(tmp_path: Path) -> None:
    llm = LLM(write("packed_2_4", tmp_path), **SETTINGS)
    llm.warmup()
    with CompileCounter() as counter:
        llm.generate([{"prompt_token_ids": [1] * 40}], GREEDY)
    assert counter.compilations == 0
