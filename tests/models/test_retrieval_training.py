"""The retrieval model: its texts and windows, what is predicted of them, and what was shipped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.attention import dense_attend
from models.shapes import parameters_of, with_parameters
from models.training import tokenizer
from models.training.attention import blocked_attend
from models.training.data import Position
from models.training.recipes import RETRIEVAL_CONFIG, RETRIEVAL_RECIPE
from models.training.retrieval import (
    MODES,
    VOCAB_SIZE,
    WORDS,
    RetrievalStream,
    build_tokenizer,
    conversation,
    looked_up,
    words,
)
from models.training.retrieval_card import retrieval_card
from models.training.retrieval_init import planted
from models.training.step import losses
from models.training.train_retrieval import accuracy

SHIPPED = Path(models.__file__).parent / "shipped" / "retrieval"


def plain(window: np.ndarray) -> list[int]:
    return np.where(window < 0, ~window, window).tolist()


# Texts


def test_words_differ_and_are_one_token_each() -> None:
    assert len(set(WORDS)) == 512
    assert words() == WORDS
    assert all(re.fullmatch("[a-z]{4}", word) for word in WORDS)
    entries = build_tokenizer()
    assert entries.get_vocab_size() == VOCAB_SIZE
    tokens = [entries.encode(f" {word}").ids for word in (*WORDS, *MODES)]
    assert all(len(one) == 1 for one in tokens)
    assert len({one[0] for one in tokens}) == len(tokens)
    assert [entries.token_to_id(token) for token in tokenizer.SPECIAL_TOKENS] == [800, 801, 802]


@pytest.mark.parametrize("text", ["The code of dako is mive.\n", "größer, 漢字 \t\x00", "  x=1\n\n"])
def test_any_text_comes_back(text: str) -> None:
    entries = build_tokenizer()
    assert entries.decode(entries.encode(text).ids, skip_special_tokens=False) == text


def follow(lines: list[str], pattern: str) -> dict[str, tuple[str, ...]]:
    pairs = [re.fullmatch(pattern, line) for line in lines]
    return {match[1]: match.groups()[1:] for match in pairs if match}


def test_answers_follow_from_the_document() -> None:
    rng = np.random.default_rng(0)
    hops = routes = asked = 0
    for _ in range(60):
        turns = conversation(rng, 20)
        *document, first = turns[0][0].split("\n")
        assert len(document) >= 3
        codes = follow(document, r"The code of (\w+) is (\w+)\.")
        ways = follow(document, r"From (\w+) go to (\w+) by (\w+)\.")
        assert len(codes) + len(ways) == len(document)
        for question, answer in [(first, turns[0][1]), *turns[1:]]:
            if match := re.fullmatch(r"Which code is (\d) steps from (\w+)\?", question):
                key, lines = match[2], []
                for _ in range(int(match[1])):
                    lines.append(f"The code of {key} is {codes[key][0]}.")
                    key = codes[key][0]
                assert answer == "\n".join(lines)
                hops += 1
            elif match := re.fullmatch(r"Which route leads from (\w+) to (\w+)\?", question):
                place, lines = match[1], []
                while place != match[2]:
                    lines.append(f"From {place} go to {ways[place][0]} by {ways[place][1]}.")
                    place = ways[place][0]
                assert answer == "\n".join(["<Route>", *lines, "</Route>"])
                routes += 1
            else:
                keys = [word for word in re.findall(r"\w+", question) if word in codes]
                assert answer == "\n".join(f"The code of {key} is {codes[key][0]}." for key in keys)
                asked += 1
    assert min(hops, routes, asked) > 10


# Windows


def test_windows_follow_from_seed_and_position() -> None:
    entries = build_tokenizer()
    one, two = (RetrievalStream(entries, 3) for _ in range(2))
    first, position = one.batch(Position(0, 0, 64), 4)
    assert first.shape == (4, 65)
    assert position == Position(0, 4, 64)
    second, _ = one.batch(position, 4)
    np.testing.assert_array_equal(two.batch(position, 4)[0], second)
    np.testing.assert_array_equal(two.batch(Position(0, 0, 64), 4)[0], first)
    assert not np.array_equal(first, second)
    assert not np.array_equal(RetrievalStream(entries, 4).batch(Position(0, 0, 64), 4)[0], first)


def test_windows_of_conversations_predict_answers_alone() -> None:
    entries = build_tokenizer()
    windows, _ = RetrievalStream(entries, 0, drills=0).batch(Position(0, 0, 256), 8)
    for window in windows:
        tokens = plain(window)
        text = entries.decode(tokens, skip_special_tokens=False)
        assert entries.encode(text).ids == tokens  # as a server tokenizes the whole chat
        first, *_ = text.split("<|im_end|>\n")
        assert text.startswith(tokenizer.render_chat([{"role": "user", "content": first.partition("\n")[2]}]))
        predicted = entries.decode([token for token in window if token >= 0], skip_special_tokens=False)
        answers = re.findall(r"assistant\n(.*?(?:<\|im_end\|>|$))", text, re.DOTALL)
        assert predicted == "".join(answers)


def test_drills_predict_the_ends_of_lines_that_were_there() -> None:
    entries = build_tokenizer()
    windows, _ = RetrievalStream(entries, 0, drills=1).batch(Position(0, 0, 128), 8)
    for window in windows:
        lines = entries.decode(plain(window), skip_special_tokens=False).split("\n")
        assert len(set(lines[:-1])) < len(lines) - 1
        predicted = entries.decode([token for token in window if token >= 0], skip_special_tokens=False)
        seen: set[str] = set()
        expected = ""
        for line in lines[:-1]:
            if line in seen:
                expected += re.split(r"(?<=of \w{4})|(?<=From \w{4})", line)[1] + "\n"
            seen.add(line)
        assert predicted.startswith(expected)


def test_looked_up_tokens_are_predicted_words_and_modes() -> None:
    entries = build_tokenizer()
    ids = entries.encode(f"The code of {WORDS[0]} is {WORDS[1]}. by bus").ids
    windows = np.array([[*ids, *(~np.array(ids)).tolist()]], np.int32)
    chosen = looked_up(entries, windows)[0]
    assert [entries.decode([token]) for token in np.array([*ids, *ids])[chosen]] == [
        f" {WORDS[0]}",
        f" {WORDS[1]}",
        " bus",
    ]
    assert not chosen[len(ids) :].any()


# Steps


def test_only_tokens_that_are_predicted_count() -> None:
    model = models.init(replace(RETRIEVAL_CONFIG, num_layers=1), seed=0)
    windows, _ = RetrievalStream(build_tokenizer(), 0).batch(Position(0, 0, 64), 2)
    tokens = np.where(windows < 0, ~windows, windows)
    recipe = replace(RETRIEVAL_RECIPE, z_loss=0.5)
    total, cross_entropy = jax.jit(losses, static_argnums=(0, 1))(
        model.config, recipe, parameters_of(model), jnp.asarray(windows)
    )
    logits = np.asarray(model.logits(tokens[:, :-1]), np.float64)
    partition = np.log(np.exp(logits).sum(-1))
    chosen = windows[:, 1:] >= 0
    assert 0 < chosen.sum() < chosen.size / 2
    expected = np.mean((partition - np.take_along_axis(logits, tokens[:, 1:, None], 2)[..., 0])[chosen])
    assert float(cross_entropy) == pytest.approx(expected, rel=1e-5)
    assert float(total) == pytest.approx(expected + 0.5 * np.mean(partition[chosen] ** 2), rel=1e-5)


def attention_of(model: models.Decoder, tokens: np.ndarray) -> list[np.ndarray]:
    """`[heads, tokens, tokens]` of each layer."""
    found = []
    dense = dense_attend(1, len(tokens))

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: None) -> tuple[jax.Array, None]:
        keys = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)
        scores = jnp.einsum("qhd,khd->hqk", q, keys) / np.sqrt(q.shape[-1])
        found.append(np.asarray(jax.nn.softmax(jnp.where(np.tri(len(tokens)) > 0, scores, -jnp.inf))))
        return dense(layer, q, k, v, cache)

    model(jnp.asarray(tokens), jnp.arange(len(tokens)), attend, None)
    return found


def test_first_weights_look_back_and_match() -> None:
    entries = build_tokenizer()
    config = RETRIEVAL_CONFIG
    model = with_parameters(config, planted(config, parameters_of(models.init(config, seed=1)), seed=1))
    lines = [f"The code of {WORDS[place]} is {WORDS[-1 - place]}.\n" for place in range(20)]
    matched = []
    for asked in range(20):
        tokens = np.array(entries.encode("".join(lines) + f"The code of {WORDS[asked]} is").ids)
        first, second, _ = attention_of(model, tokens)
        for head, back in enumerate((1, 2, 3)):
            rows = np.arange(back, len(tokens))
            assert first[head, rows, rows - back].min() > 0.99
        (value,) = np.flatnonzero(tokens == entries.encode(f" {WORDS[-1 - asked]}").ids[0])
        matched.append(second[0, -1, value])
    assert np.mean(matched) > 0.1  # among 170 tokens; training makes it sharp
    with pytest.raises(ValueError, match="must have two layers or more"):
        planted(replace(config, num_layers=1), {}, seed=0)


def test_a_far_larger_score_of_a_later_key_changes_nothing() -> None:
    q, k, v = (jnp.ones((70, 1, 8)) for _ in range(3))
    k = k.at[69].set(1000.0)
    v = v.at[:, 0, 0].set(jnp.arange(70.0))
    out, _ = blocked_attend(1, 70)(0, q, k, v, None)
    expected, _ = dense_attend(1, 70)(0, q, k, v, None)
    np.testing.assert_allclose(out, expected, atol=1e-4)


class _Copier:
    """Predicts that each token comes again."""

    def logits(self, tokens: np.ndarray) -> jax.Array:
        return jax.nn.one_hot(tokens, 10)


def test_accuracy_is_of_the_chosen_tokens() -> None:
    windows = np.array([[1, 1, 2, 2, 3], [4, ~4, ~5, 6, 6]], np.int32)
    chosen = windows >= 0
    # Of 1, 2, 2, 3 and of 6, 6 behind the first one: right are 1, 2 and 6.
    assert accuracy(_Copier(), windows, chosen) == pytest.approx(3 / 6)


# What was shipped


def test_shipped_folder_is_complete_and_small() -> None:
    files = {file.name: file.stat().st_size for file in SHIPPED.iterdir()}
    assert files.keys() == {
        *tokenizer.FILES,
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "metrics.json",
        "README.md",
    }
    assert files["model.safetensors"] <= 3 << 20
    metrics = json.loads((SHIPPED / "metrics.json").read_text(encoding="utf-8"))
    assert (SHIPPED / "README.md").read_text(encoding="utf-8") == retrieval_card(metrics)
    assert tokenizer.load(SHIPPED).to_str() == build_tokenizer().to_str()
    model = models.load(SHIPPED, dtype="float32")
    assert model.config == RETRIEVAL_CONFIG
    assert sum(value.size for value in parameters_of(model).values()) == metrics["parameters"]


def test_shipped_model_looks_up_what_its_card_says() -> None:
    metrics = json.loads((SHIPPED / "metrics.json").read_text(encoding="utf-8"))
    model, entries = models.load(SHIPPED, dtype="float32"), tokenizer.load(SHIPPED)
    windows, _ = RetrievalStream(entries, 77, drills=0).batch(Position(0, 0, 256), 16)
    assert accuracy(model, windows, looked_up(entries, windows)) == pytest.approx(
        metrics["lookup_accuracy"]["256"], abs=0.06
    )
