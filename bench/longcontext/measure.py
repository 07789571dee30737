"""Replies of arms, their times, and what they selected."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.longcontext.arms import Arm, Setting, with_selection
from bench.longcontext.intervals import Figure
from bench.longcontext.items import Form, Item, Task
from bench.longcontext.prompts import Prompts
from bench.longcontext.selections import selection_figures
from bench.longcontext.tasks import fit
from jaxdual import LLM, DyscoParams, RequestOutput, SamplingParams
from jaxdual.decoding.dysco import DyscoModel
from jaxdual.front import TokenizedPrompt


@dataclass(frozen=True, slots=True)
class Cell:
    """A task at a length.

    Attributes:
      task: of the items.
      length: that prompts have at most, in tokens.
      size: of the items, in the task's unit.
      items, prompts: the same ones for all arms.
    """

    task: Task
    length: int
    size: int
    items: Sequence[Item]
    prompts: Sequence[TokenizedPrompt]

    @property
    def name(self) -> str:
        return f"{self.task.name} {self.length}"

    @property
    def described(self) -> dict[str, Any]:
        """What it is, without the items."""
        lengths = [len(prompt.tokens) for prompt in self.prompts]
        return {
            "task": self.task.name,
            "length": self.length,
            "size": self.size,
            "items": len(self.items),
            "prompt_tokens": {"min": min(lengths), "max": max(lengths)},
        }


def make_cell(task: Task, length: int, count: int, form: Form, seed: int, prompts: Prompts) -> Cell:
    """The cell of a task at a length; raises ValueError where the task can't have that length."""
    size, items = fit(task, length, count, form, seed, prompts.length)
    return Cell(task, length, size, items, [prompts.prompt(item) for item in items])


def figures_of(llm: LLM, cell: Cell, arm: Arm, setting: Setting) -> dict[str, Figure]:
    """The task's figures, over all items; of an arm with several draws, over all of them."""
    draws = []
    for draw in range(arm.draws):
        replies = _texts(_replies(llm, cell, setting.params(arm, draw), len(cell.items)))
        draws.append([cell.task.score(item, reply) for item, reply in zip(cell.items, replies, strict=True)])
    return {name: Figure.mean_of_draws([[one[name] for one in draw] for draw in draws]) for name in draws[0][0]}


def selected(llm: LLM, cell: Cell, arm: Arm, setting: Setting, prompts: Prompts, count: int) -> dict[str, Any] | None:
    """Figures of what an arm selects for the first items; None where it selects nothing."""
    params = setting.params(arm, 0)
    if params is None:
        return None
    outputs = _replies(llm, cell, with_selection(params), count)
    model = DyscoModel(llm.info.served_model_name, llm.info.num_layers, llm.info.num_heads)
    limits = model.resolved(params, cell.length, None)
    replies = [
        (output.outputs[0].selection or [], prompts.gold_positions(item))
        for output, item in zip(outputs, cell.items, strict=False)
    ]
    return selection_figures(replies, limits.top_k, limits.top_p)


def times_of(llm: LLM, cell: Cell, arm: Arm, setting: Setting, count: int) -> dict[str, float]:
    """Seconds to the first token of a request that is alone, and output tokens per second of `count` at once."""
    params = setting.params(arm, 0)
    _replies(llm, cell, params, count)  # compiles
    alone = []
    for place in range(count):
        (output,) = llm.generate([cell.prompts[place]], [_sampling(cell.items[place], params)])
        alone.append(output)
    first = sorted(
        output.metrics.first_token_time - output.metrics.arrival_time
        for output in alone
        if output.metrics.first_token_time is not None
    )
    began = time.perf_counter()
    outputs = _replies(llm, cell, params, count)
    seconds = time.perf_counter() - began
    return {
        "ttft_s": first[len(first) // 2],
        "output_tokens_per_s": sum(len(output.outputs[0].token_ids) for output in outputs) / seconds,
    }


def _replies(llm: LLM, cell: Cell, params: DyscoParams | None, count: int) -> list[RequestOutput]:
    sampling = [_sampling(item, params) for item in cell.items[:count]]
    outputs = llm.generate(list(cell.prompts[:count]), sampling)
    for output in outputs:
        if output.outputs[0].finish_reason == "error":
            raise ValueError(f"{cell.name}: {output.outputs[0].error}")
    return outputs


def _texts(outputs: Sequence[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def _sampling(item: Item, params: DyscoParams | None) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=item.max_tokens, dysco=params)
