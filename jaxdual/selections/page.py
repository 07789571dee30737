"""A page that shows what a request looked at, step by step; one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from jaxdual.outputs import CompletionOutput, RequestOutput, SelectionStep
from jaxdual.selections.chart import chart
from jaxdual.selections.steps import LEVELS_PER_OCTAVE, SELECTED, TOP_LEVEL, StepFigures, packed_levels, step_figures
from jaxdual.selections.token_text import token_markups
from jaxdual.tokenizer import Tokenizer

_TITLE = "What a request looked at"


def selection_page(
    request: RequestOutput,
    tokenizer: Tokenizer | None,
    *,
    index: int = 0,
    template: Sequence[bool] = (),
    facts: Mapping[str, object] | None = None,
    title: str = _TITLE,
) -> str:
    """The page of an output, as text of an HTML file.

    It has the tokens of prompt and answer, shaded by the relevance that a step gave them, with those marked that it
    selected; a slider over the steps; and how many tokens each selected, with which part of the relevance, and how like
    the step before.

    Args:
      request: that was decoded with `DyscoParams(return_selection=True)`.
      tokenizer: the model's; None for one without, whose tokens are shown as ids.
      index: of the output.
      template: of each token of the prompt, whether it is never raised, as `template_mask` says; empty for none.
      facts: what else is told at the top, by name.
      title: of the page.

    Raises:
      ValueError: there is no such output, it has no selection, or `template` has another length than the prompt.
    """
    output, steps = _selection(request, index)
    prompt = request.prompt_token_ids
    if template and len(template) != len(prompt):
        raise ValueError(f"template has {len(template)} tokens, and the prompt has {len(prompt)}")
    template = template or [False] * len(prompt)
    tokens = [*prompt, *output.token_ids]
    figures = step_figures(steps, template)
    markups = token_markups(_texts(tokens, tokenizer))
    spans = list(map(_span, markups, itertools.chain(template, itertools.repeat(False))))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    script = Markup(_part("page.js"))
    return environment.from_string(_part("page.html")).render(
        title=title,
        facts={**(facts or {}), "prompt": f"{len(prompt)} tokens", "answer": f"{len(output.token_ids)} tokens"},
        style=Markup(_part("page.css")),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts=list(_charts(figures)),
        steps=len(steps),
        tokens=len(tokens),
        prompt=Markup().join(spans[: len(prompt)]),
        answer=Markup().join(spans[len(prompt) :]),
        data=_embedded(_data(steps, figures, len(prompt), len(tokens))),
    )


def _selection(request: RequestOutput, index: int) -> tuple[CompletionOutput, list[SelectionStep]]:
    if not 0 <= index < len(request.outputs):
        raise ValueError(f"index={index} must be in [0, {len(request.outputs) - 1}]")
    output = request.outputs[index]
    if not output.selection:
        raise ValueError(f"output {index} has no selection: it comes with DyscoParams(return_selection=True)")
    return output, output.selection


def _texts(tokens: Sequence[int], tokenizer: Tokenizer | None) -> Iterator[tuple[int, bytes]]:
    """Tokens, and what they stand for."""
    known: dict[int, bytes] = {}
    for token in tokens:
        if token not in known:
            known[token] = b"" if tokenizer is None else tokenizer.token_bytes(token)
        yield token, known[token]


def _span(token: Markup, is_template: bool) -> Markup:
    return Markup("<span data-template>{}</span>" if is_template else "<span>{}</span>").format(token)


def _charts(figures: Sequence[StepFigures]) -> Iterator[dict[str, Any]]:
    most = max(one.selected for one in figures)
    for name, label, values, top, shown in (
        ("selected", "tokens selected", [one.selected for one in figures], float(most), str(most)),
        ("mass", "their part of the relevance", [one.mass for one in figures], 1.0, "1"),
        ("likeness", "Jaccard index with the step before", [one.likeness for one in figures], 1.0, "1"),
    ):
        description = f"{label} by step, from 0 to {shown}"
        yield {"name": name, "label": label, "top": shown, "svg": chart(values, top, description)}


def _data(steps: Sequence[SelectionStep], figures: Sequence[StepFigures], prompt: int, tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "tokens": tokens,
        "levels_per_octave": LEVELS_PER_OCTAVE,
        "top_level": TOP_LEVEL,
        "selected_bit": SELECTED,
        "position": [one.position for one in figures],
        "selected": [one.selected for one in figures],
        "raised": [one.raised for one in figures],
        "mass": [round(one.mass, 6) for one in figures],
        "likeness": [None if one.likeness is None else round(one.likeness, 6) for one in figures],
        "most": [float(f"{one.most:.6g}") for one in figures],
        "levels": packed_levels(steps, tokens),
    }


def _embedded(data: Mapping[str, Any]) -> Markup:
    """JSON that nothing in an HTML file takes for an end of its element."""
    return Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def _part(name: str) -> str:
    return (resources.files("jaxdual.selections") / name).read_text(encoding="utf-8")
