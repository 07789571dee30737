"""The page: its structure as a parser sees it, its data taken apart again, and text that wants to be markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
import zlib
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.outputs import CompletionOutput, RequestMetrics, RequestOutput, SelectionStep
from jaxdual.selections import selection_page
from jaxdual.selections.chart import chart
from jaxdual.selections.steps import step_figures

VOID = {"meta", "input", "br", "link", "img"}


@dataclass
class Element:
    """Of a parsed page."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(one if isinstance(one, str) else one.text for one in self.children)

    def all(self, tag: str | None = None, **attributes: str) -> list[Element]:
        found = []
        for one in self.children:
            if isinstance(one, Element):
                if tag in (None, one.tag) and attributes.items() <= one.attributes.items():
                    found.append(one)
                found += one.all(tag, **attributes)
        return found

    def one(self, tag: str | None = None, **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found


class Tree(HTMLParser):
    """Parses strictly: an element that is not closed in order is an error."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("root", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        element = Element(tag, dict(attrs))
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def parsed(page: str) -> Element:
    tree = Tree()
    tree.feed(page)
    tree.close()
    assert len(tree._open) == 1
    return tree.root


class Spelling:
    """A tokenizer of these tokens."""

    def __init__(self, *tokens: bytes) -> None:
        self._tokens = tokens

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]


def request_of(prompt: int, answer: int, steps: list[SelectionStep]) -> RequestOutput:
    """Tokens are numbered from 0 on."""
    ids = list(range(prompt + answer))
    output = CompletionOutput(0, token_ids=ids[prompt:], selection=steps)
    return RequestOutput("r", None, ids[:prompt], [output], RequestMetrics(0.0))


def steps_of(prompt: int, answer: int, seed: int = 0) -> list[SelectionStep]:
    rng = np.random.default_rng(seed)
    steps = []
    for position in range(max(prompt - 2, 0), prompt + answer - 1):
        relevance = rng.dirichlet(np.full(position + 1, 0.3)).astype(np.float32)
        relevance[rng.random(position + 1) < 0.1] = 0
        chosen = np.flatnonzero(rng.random(position + 1) < 0.3)
        steps.append(SelectionStep(position, chosen.tolist(), relevance))
    return steps


def page_of(*texts: bytes, answer: int = 1, **more: Any) -> Element:
    """Of a request with these tokens."""
    prompt = len(texts) - answer
    return parsed(selection_page(request_of(prompt, answer, steps_of(prompt, answer)), Spelling(*texts), **more))


def data_of(page: Element) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.one("script", id="data").text)
    return found


def levels_of(page: Element) -> np.ndarray:
    data = data_of(page)
    raw = zlib.decompress(base64.b64decode(data["levels"]))
    return np.frombuffer(raw, np.uint8).reshape(len(data["position"]), data["tokens"])


def test_the_page_has_every_token_and_a_slider_over_the_steps() -> None:
    words = [f"w{number} ".encode() for number in range(9)]
    page = page_of(*words, answer=4, template=[True, False, False, True, False], facts={"model": "m"}, title="t")
    prompt, answer = page.one("div", id="prompt"), page.one("div", id="answer")
    assert [one.text for one in prompt.children] == [f"w{number} " for number in range(5)]
    assert [one.text for one in answer.children] == [f"w{number} " for number in range(5, 9)]
    assert [number for number, one in enumerate(prompt.children) if "data-template" in one.attributes] == [0, 3]
    assert not answer.all("span", **{"data-template": None})
    slider = page.one("input", id="step")
    assert (slider.attributes["type"], slider.attributes["min"], slider.attributes["max"]) == ("range", "1", "5")
    assert page.one("input", id="token").attributes["max"] == "8"
    facts = [(one.one("dt").text, one.one("dd").text) for one in page.one("dl").all("div")]
    assert facts == [("model", "m"), ("prompt", "5 tokens"), ("answer", "4 tokens")]
    assert [one.text for one in (page.one("title"), page.one("h1"))] == ["t", "t"]
    assert [one.attributes["id"] for one in page.all("figure") if one.all("svg")] == ["selected", "mass", "likeness"]


def test_the_page_needs_nothing_else_and_runs_its_own_script_only() -> None:
    text = selection_page(request_of(4, 2, steps_of(4, 2)), None)
    page = parsed(text)
    for element in page.all():
        assert not {"src", "href", "srcset", "data"} & set(element.attributes)
        assert not [name for name in element.attributes if name.startswith("on")]
    assert not re.findall(r"https?:|//[a-z]|url\(|@import", text)
    (policy,) = [one.attributes["content"] for one in page.all("meta") if "http-equiv" in one.attributes]
    (script,) = [one.text for one in page.all("script") if "type" not in one.attributes]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_elements_that_the_script_looks_for_are_there() -> None:
    page = parsed(selection_page(request_of(4, 2, steps_of(4, 2)), None))
    (script,) = [one.text for one in page.all("script") if "type" not in one.attributes]
    names = set(re.findall(r'getElementById\("(\w+)"\)', script))
    assert names == {"data", "step", "back", "on", "token", "said", "picked"}
    for name in names:
        page.one(id=name)
    styles = page.one("style").text
    for name in ("selected", "now", "ahead", "picked", *(f"shade{number}" for number in range(1, 9))):
        assert f".{name} {{" in styles


HOSTILE = [
    b"</div></script><script>alert(1)</script>",
    b'<b onclick="x()">&amp;\'',
    b"<!-- -->]]>",
    b"&lt;{{ title }}{% raw %}",
    b"\t  two  blanks ",
    "ж 最 😀 é".encode(),
]


def test_text_that_wants_to_be_markup_is_text() -> None:
    plain = page_of(*[b"x"] * len(HOSTILE))
    page = page_of(*HOSTILE, facts={"<i>": "<img src=x onerror=y>", "a": '"&'}, title="</title><h1>")
    shown = [one.text for one in (*page.one("div", id="prompt").children, *page.one("div", id="answer").children)]
    assert shown == [one.decode() for one in HOSTILE]
    assert {one.tag for one in page.all()} == {one.tag for one in plain.all()} | {"div"}
    assert len(page.all("script")) == 2
    assert page.one("title").text == page.one("h1").text == "</title><h1>"
    facts = [(one.one("dt").text, one.one("dd").text) for one in page.one("dl").all("div")]
    assert facts[:2] == [("<i>", "<img src=x onerror=y>"), ("a", '"&')]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=6), min_size=2, max_size=8))
def test_any_bytes_are_tokens_of_their_own(tokens: list[bytes]) -> None:
    page = page_of(*tokens)
    spans = [*page.one("div", id="prompt").children, *page.one("div", id="answer").children]
    assert len(spans) == len(tokens)
    for span, token in zip(spans, tokens, strict=True):
        assert span.tag == "span"
        own = "".join(one for one in span.children if isinstance(one, str))
        kept = token.decode("utf-8", "ignore")
        assert own == "".join(one for one in kept if one in "\n\t" or unicodedata.category(one) != "Cc")
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", span.text)


def shown(*texts: bytes) -> list[list[str | tuple[str, str]]]:
    """What tokens are shown as: text, and what stands for what has none."""
    page = page_of(*texts)
    spans = [*page.one("div", id="prompt").children, *page.one("div", id="answer").children]
    return [[one if isinstance(one, str) else (one.tag, one.text) for one in span.children] for span in spans]


def test_bytes_of_a_character_in_several_tokens_are_shown_and_the_character_where_it_is_whole() -> None:
    dash = "—".encode()
    assert shown(b"a" + dash[:1], dash[1:2], dash[2:] + b"b", b"c") == [
        ["a", ("i", "e2")],
        [("i", "80")],
        [("i", "94 —"), "b"],
        ["c"],
    ]
    assert shown(dash[:2], b"x", dash[2:], dash) == [[("i", "e2 80")], ["x"], [("i", "94")], ["—"]]
    assert shown(dash[:2], dash[2:] + dash[:1], dash[1:], b"\xff") == [
        [("i", "e2 80")],
        [("i", "94 e2 —")],
        [("i", "80 94 —")],
        [("i", "ff")],
    ]
    override = "\u202e".encode()  # that turns the direction of what follows stays a number
    assert shown(override[:1], override[1:]) == [[("i", "e2")], [("i", "80 ae")]]


def test_what_has_no_text_is_made_visible() -> None:
    assert shown(b"a\nb", b"\r\n", b"", b"\x00\x1b", "\u202e".encode(), b"\n") == [
        ["a", ("i", ""), "\nb"],
        [("i", "U+000D"), ("i", ""), "\n"],
        [("i", "2")],
        [("i", "U+0000"), ("i", "U+001B")],
        [("i", "U+202E")],
        [("i", ""), "\n"],
    ]
    page = parsed(selection_page(request_of(2, 1, steps_of(2, 1)), None))
    assert [one.text for one in page.one("div", id="prompt").children] == ["0", "1"]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 1000))
def test_selections_come_out_of_the_page_as_they_were_and_relevance_nearly(prompt: int, answer: int, seed: int) -> None:
    steps = steps_of(prompt, answer, seed)
    page = parsed(selection_page(request_of(prompt, answer, steps), None))
    data, levels = data_of(page), levels_of(page)
    assert (data["prompt"], data["tokens"]) == (prompt, prompt + answer)
    assert data["position"] == [step.position for step in steps]
    for row, most, step in zip(levels, data["most"], steps, strict=True):
        assert np.flatnonzero(row >= data["selected_bit"]).tolist() == step.selected
        level = row[: step.position + 1] % data["selected_bit"]
        found = most * 2.0 ** ((level.astype(float) - data["top_level"]) / data["levels_per_octave"])
        np.testing.assert_array_equal(level == 0, step.relevance == 0)
        told = level > 1  # 1 is that or less
        np.testing.assert_allclose(found[told], step.relevance[told], rtol=0.06)
        assert np.all(step.relevance[level == 1] <= 1.06 * found[level == 1])
        assert not row[step.position + 1 :].any()


def test_figures_are_those_of_sets() -> None:
    template = [True, False, False, True]
    steps = [
        SelectionStep(3, [0, 1, 3], np.array([0.4, 0.3, 0.2, 0.1], np.float32)),
        SelectionStep(4, [1, 2], np.array([0.1, 0.2, 0.3, 0.3, 0.1], np.float32)),
        SelectionStep(5, [4, 5], np.array([0, 0, 0, 0, 0.5, 1.5], np.float32)),
    ]
    found = step_figures(steps, template)
    assert [(one.position, one.selected, one.raised) for one in found] == [(3, 3, 2), (4, 2, 3), (5, 2, 2)]
    assert [one.mass for one in found] == pytest.approx([0.8, 0.5, 1.0])
    assert [one.likeness for one in found] == [None, pytest.approx(1 / 4), 0.0]
    assert [one.most for one in found] == pytest.approx([0.4, 0.3, 1.5])
    data = data_of(parsed(selection_page(request_of(4, 3, steps), None, template=template)))
    assert (data["selected"], data["raised"], data["likeness"]) == ([3, 2, 2], [2, 3, 2], [None, 0.25, 0.0])
    assert data["mass"] == pytest.approx([0.8, 0.5, 1.0])


def test_charts_have_a_flat_piece_for_each_step() -> None:
    svg = parsed(chart([None, 1.0, 0.5, None, 2.0], 2.0, 'a "label"')).one("svg")
    assert svg.one("path").attributes["d"] == "M1 20.0H2V30.0H3M4 0.0H5"
    assert svg.attributes["aria-label"] == 'a "label"'
    assert svg.attributes["viewbox"] == "0 -2 5 44"
    assert parsed(chart([0], 0.0, "")).one("path").attributes["d"] == "M0 40.0H1"


def test_what_has_no_selection_is_refused() -> None:
    request = request_of(4, 2, steps_of(4, 2))
    with pytest.raises(ValueError, match=r"index=1 must be in \[0, 0\]"):
        selection_page(request, None, index=1)
    with pytest.raises(ValueError, match="template has 3 tokens, and the prompt has 4"):
        selection_page(request, None, template=[True, False, False])
    request.outputs[0].selection = None
    with pytest.raises(ValueError, match=r"output 0 has no selection: it comes with DyscoParams\(return_selection"):
        selection_page(request, None)
