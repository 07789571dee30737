"""Path walking: connections between places, and the route from one to another, step by step."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.longcontext.items import Form, Item, Ratio, Scores, Task
from bench.longcontext.names import place_names
from models.training.retrieval import MODES, WORDS, route_answer, route_line, route_question

STEPS = 4
_FILLERS = (
    "which has an old harbour",
    "where the market is held",
    "known for its gardens",
    "at the foot of the hills",
    "with its two bridges",
    "where the river bends",
)
_ON_PATH = 1 / 3  # of the edges beside the path, those that lead to one of its places
_INSTRUCTION = (
    'Give every step as a line "From PLACE go to PLACE by MODE.", the lines between <Route> and </Route>, and nothing '
    "else."
)
_STEP = re.compile(r"From (?P<source>.+?) go to (?P<destination>.+?) by (?P<mode>\w+)\.")
_ROUTE = re.compile(r"<Route>(?P<lines>.*?)</Route>", re.DOTALL)
_EXAMPLE_EDGES = 6
_MAX_TOKENS = {"full": 128, "words": 64}


@dataclass(frozen=True, slots=True)
class Edge:
    """A connection."""

    source: str
    destination: str
    mode: str

    @property
    def step(self) -> str:
        """Its line in a route."""
        return route_line(self.source, self.destination, self.mode)


def graph(
    rng: np.random.Generator, edges: int, names: Sequence[str], steps: int = STEPS
) -> tuple[list[Edge], list[Edge]]:
    """A path, and other connections that lead towards it.

    Every place has one connection that leaves it at most, the destination none, and there is no cycle: a new source is
    joined to a place of the path (one in three) or to another one that has been joined before.

    Args:
      rng: draws modes, and what leads where.
      edges: of all, the path's included.
      names: of `edges + 1` places.
      steps: of the path.

    Returns:
      The path's edges in order, and the others.
    """
    path, others = names[: steps + 1], names[steps + 1 :]

    def edge(source: str, destination: str) -> Edge:
        return Edge(source, destination, MODES[rng.integers(len(MODES))])

    gold = [edge(source, destination) for source, destination in itertools.pairwise(path)]
    rest = []
    for place, source in enumerate(others[: edges - steps]):
        known = path if not place or rng.random() < _ON_PATH else others[:place]
        rest.append(edge(source, known[rng.integers(len(known))]))
    return gold, rest


def make(rng: np.random.Generator, edges: int, form: Form, given: int | None = None) -> Item:
    """An item; where `given` is set, the reply has so many steps already and only the next one is asked for."""
    spare = 0 if form == "words" else _EXAMPLE_EDGES + 1
    names = place_names(rng, edges + 1 + spare, form)
    gold, rest = graph(rng, edges, names[: edges + 1])
    everything = [*gold, *rest]
    lines = [_line(rng, edge, form) for edge in everything]
    document = "\n".join(lines[place] for place in rng.permutation(edges))
    question = route_question(gold[0].source, gold[-1].destination)
    content = f"{document}\n{question}"
    if form == "full":
        content = f"{_example(rng, names[edges + 1 :])}\n\nConnections:\n{content} {_INSTRUCTION}"
    wanted = slice(0, STEPS) if given is None else slice(given, given + 1)
    return Item(
        messages=(("user", content),),
        expected=tuple(gold[wanted]),
        max_tokens=_MAX_TOKENS[form] if given is None else _MAX_TOKENS[form] // STEPS,
        gold=tuple(lines[wanted]),
        reply_start="" if given is None else "\n".join(["<Route>", *(edge.step for edge in gold[:given]), ""]),
    )


def score(item: Item, reply: str) -> Scores:
    """Of a route.

    "exact": whether it is the expected one, and nothing else. "step": part of the steps that are right, of those that
    only right ones stand before. "extracted": whether there is a route at all.
    """
    found = _ROUTE.search(reply)
    steps = [] if found is None else [Edge(**match.groupdict()) for match in _STEP.finditer(found["lines"])]
    right = 0
    for step, expected in zip(steps, item.expected, strict=False):
        if step != expected:
            break
        right += 1
    reached = min(right + 1, len(item.expected))
    return {
        "exact": Ratio(float(steps == list(item.expected))),
        "step": Ratio(right, reached),
        "extracted": Ratio(float(found is not None)),
    }


def score_next(item: Item, reply: str) -> Scores:
    """Whether the reply goes on with the expected step."""
    match = _STEP.match(reply.lstrip())
    return {"step": Ratio(float(match is not None and Edge(**match.groupdict()) == item.expected[0]))}


def _line(rng: np.random.Generator, edge: Edge, form: Form) -> str:
    if form == "words":
        return edge.step
    filler = _FILLERS[rng.integers(len(_FILLERS))]
    return f"From {edge.source}, {filler}, one can go to {edge.destination} by {edge.mode}."


def _example(rng: np.random.Generator, names: Sequence[str]) -> str:
    """A question with its answer, of places that are nowhere else."""
    gold, rest = graph(rng, _EXAMPLE_EDGES, names, steps=2)
    everything = [*gold, *rest]
    lines = [_line(rng, everything[place], "full") for place in rng.permutation(len(everything))]
    question = route_question(gold[0].source, gold[-1].destination)
    return "\n".join(["Connections:", *lines, f"{question} {_INSTRUCTION}", route_answer([edge.step for edge in gold])])


def _largest(form: Form) -> int | None:
    return len(WORDS) - 1 if form == "words" else None


TASKS = (
    Task("path", lambda rng, size, form, _: make(rng, size, form), score, STEPS, _largest),
    # Teacher-forced: the steps before the one that is asked for are given, and right.
    Task(
        "path_step", lambda rng, size, form, number: make(rng, size, form, number % STEPS), score_next, STEPS, _largest
    ),
)
