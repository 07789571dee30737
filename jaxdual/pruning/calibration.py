"""Calibration text as rows of tokens, and perplexity on such rows."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from jaxdual.tokenizer import Tokenizer
from models import Decoder

SEQUENCES, LENGTH, HELD_OUT = 128, 2048, 8  # by default: windows, tokens of one, and windows that tell the perplexity


def split_windows(
    file: Path, tokenizer: Tokenizer, *, sequences: int, length: int | None, longest: int
) -> tuple[Int32[np.ndarray, "N L"], Int32[np.ndarray, "H L"]]:
    """Windows to choose by, and the `HELD_OUT` behind them, which only tell the perplexity.

    Args:
      file: UTF-8 text.
      tokenizer: of the model.
      sequences: windows to choose by.
      length: tokens of a window; None for `LENGTH`, or the model's context if that is shorter.
      longest: that context.

    Raises:
      ValueError: longer windows than the model was made for, or too little text.
    """
    length = length or min(LENGTH, longest)
    if length > longest:
        raise ValueError(f"--length {length} must be at most {longest}, for which the model was made")
    windows = read_windows(file, tokenizer, length)
    wanted = sequences + HELD_OUT
    if len(windows) < wanted:
        raise ValueError(
            f"--calibration {file}: {len(windows)} windows of {length} tokens; --sequences {sequences} and "
            f"{HELD_OUT} held out need {wanted}"
        )
    return windows[:sequences], windows[sequences:wanted]


def read_windows(file: Path, tokenizer: Tokenizer, length: int) -> Int32[np.ndarray, "N L"]:
    """All whole windows of a UTF-8 text, one after the other.

    Args:
      file: the text.
      tokenizer: of the model.
      length: tokens of a window.

    Raises:
      ValueError: no such text, or none that is long enough.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    tokens = np.array(tokenizer.encode(text), np.int32)
    if len(tokens) < length:
        raise ValueError(f"{file}: {len(tokens)} tokens; at least one window of {length} is needed")
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def finite_perplexity(model: Decoder, windows: Int32[np.ndarray, "N L"]) -> float:
    """`perplexity` of a model that is to be pruned.

    Raises:
      ValueError: it is no number: weights are missing, or not finite.
    """
    found = perplexity(model, windows)
    if not np.isfinite(found):
        raise ValueError(f"the model's perplexity before pruning is {found}; a model of finite weights is expected")
    return found


def perplexity(model: Decoder, windows: Int32[np.ndarray, "N L"]) -> float:
    """Of every token but the first of each window, after those before it in the window."""
    total = sum(float(_loss(jnp.asarray(model.logits(window[None])[0]), jnp.asarray(window))) for window in windows)
    return float(np.exp(total / (windows.size - len(windows))))


@jax.jit
def _loss(logits: Float32[Array, "L V"], tokens: Int32[Array, " L"]) -> Float32[Array, ""]:
    logprobs = jax.nn.log_softmax(logits[:-1], axis=-1)
    return -jnp.sum(jnp.take_along_axis(logprobs, tokens[1:, None], axis=1))
