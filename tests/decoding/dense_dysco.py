"""DySCO token by token over dense attention in float64: what the engine's decoding is compared with.

Written from the algorithm's description, with nothing of the engine: keys and values are plain arrays, layers are the
model's own, called one by one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import models


@dataclasses.dataclass(frozen=True)
class Settings:
    """As in the fixtures' `meta.json`."""

    heads: Sequence[tuple[int, int]]
    C: int
    I: int  # noqa: E741
    p: float | None
    K: int | None
    beta: float
    gamma: float
    dynamic: bool = True
    template_sequences: Sequence[Sequence[int]] = ()


@dataclasses.dataclass
class Trace:
    """What a run gave, a row for each biased step (`observed`: for each observed position)."""

    generated: list[int] = dataclasses.field(default_factory=list)
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)
    selected: list[np.ndarray] = dataclasses.field(default_factory=list)
    boosted: list[np.ndarray] = dataclasses.field(default_factory=list)
    relevance: list[np.ndarray] = dataclasses.field(default_factory=list)
    observed: list[np.ndarray] = dataclasses.field(default_factory=list)


class DenseDysco:
    """One sequence of a model.

    Args:
      decoder: float32.
      settings: of the algorithm.
    """

    def __init__(self, decoder: models.Decoder, settings: Settings) -> None:
        self._decoder, self._settings = decoder, settings
        layers = decoder.config.num_layers
        self._keys: list[dict[int, np.ndarray]] = [{} for _ in range(layers)]
        self._values: list[dict[int, np.ndarray]] = [{} for _ in range(layers)]

    def run(self, prompt: Sequence[int], new_tokens: int, mode: str = "exact", refresh_every: int = 4) -> Trace:
        """Greedy tokens.

        Args:
          mode, refresh_every: see `DyscoParams`.
        """
        settings, trace = self._settings, Trace()
        length = len(prompt)
        first = max(length - settings.I - (1 if settings.C else 0), 0)
        relevance = np.zeros(0)
        rows = self._forward(list(prompt[:first]), 0, None, record=True)[1] if first else []
        for position in range(max(first - settings.C + 1, 0), first):
            relevance = self._blend(relevance, _mean(rows, position))
            trace.observed.append(relevance)
        template = np.zeros(length, bool)
        for sequence in settings.template_sequences:
            for start in range(length - len(sequence) + 1):
                if list(prompt[start : start + len(sequence)]) == list(sequence):
                    template[start : start + len(sequence)] = True
        self._template = template
        tokens, static, last = list(prompt), None, max(layer for layer, _ in settings.heads)

        def note(position: int, logits: np.ndarray, selected: np.ndarray) -> None:
            trace.logits.append(logits)
            trace.selected.append(selected)
            trace.boosted.append(self._boosted(selected))
            trace.relevance.append(relevance)
            if position >= length - 1:
                tokens.append(int(np.argmax(logits)))

        if mode == "tail_chunk":
            tail = tokens[first:]
            _, rows = self._forward(tail, first, None, record=True, peek=True)
            chosen, after, bias = list[np.ndarray](), list[np.ndarray](), np.zeros((len(tail), length))
            for number in range(len(tail)):
                relevance = self._blend(relevance, _mean(rows, first + number, number))
                chosen.append(self._select(relevance))
                after.append(relevance)
                bias[number, : first + number + 1] = self._bias(chosen[-1])
            logits, _ = self._forward(tail, first, bias)
            for number, relevance in enumerate(after):  # noqa: B007  # `note` tells it
                note(first + number, logits[number], chosen[number])
            first, mode = length, "exact"
        for position in range(first, length + new_tokens - 1):
            token, now = [tokens[position]], mode
            if mode == "refresh":
                now = "lag" if (position - first) % refresh_every else "exact"
            if not settings.dynamic:
                if static is None:
                    static = self._select(relevance)
                selected = np.zeros(position + 1, bool)
                selected[: len(static)] = static
                logits, _ = self._forward(token, position, self._bias(selected))
            elif now == "exact" or not len(relevance):
                _, rows = self._forward(token, position, None, record=True, peek=True)
                relevance = self._blend(relevance, _mean(rows, position, 0))
                selected = self._select(relevance)
                logits, _ = self._forward(token, position, self._bias(selected))
            else:
                before = np.zeros(position + 1, bool)
                before[:position] = self._select(relevance)
                looked, earlier, selected = list[np.ndarray](), relevance, before

                def bias_of(layer: int, rows: list[np.ndarray]) -> np.ndarray | None:
                    nonlocal relevance, selected
                    if layer <= last:
                        return None if now == "split" else self._bias(before)  # noqa: B023
                    if not looked:  # noqa: B023
                        looked.extend(rows)  # noqa: B023
                        relevance = self._blend(earlier, _mean(rows, position, 0))  # noqa: B023
                        if now != "lag":  # noqa: B023
                            selected = self._select(relevance)
                    return self._bias(selected)

                logits, rows = self._forward(token, position, bias_of, record=True)
                if not looked:
                    raise ValueError("the last layer has a retrieval head: nothing is behind it")
            note(position, logits[0], selected)
        trace.generated = tokens[length:]
        return trace

    def _boosted(self, selected: np.ndarray) -> np.ndarray:
        """What is raised: no part of a template, and the newest token."""
        boosted = selected.copy()
        boosted[: len(self._template)] &= ~self._template[: len(boosted)]
        boosted[-1] = True
        return boosted

    def _bias(self, selected: np.ndarray) -> np.ndarray:
        return np.where(self._boosted(selected), math.log(self._settings.beta), 0.0)

    def _blend(self, before: np.ndarray, attention: np.ndarray) -> np.ndarray:
        mixed = attention.copy()
        mixed[: len(before)] += self._settings.gamma * before
        return mixed / mixed.sum()

    def _select(self, relevance: np.ndarray) -> np.ndarray:
        order = np.argsort(-relevance, kind="stable")
        count = len(relevance)
        if self._settings.p is not None:
            mass = np.cumsum(relevance[order]) / relevance.sum()
            count = max(int((mass <= self._settings.p).sum()), 1)
        if self._settings.K is not None:
            count = min(count, self._settings.K)
        selected = np.zeros(len(relevance), bool)
        selected[order[:count]] = True
        return selected

    def _forward(
        self,
        tokens: list[int],
        start: int,
        bias: np.ndarray | Callable[[int, list[np.ndarray]], np.ndarray | None] | None,
        *,
        record: bool = False,
        peek: bool = False,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits of tokens from position `start` on, and attention rows of the settings' heads without a bias.

        A peek goes no further than they do, and leaves nothing in the cache.

        Args:
          bias: of the keys' scores, or that of a layer when so many rows are recorded.
        """
        decoder, rows = self._decoder, list[np.ndarray]()
        wanted: dict[int, list[int]] = {}
        for layer, head in self._settings.heads:
            wanted.setdefault(layer, []).append(head)

        def attend(layer: int, q: Any, k: Any, v: Any, cache: Any) -> tuple[Any, Any]:
            for offset in range(len(tokens)):
                self._keys[layer][start + offset] = np.asarray(k[offset], np.float64)
                self._values[layer][start + offset] = np.asarray(v[offset], np.float64)
            known = start + len(tokens)
            keys = np.stack([self._keys[layer][position] for position in range(known)])
            values = np.stack([self._values[layer][position] for position in range(known)])
            group = q.shape[1] // keys.shape[1]
            keys, values = (np.repeat(one, group, axis=1) for one in (keys, values))
            scores = np.einsum("thd,shd->hts", np.asarray(q, np.float64), keys) / math.sqrt(q.shape[2])
            visible = np.arange(known)[None, :] <= start + np.arange(len(tokens))[:, None]
            plain = _softmax(np.where(visible, scores, -np.inf))
            if record:
                rows.extend(plain[head] for head in wanted.get(layer, ()))
            added = bias(layer, rows) if callable(bias) else bias
            weights = plain if added is None else _softmax(np.where(visible, scores + added, -np.inf))
            out = np.einsum("hts,shd->thd", weights, values)
            return jnp.asarray(out, q.dtype), cache

        x = decoder.embed(jnp.asarray(tokens))
        rope = decoder.rope(jnp.asarray(np.arange(start, start + len(tokens))))
        last = max(wanted) if peek else decoder.config.num_layers - 1
        for layer in range(last + 1):
            x, _ = decoder.layer(layer, x, rope, attend, None)
            if peek:
                for position in range(start, start + len(tokens)):
                    del self._keys[layer][position], self._values[layer][position]
        return np.zeros(0) if peek else np.asarray(decoder.head(x)), rows


def _mean(rows: Sequence[np.ndarray], position: int, number: int | None = None) -> np.ndarray:
    """Over heads, of what the token at a position looks at, in the row of its number in the pass."""
    mean: np.ndarray = np.mean([row[position if number is None else number, : position + 1] for row in rows], axis=0)
    return mean


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    normalised: np.ndarray = weights / weights.sum(axis=-1, keepdims=True)
    return normalised
