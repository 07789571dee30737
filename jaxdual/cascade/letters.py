"""The tokens that stand for letters and openings: what `Confidence` needs of a tokenizer."""

from __future__ import annotations

from jaxdual.cascade.gate import Confidence
from jaxdual.cascade.options import ConfidenceSpec
from jaxdual.tokenizer import Tokenizer


def confidence_of(spec: ConfidenceSpec, tokenizer: Tokenizer, tier: str, temperature: float = 1.0) -> Confidence:
    """What P(T) is read from, in the tokens of one model.

    A letter is "A" and " A", as far as each is one token; which of them a model says depends on what the prompt ends
    with. An opening is the tokens of its text; its first one may have a blank before it, where the rest is the same.

    Args:
      spec: what it is read from.
      tokenizer: the model's.
      tier: its name, for errors.
      temperature: of the letters' own distribution; without effect in other modes.

    Raises:
      ValueError: a letter that is no single token, or two letters that are the same one.
    """
    if spec.kind == "opening":
        return Confidence("opening", _opening_tokens(spec.opening, tokenizer))
    letters = tuple(_letter_tokens(letter, tokenizer, tier) for letter in spec.letters)
    seen: dict[int, str] = {}
    for letter, tokens in zip(spec.letters, letters, strict=True):
        for token in tokens:
            if token in seen:
                raise ValueError(f"tier {tier!r}: {seen[token]!r} and {letter!r} are the same token, {token}")
            seen[token] = letter
    scaled = temperature if spec.mode == "choices" else 1.0
    return Confidence("choices", letters, spec.mode, scaled)


def _letter_tokens(letter: str, tokenizer: Tokenizer, tier: str) -> tuple[int, ...]:
    variants = [tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}")]
    tokens = dict.fromkeys(ids[0] for ids in variants if len(ids) == 1)
    if not tokens:
        raise ValueError(
            f"tier {tier!r}: the letter {letter!r} is no single token of its tokenizer, with or without a blank before "
            f"it (it is {variants[0]} and {variants[1]})"
        )
    return tuple(tokens)


def _opening_tokens(opening: str, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    plain, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in (opening, f" {opening}"))
    first = dict.fromkeys((plain[0], *(spaced[:1] if spaced[1:] == plain[1:] else ())))
    return (tuple(first), *((token,) for token in plain[1:]))
