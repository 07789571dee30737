"""The questions of the benchmark, and what the two quiz models make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxdual.cascade.evaluation.collect import collect
from jaxdual.cascade.evaluation.item_prompts import Form
from jaxdual.cascade.evaluation.items import Item, Split, item_of, split_items
from jaxdual.cascade.evaluation.signals import Signals, read_signals
from jaxdual.cascade.probe import default_tap
from jaxdual.tokenizer import Tokenizer
from models import Decoder, load
from models.fingerprint import model_fingerprint
from models.training import quiz

MULTIPLE_CHOICE, SHORT, NONE_RIGHT, UNKNOWN_TOWNS = "multiple choice", "short answers", "none right", "unknown towns"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is asked.

    Attributes:
      models: folders, the smaller first.
      asked: multiple-choice questions, a tenth of them each for validation and for test.
      short: questions with short answers, split alike.
      others: questions of each other kind, all of them test questions.
      form: of prompts.
      seeds: of probes; the first one's is the one whose figures are told in full.
      rate, epochs: of their training.
      p_true: whether P(True) is asked of multiple-choice test questions.
    """

    models: tuple[Path, Path]
    asked: int = 50_000
    short: int = 20_000
    others: int = 2_000
    form: Form = "chat"
    seeds: tuple[int, ...] = (42, 43, 44, 45, 46)
    rate: float = 1e-3
    epochs: int = 30
    p_true: bool = True


@dataclass(frozen=True, slots=True)
class Asked:
    """Items of one kind and their splits."""

    name: str
    items: Sequence[Item]
    splits: Sequence[Split]


def questions(setting: Setting) -> list[Asked]:
    """All questions; they follow from `quiz.ASKED_SEED` alone, which was fixed before the models were trained."""
    seed = quiz.ASKED_SEED
    kinds = {
        MULTIPLE_CHOICE: quiz.questions(seed, setting.asked),
        SHORT: quiz.questions(seed, setting.short, short=True),
        NONE_RIGHT: quiz.questions_without_answer(seed, setting.others),
        UNKNOWN_TOWNS: quiz.questions_about_unknown_towns(seed, setting.others),
    }
    found = []
    for name, some in kinds.items():
        items = [item_of(one.record(number), "") for number, one in enumerate(some)]
        splits: Sequence[Split] = split_items(items) if name in (MULTIPLE_CHOICE, SHORT) else ["test"] * len(items)
        found.append(Asked(name, items, splits))
    return found


class Reader:
    """Signals of one model over kinds of questions, kept in a folder from run to run.

    Args:
      folder: of the model.
      form: of prompts.
      kept: folder of signals.
    """

    def __init__(self, folder: Path, form: Form, kept: Path) -> None:
        self._folder, self._form, self._kept = folder, form, kept
        self._model: Decoder = load(folder, dtype="float32")
        self._tokenizer = Tokenizer.from_dir(folder)
        self._fingerprint = model_fingerprint(folder, "float32").hex()

    @property
    def layers(self) -> int:
        """Of the model."""
        layers: int = self._model.config.num_layers
        return layers

    def read(self, asked: Asked, tap: int | None = None) -> Signals:
        """Signals over questions; taken, unless they were kept."""
        tap = tap or default_tap(self.layers)
        source = f"{asked.name}, {len(asked.items)}, seed {quiz.ASKED_SEED}"
        file = self._kept / f"{self._folder.name}-{asked.name.replace(' ', '-')}-{len(asked.items)}-tap{tap}.npz"
        if file.is_file():
            kept = read_signals(file)
            wanted = (self._fingerprint, source, self._form, tap)
            if (kept.header.fingerprint, kept.header.items, kept.header.form, kept.header.sizes.tap) == wanted:
                return kept
        with tqdm(total=len(asked.items), unit=" questions", desc=f"{self._folder.name}, {asked.name}") as bar:
            signals = collect(
                self._folder,
                self._folder.name,
                self._model,
                self._tokenizer,
                asked.items,
                asked.splits,
                source=source,
                tap=tap,
                form=self._form,
                batch=256,
                max_output=8,
                done=bar.update,
            )
        signals.save(file)
        return signals

    def with_p_true(self, signals: Signals, asked: Asked) -> Signals:
        """The same signals of test questions, with P(True)."""
        places = np.flatnonzero(signals.splits == "test")
        items = [asked.items[place] for place in places.tolist()]
        splits: list[Split] = ["test"] * len(items)
        taken = collect(
            self._folder,
            self._folder.name,
            self._model,
            self._tokenizer,
            items,
            splits,
            source=signals.header.items,
            tap=signals.header.sizes.tap,
            form=self._form,
            batch=256,
            p_true=True,
        )
        return dataclasses.replace(signals.of("test"), p_true=taken.p_true, p_true_tokens=taken.p_true_tokens)


def facts(items: Sequence[Item]) -> np.ndarray:
    """Of each question the fact that it is about, as text."""
    return np.array([item.question for item in items])
