"""Prompts of a trace: random tokens that are the same in every run."""

import hashlib
from collections.abc import Sequence

import numpy as np

from jaxdual.offline.trace import Session

# Blocks and turns draw from streams of their own, whatever their numbers.
_BLOCKS, _TURNS = 0, 1


class PromptTokens:
    """Makes the prompts of a trace.

    Args:
      vocab_size: tokens are below it.
      seed: with another one, all tokens are others.
    """

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size = vocab_size
        self._seed = seed

    def prompt(self, session: Session, number: int, context: Sequence[int]) -> list[int]:
        """The prompt of a turn.

        Args:
          session: it belongs to.
          number: of the turn, from 0.
          context: all tokens appended, generated and not dropped before.

        Returns:
          The context without what the turn drops, and its new tokens. These are a function of their block ids and
          positions, or, where there are none, of the session's id and the turn's number.
        """
        turn = session.turns[number]
        kept = list(context[: len(context) - turn.drop])
        if turn.block_ids:
            return kept + self._blocks(turn.block_ids, session.block_tokens, len(kept), len(kept) + turn.append)
        digest = hashlib.blake2b(session.session_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return kept + self._draw(turn.append, _TURNS, int.from_bytes(digest, "little"), number)

    def _blocks(self, ids: Sequence[int], block_tokens: float, start: int, end: int) -> list[int]:
        """Tokens `start` to `end` of the text that the blocks make; the last block has no end."""
        tokens: list[int] = []
        bounds = [round(index * block_tokens) for index in range(len(ids))] + [end]
        for index, block in enumerate(ids):
            low, high = max(start, bounds[index]), min(end, bounds[index + 1])
            if low < high:
                tokens += self._draw(high - bounds[index], _BLOCKS, block)[low - bounds[index] :]
        return tokens

    def _draw(self, count: int, *key: int) -> list[int]:
        """Random tokens; a longer draw begins with a shorter one's."""
        tokens: list[int] = np.random.default_rng((self._seed, *key)).integers(self._vocab_size, size=count).tolist()
        return tokens
