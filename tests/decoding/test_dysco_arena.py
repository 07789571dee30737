"""Programs of DySCO write into the arena where it lies: a copy of it would take longer than the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from jaxdual import LLM, SamplingParams
from tests.decoding.test_dysco import FIXTURES
from tests.decoding.test_dysco_engine import SETTINGS, dysco_of, prompt_of

CASE = "qwen3_hybrid"


@pytest.mark.parametrize("mode", ["exact", "lag", "split", "tail_chunk"])
def test_no_program_copies_the_arena(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(FIXTURES / CASE, **SETTINGS)
    runner = cast(Any, llm)._engine.runner
    dysco = runner._dysco = runner._new_dysco()
    (arena,) = runner.device.arenas
    shape = f"f32[{','.join(map(str, arena.shape))}]"
    compiled: dict[str, str] = {}

    def noted(name: str) -> Callable[..., Any]:
        program = getattr(dysco.programs, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            compiled[name] = program.lower(*arguments, **keywords).compile().as_text()
            return program(*arguments, **keywords)

        return call

    for name in ("decode", "observe"):
        monkeypatch.setattr(dysco.programs, name, noted(name))
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, dysco=dysco_of(CASE, mode=mode))
    llm.generate([prompt_of(CASE)], params)
    assert compiled.keys() == {"decode", "observe"}
    for text in compiled.values():
        of_arena = [line for line in text.splitlines() if f"= {shape}" in line]
        assert any(" scatter(" in line or " fusion(" in line for line in of_arena)
        assert not [line for line in of_arena if " copy(" in line]
