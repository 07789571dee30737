"""DySCO token by token over dense attention in float64: what the engine's decoding is compared with.

Written from the algorithm's description, with nothing of the engine: keys and values are plain arrays, layers are the
model's own, called one by one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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

    def run(self, prompt: Sequence[int], new_tokens: int) -> Trace:
        settings, trace = self._settings, Trace()
        length = len(prompt)
        first = max(length - settings.I - (1 if settings.C else 0), 0)
        relevance = np.zeros(0)
        rows = self._forward(list(prompt[:first]), 0, None, record=True)[1] if first else []
        for position in range(max(first - settings.C + 1, 0), first):
            relevance = self._blend(relevance, np.mean([row[position, : position + 1] for row in rows], axis=0))
            trace.observed.append(relevance)
        template = np.zeros(length, bool)
        for sequence in settings.template_sequences:
            for start in range(length - len(sequence) + 1):
                if list(prompt[start : start + len(sequence)]) == list(sequence):
                    template[start : start + len(sequence)] = True
        tokens, static = list(prompt), None
        for position in range(first, length + new_tokens - 1):
            if settings.dynamic:
                _, rows = self._forward([tokens[position]], position, None, record=True, peek=True)
                relevance = self._blend(relevance, np.mean([row[0, : position + 1] for row in rows], axis=0))
                selected = self._select(relevance)
            else:
                if static is None:
                    static = self._select(relevance)
                selected = np.zeros(position + 1, bool)
                selected[: len(static)] = static
            boosted = selected.copy()
            boosted[:length] &= ~template[: position + 1]
            boosted[position] = True
            bias = np.where(boosted, math.log(settings.beta), 0.0)
            logits, _ = self._forward([tokens[position]], position, bias)
            for kind, value in (
                (trace.logits, logits[0]),
                (trace.selected, selected),
                (trace.boosted, boosted),
                (trace.relevance, relevance),
            ):
                kind.append(value)
            if position >= length - 1:
                tokens.append(int(np.argmax(logits[0])))
        trace.generated = tokens[length:]
        return trace

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
        self, tokens: list[int], start: int, bias: np.ndarray | None, *, record: bool = False, peek: bool = False
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits of tokens from position `start` on, and attention rows of the settings' heads.

        A peek goes no further than they do, and leaves nothing in the cache.
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
            scores = np.where(visible, scores if bias is None else scores + bias, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            if record:
                rows.extend(weights[head] for head in wanted.get(layer, ()))
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
