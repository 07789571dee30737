"""Requests whose way through the routers is counted: those of a batch file, and random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxdual.api import LLM
from jaxdual.config import ConfigError
from jaxdual.offline.batch_file import read_batch
from jaxdual.offline.display import Progress
from jaxdual.offline.runner import BatchRunner, Totals
from jaxdual.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a workload's requests.

    Attributes:
      ok, failed: requests.
      problem: of the first one that failed; "" without any.
    """

    ok: int
    failed: int = 0
    problem: str = ""


class Workload(Protocol):
    """Requests."""

    def check(self, llm: LLM) -> None:
        """Raises `ConfigError` if the model can't serve them at all."""

    def run(self, llm: LLM) -> Served:
        """Has them served."""


@dataclass(frozen=True, slots=True)
class BatchWorkload:
    """The lines of a file of OpenAI batch requests.

    Attributes:
      path: of the file.
      lines: that it has.
      progress: whether a bar is shown.
    """

    path: Path
    lines: int
    progress: bool

    def check(self, llm: LLM) -> None:
        """Each line is checked when its turn comes."""

    def run(self, llm: LLM) -> Served:
        rows = _Dropped()
        with Progress(self.lines, 0, self.progress) as progress:

            def show(totals: Totals) -> None:
                progress.show(totals, llm.stats().generation_tokens)

            totals = BatchRunner(llm, rows, 0, show).run(read_batch(self.path))
        return Served(totals.ok, totals.failed, rows.problem)


@dataclass(frozen=True, slots=True)
class RandomWorkload:
    """Requests of random tokens, all of one length, whose outputs have one length, too.

    Attributes:
      requests: how many.
      input_len, output_len: tokens of each.
      seed: with another one, all tokens are others.
      progress: whether a bar is shown.
    """

    requests: int
    input_len: int
    output_len: int
    seed: int
    progress: bool

    def check(self, llm: LLM) -> None:
        if self.input_len + self.output_len > llm.max_model_len:
            raise ConfigError(
                f"random requests of {self.input_len} tokens with outputs of {self.output_len} are longer than the "
                f"{llm.max_model_len} of max_model_len"
            )

    def run(self, llm: LLM) -> Served:
        tokens = np.random.default_rng(self.seed).integers(llm.info.vocab_size, size=(self.requests, self.input_len))
        params = SamplingParams(max_tokens=self.output_len, temperature=0, ignore_eos=True)
        llm.generate([{"prompt_token_ids": prompt} for prompt in tokens.tolist()], params, use_tqdm=self.progress)
        return Served(self.requests)


class _Dropped:
    """Rows that nobody wants, but for the first error."""

    def __init__(self) -> None:
        self.done: tuple[str, ...] = ()
        self.problem = ""

    def append(self, row: dict[str, Any]) -> None:
        if row["error"] is not None and not self.problem:
            self.problem = row["error"]["message"]
