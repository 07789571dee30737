"""What a model makes of questions, one pass each: its answers, its hidden states, and how sure it is."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from jaxdual.cascade.evaluation.item_prompts import Form
from jaxdual.cascade.evaluation.items import Split
from jaxdual.cascade.evaluation.ledger import TierCosts
from jaxdual.cascade.evaluation.rules import letter_probabilities
from jaxdual.cascade.gate import Confidence, PtMode
from jaxdual.cascade.work import LayerSizes

FORMAT_VERSION = 1
_HEADER = "header"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Of which model signals are, and how they were taken.

    Attributes:
      model: its name.
      folder: where it lay.
      fingerprint: `model_fingerprint` in `dtype`, in hexadecimal.
      dtype: that it computed in.
      sizes: parameters of its layers, parted at the tap.
      hidden_size: of its states.
      form: of its prompts.
      kind, tokens: of `Confidence`.
      items: file of the questions.
    """

    model: str
    folder: str
    fingerprint: str
    dtype: str
    sizes: LayerSizes
    hidden_size: int
    form: Form
    kind: Literal["choices", "opening"]
    tokens: tuple[tuple[int, ...], ...]
    items: str

    def confidence(self, mode: PtMode = "full", temperature: float = 1.0) -> Confidence:
        """What P(T) is read from.

        Raises:
          ValueError: a mode or temperature that this kind has not.
        """
        return Confidence(self.kind, self.tokens, mode, temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """Of `N` questions; all arrays have them in the same order.

    Attributes:
      header: of which model.
      ids, subjects, splits: texts.
      given, right: letters or short answers; right is "" where no choice is.
      correct: whether the model is right.
      hidden: `[N, D]` float32, residual stream behind the tap layer at the prompt's last token.
      logprobs: `[N, places, variants]` float32, over the whole vocabulary, of the tokens of each letter at the first
        position of the answer, or of the tokens at each position of an opening; -inf where there is none, and one of 0
        at positions behind the token with which an output leaves the opening.
      prompt_tokens, output_tokens: `[N]`.
      judged_tokens: `[N]`, of the output, that P(T) is read from.
      seconds: `[N]`, of the pass, its batch's time divided among its questions.
      p_true: `[N]`, of a pass of its own (Kadavath et al. 2022); None if it was not taken.
      p_true_tokens: `[N]`, of that pass.
    """

    header: Header
    ids: np.ndarray
    subjects: np.ndarray
    splits: np.ndarray
    given: np.ndarray
    right: np.ndarray
    correct: Bool[np.ndarray, " N"]
    hidden: Float32[np.ndarray, "N D"]
    logprobs: Float32[np.ndarray, "N places variants"]
    prompt_tokens: Int[np.ndarray, " N"]
    output_tokens: Int[np.ndarray, " N"]
    judged_tokens: Int[np.ndarray, " N"]
    seconds: Float[np.ndarray, " N"]
    p_true: Float[np.ndarray, " N"] | None = None
    p_true_tokens: Int[np.ndarray, " N"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def taken(self, chosen: np.ndarray) -> Signals:
        """Those of some questions, by indices or a mask."""
        arrays = {name: value[chosen] for name, value in self._arrays().items()}
        return dataclasses.replace(self, **arrays)

    def of(self, split: Split) -> Signals:
        """Those of one split.

        Raises:
          ValueError: there are none.
        """
        chosen = self.splits == split
        if not chosen.any():
            raise ValueError(f"signals of {self.header.model} have no {split} questions")
        return self.taken(chosen)

    def costs(self, *, price_in: float = 0.0, price_out: float = 0.0) -> TierCosts:
        """What passes of these questions take."""
        return TierCosts(
            name=self.header.model,
            sizes=self.header.sizes,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            judged_tokens=self.judged_tokens,
            seconds=self.seconds,
            price_in=price_in,
            price_out=price_out,
        )

    def letters(self, mode: PtMode = "full", temperature: float = 1.0) -> Float[np.ndarray, "N letters"]:
        """Probability of each letter.

        Raises:
          ValueError: questions without choices.
        """
        if self.header.kind != "choices":
            raise ValueError("questions with short answers have no letters")
        return letter_probabilities(self.logprobs, mode, temperature)

    def save(self, path: Path) -> None:
        """Writes an `.npz` file, whole or not at all."""
        header = {"version": FORMAT_VERSION, **dataclasses.asdict(self.header)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.npz")
        arrays: dict[str, Any] = self._arrays() | {_HEADER: np.array(json.dumps(header))}
        np.savez_compressed(partial, **arrays)
        partial.replace(path)

    def _arrays(self) -> dict[str, np.ndarray]:
        names = [field.name for field in dataclasses.fields(self) if field.name != _HEADER]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def read_signals(path: Path) -> Signals:
    """Reads a file of `Signals.save`.

    Raises:
      ValueError: no such file, or none of signals; the message names it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: can't be read as signals ({error})") from None
    try:
        about = json.loads(str(arrays.pop(_HEADER)))
        if about["version"] != FORMAT_VERSION:
            raise ValueError(f"its format is version {about['version']}; this is version {FORMAT_VERSION}")
        lengths = {len(value) for value in arrays.values()}
        if len(lengths) != 1:
            raise ValueError(f"its arrays have {sorted(lengths)} rows")
        found = Signals(header=_header(about), **arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no usable file of signals ({type(error).__name__}: {error})") from None
    return found


def check_same_questions(tiers: list[Signals]) -> None:
    """Makes sure that tiers were asked the same questions, in the same order and split alike.

    Raises:
      ValueError: they were not.
    """
    first = tiers[0]
    for other in tiers[1:]:
        for name in ("ids", "splits", "right"):
            one, two = getattr(first, name), getattr(other, name)
            if len(one) != len(two) or not (one == two).all():
                raise ValueError(f"{first.header.model} and {other.header.model} have signals of different {name}")
        if first.header.kind != other.header.kind:
            raise ValueError(f"signals are of {first.header.kind} and of {other.header.kind}")


def _header(about: Mapping[str, Any]) -> Header:
    fields = {key: value for key, value in about.items() if key != "version"}
    return Header(
        **fields | {"sizes": LayerSizes(**about["sizes"]), "tokens": tuple(tuple(place) for place in about["tokens"])}
    )
