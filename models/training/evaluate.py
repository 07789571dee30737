"""Bits per byte of a saved model on held-out files, and trivial compressors to compare with."""

import lzma
import math
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32
from tokenizers import Tokenizer

from models.training.tokenizer import END_OF_TEXT, IM_END

WINDOW = 1024
STRIDE = 512
_ROWS = 4


@runtime_checkable
class Scorer(Protocol):
    """What is measured: a `Decoder`, or anything else with its ``logits``."""

    def logits(self, tokens: Int32[np.ndarray, "B L"]) -> Float32[Array, "B L V"]:
        """Logits at every position of whole sequences."""


def bits_per_byte(
    model: Scorer,
    tokenizer: Tokenizer,
    texts: Mapping[str, str],
    window: int = WINDOW,
    stride: int = STRIDE,
    rows: int = _ROWS,
) -> float:
    """Bits that the model needs for the texts, by their UTF-8 bytes.

    Every text stands alone behind one ``<|endoftext|>``. Windows of ``window`` tokens begin every ``stride`` tokens;
    a token is scored in the first window that predicts it: with at least ``window - stride`` tokens of context, but
    for the beginning of a text. The end of a text is not scored.

    Args:
        model: computes the logits.
        tokenizer: the model's.
        texts: path -> text.
        window, stride: in tokens; ``stride`` at most ``window``.
        rows: windows of one call.

    Raises:
        ValueError: no text, ``stride`` out of range, or a tokenizer without ``<|endoftext|>``.
    """
    size = sum(len(text.encode()) for text in texts.values())
    if not size:
        raise ValueError("texts: empty")
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride}: must be 1 to window={window}")
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"tokenizer has no {END_OF_TEXT}")
    encodings = tokenizer.encode_batch_fast(list(texts.values()))
    windows = [item for encoding in encodings for item in _windows([end, *encoding.ids], window, stride, end)]
    nats = 0.0
    for first in range(0, len(windows), rows):
        chunk = windows[first : first + rows]
        # The last call keeps the shape of the others, with rows that score nothing.
        chunk += [(chunk[0][0], np.zeros(window, bool))] * (rows - len(chunk))
        tokens = np.stack([tokens for tokens, _ in chunk])
        scored = np.stack([mask for _, mask in chunk])
        nats += float(_nats(model.logits(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), jnp.asarray(scored)))
    return nats / math.log(2) / size


def complete(model: Scorer, tokenizer: Tokenizer, prompt: str, new_tokens: int, pad: int = 192) -> str:
    """Greedy continuation by full forward passes; stops at ``<|im_end|>`` or ``<|endoftext|>``.

    Args:
        model: computes the logits.
        tokenizer: the model's.
        prompt: special-token text in it counts as special tokens.
        new_tokens: most tokens to add.
        pad: length of every pass; prompt and new tokens must fit.

    Raises:
        ValueError: they do not fit.
    """
    ids = tokenizer.encode(prompt).ids
    if not 0 < len(ids) <= pad - new_tokens:
        raise ValueError(f"prompt has {len(ids)} tokens: must be 1 to pad - new_tokens = {pad - new_tokens}")
    stops = {tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(IM_END)}
    start = len(ids)
    for _ in range(new_tokens):
        logits = model.logits(np.array([ids + [0] * (pad - len(ids))], np.int32))
        token = int(jnp.argmax(logits[0, len(ids) - 1]))
        if token in stops:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[start:]))


def baselines(train: Mapping[str, str], heldout: Mapping[str, str]) -> dict[str, float]:
    """Bits per byte of the held-out text without a model.

    ``unigram``: byte frequencies of the training text. ``lzma_alone``: xz, strongest preset, of the held-out text.
    ``lzma_after_train``: how much longer the compressed training text becomes with the held-out text behind it.
    """
    before, after = ("\n".join(texts.values()).encode() for texts in (train, heldout))
    counts = np.bincount(np.frombuffer(before, np.uint8), minlength=256) + 1
    bits = -np.log2(counts / counts.sum())
    preset = 9 | lzma.PRESET_EXTREME
    grown = len(lzma.compress(before + after, preset=9)) - len(lzma.compress(before, preset=9))
    return {
        "unigram": float(bits[np.frombuffer(after, np.uint8)].mean()),
        "lzma_alone": 8 * len(lzma.compress(after, preset=preset)) / len(after),
        "lzma_after_train": 8 * grown / len(after),
    }


def _windows(ids: list[int], window: int, stride: int, pad: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows of ``window + 1`` tokens, and which of the ``window`` predictions count."""
    done = 1
    for start in range(0, max(1, len(ids) - 1), stride):
        tokens = ids[start : start + window + 1]
        scored = np.zeros(window, bool)
        scored[done - start - 1 : len(tokens) - 1] = True
        done = start + len(tokens)
        yield np.array(tokens + [pad] * (window + 1 - len(tokens)), np.int32), scored
        if done >= len(ids):
            return


@jax.jit
def _nats(
    logits: Float32[Array, "B L V"], targets: Int32[Array, "B L"], scored: Bool[Array, "B L"]
) -> Float32[Array, ""]:
    correct = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[:, :, 0]
    return jnp.sum(jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - correct, 0))
