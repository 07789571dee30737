"""Signals of models, against runs of one question alone without padding."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdual.cascade.evaluation.collect import Reader, collect
from jaxdual.cascade.evaluation.item_prompts import prompt_of
from jaxdual.cascade.evaluation.items import Item, item_of
from jaxdual.cascade.evaluation.rules import p_t_of
from jaxdual.cascade.evaluation.signals import Signals, check_same_questions, read_signals
from jaxdual.cascade.gate import Confidence, Gate
from jaxdual.cascade.work import LayerSizes
from jaxdual.engine.judge import Judge
from jaxdual.tokenizer import Tokenizer
from models import Decoder, load
from models.attention import dense_attend
from models.fingerprint import model_fingerprint
from models.shapes import active_parameters, parameters_of
from models.training import quiz
from tests.cascade.evaluation import quiz_models

LAYERS, TAP = 2, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quiz_models.write(tmp_path_factory.mktemp("models") / "tiny", num_layers=LAYERS)


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    return load(folder, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [item_of(one.record(number), "") for number, one in enumerate(quiz.questions(7, 21))]


def signals(folder: Path, model: Decoder, tokenizer: Tokenizer, items: list[Item], **options: object) -> Signals:
    arguments = {"source": "items", "tap": TAP, "form": "chat", "batch": 8} | options
    return collect(folder, "tiny", model, tokenizer, items, ["test"] * len(items), **arguments)


@pytest.fixture(scope="module")
def taken(folder: Path, model: Decoder, tokenizer: Tokenizer, items: list[Item]) -> Signals:
    return signals(folder, model, tokenizer, items)


@partial(jax.jit, static_argnums=0)
def _alone(graphdef: Any, state: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, state)
    x, rope = model.embed(tokens), model.rope(jnp.arange(len(tokens)))
    for index in range(TAP):
        x, _ = model.layer(index, x, rope, dense_attend(1, len(tokens)), None)
    return x[-1], jax.nn.log_softmax(model.dense_logits(tokens[None])[0, -1])


def alone(model: Decoder, prompt: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of the last token of a prompt by itself: the state behind the tap, and all log-probabilities."""
    state, logprobs = _alone(*nnx.split(model), jnp.asarray(prompt))
    return np.asarray(state), np.asarray(logprobs)


def test_padding_and_batches_change_nothing(
    model: Decoder, tokenizer: Tokenizer, items: list[Item], taken: Signals
) -> None:
    for place, item in enumerate(items[:9]):
        prompt = prompt_of(tokenizer, item, "chat")
        state, logprobs = alone(model, prompt)
        np.testing.assert_allclose(taken.hidden[place], state, atol=1e-5)
        for letter, tokens in enumerate(taken.header.tokens):
            np.testing.assert_allclose(taken.logprobs[place, letter], logprobs[list(tokens)], atol=1e-5)
        assert taken.prompt_tokens[place] == len(prompt)
        shares = [np.exp(logprobs[list(tokens)]).sum() for tokens in taken.header.tokens]
        assert taken.given[place] == "ABCD"[int(np.argmax(shares))]
        assert taken.correct[place] == (int(np.argmax(shares)) == item.answer)
        assert taken.right[place] == "ABCD"[item.answer]


def test_prompts_of_any_length_give_what_they_give_alone(model: Decoder) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, quiz.VOCAB_SIZE, length).tolist() for length in (17, 1, 16, 1, 16, 17, 17)]
    found = Reader(model, TAP, batch=4).read(prompts, [5, 9])
    for place, prompt in enumerate(prompts):
        state, logprobs = alone(model, prompt)
        np.testing.assert_allclose(found.hidden[place], state, atol=1e-5)
        np.testing.assert_allclose(found.logprobs[place], logprobs[[5, 9]], atol=1e-5)
        assert found.likeliest[place] == logprobs.argmax()
        # Wrong rows would show: no two prompts have like states.
        assert np.abs(found.hidden - found.hidden[place]).max(axis=1)[np.arange(len(prompts)) != place].min() > 1e-2


def test_prompts_must_fit(model: Decoder) -> None:
    for prompts in ([[1] * 257], [[1], []]):
        with pytest.raises(ValueError, match="1 to 256 can be read"):
            Reader(model, TAP).read(prompts, [1])


def test_a_file_gives_back_the_signals(tmp_path: Path, folder: Path, taken: Signals) -> None:
    taken.save(tmp_path / "signals.npz")
    found = read_signals(tmp_path / "signals.npz")
    assert found.header == taken.header
    assert found.header.fingerprint == model_fingerprint(folder, "float32").hex()
    for field in dataclasses.fields(Signals):
        if field.name != "header":
            np.testing.assert_array_equal(getattr(found, field.name), getattr(taken, field.name))
    assert [one.name for one in tmp_path.iterdir()] == ["signals.npz"]


def test_files_that_are_no_signals_are_refused(tmp_path: Path, taken: Signals) -> None:
    file = tmp_path / "signals.npz"
    with pytest.raises(ValueError, match=r"signals.npz: can't be read"):
        read_signals(file)
    file.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"signals.npz: can't be read"):
        read_signals(file)
    np.savez(file, hidden=np.zeros(3))
    with pytest.raises(ValueError, match=r"signals.npz: is no usable file of signals"):
        read_signals(file)
    taken.save(file)
    with np.load(file) as whole:
        arrays = dict(whole)
    np.savez(file, **arrays | {"correct": arrays["correct"][:-1]})
    with pytest.raises(ValueError, match=r"signals.npz: is no usable file of signals.*\[20, 21\] rows"):
        read_signals(file)


def test_questions_without_a_right_choice_are_never_right(folder: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    items = [item_of(one.record(number), "") for number, one in enumerate(quiz.questions_without_answer(7, 5))]
    found = signals(folder, model, tokenizer, items)
    assert not found.correct.any()
    assert set(found.right) == {""}


def test_questions_of_fewer_choices_have_fewer_letters(folder: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    items = [Item(str(count), "Which?", tuple("wxyz"[:count]), 0, "letters") for count in (2, 4, 3) * 4]
    items = [dataclasses.replace(item, id=str(place)) for place, item in enumerate(items)]
    found = signals(folder, model, tokenizer, items, form="text")
    for place, item in enumerate(items):
        assert "ABCD".index(found.given[place]) < len(item.choices)
        assert np.isneginf(found.logprobs[place, len(item.choices) :]).all()
        assert np.isfinite(found.logprobs[place, : len(item.choices)]).all()


def test_short_answers_are_greedy_and_their_opening_is_watched(
    folder: Path, model: Decoder, tokenizer: Tokenizer
) -> None:
    items = [item_of(one.record(place), "") for place, one in enumerate(quiz.questions(7, 2, short=True))]
    found = signals(folder, model, tokenizer, items, max_output=3)
    ((*opening,),) = found.header.tokens
    for place, item in enumerate(items):
        sequence = prompt_of(tokenizer, item, "chat")
        np.testing.assert_allclose(found.logprobs[place, 0], alone(model, sequence)[1][opening], atol=1e-5)
        output: list[int] = []
        while len(output) < 3 and not (output and output[-1] in model.config.eos_token_ids):
            output.append(int(alone(model, sequence + output)[1].argmax()))
        ends = model.config.eos_token_ids
        assert found.output_tokens[place] == len(output)
        text = tokenizer.decode([token for token in output if token not in ends])
        assert found.given[place] in text
        assert found.right[place] == item.answer
    with pytest.raises(ValueError, match="no letters"):
        found.letters()


def test_an_output_that_leaves_the_opening_is_judged_as_engines_judge_it(
    folder: Path, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [item_of(one.record(place), "") for place, one in enumerate(quiz.questions(7, 20, short=True))]
    opens = {int(alone(model, prompt_of(tokenizer, item, "chat"))[1].argmax()): item for item in every}
    items = list(opens.values())[:2]
    prompts = [prompt_of(tokenizer, item, "chat") for item in items]
    outputs: list[list[int]] = [[], []]
    for prompt, output in zip(prompts, outputs, strict=True):
        for _ in range(2):
            output.append(int(alone(model, prompt + output)[1].argmax()))
    # The first answer has all of this opening, the second leaves it at once.
    other = next(token for token in range(5, 99) if token not in (outputs[0][0], outputs[1][0]))
    opening = ((outputs[0][0], other), (outputs[0][1],))
    assert outputs[1][0] not in opening[0]
    confidence = Confidence("opening", opening)
    monkeypatch.setattr("jaxdual.cascade.evaluation.collect.confidence_of", lambda *_: confidence)
    found = signals(folder, model, tokenizer, items, max_output=2)
    for place, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        judge = Judge(Gate(confidence, uses_probe=False))
        verdict, judged = None, 0
        while verdict is None:
            logprobs = alone(model, prompt + output[:judged])[1][list(opening[judged])].tolist()
            verdict = judge.after_token(output[judged], logprobs, last=False)
            judged += 1
        assert found.judged_tokens[place] == judged == 2 - place
        assert p_t_of(confidence, found.logprobs)[place] == pytest.approx(verdict.p_t, rel=1e-4)


def test_p_true_takes_one_more_pass(folder: Path, model: Decoder, tokenizer: Tokenizer, items: list[Item]) -> None:
    found = signals(folder, model, tokenizer, items[:4], p_true=True)
    assert ((found.p_true > 0) & (found.p_true < 1)).all()
    assert (found.p_true_tokens > found.prompt_tokens).all()
    short = [Item("1", "Who?", (), "me", "people")]
    with pytest.raises(ValueError, match="with choices"):
        signals(folder, model, tokenizer, short, p_true=True, max_output=1)


def test_sizes_are_parameters_of_layers_below_and_above_the_tap(model: Decoder, taken: Signals) -> None:
    sizes = LayerSizes.of(active_parameters(model.config), TAP)
    parameters = {name: value.size for name, value in parameters_of(model).items()}
    layers = [sum(size for name, size in parameters.items() if name.startswith(f"layers.{i}.")) for i in range(LAYERS)]
    assert sizes == taken.header.sizes == LayerSizes(sum(layers[:TAP]), layers[TAP], LAYERS, TAP)
    others = sum(size for name, size in parameters.items() if not name.startswith("layers."))
    assert sizes.parameters + others == sum(parameters.values())


def test_tap_must_be_a_layer(folder: Path, model: Decoder, tokenizer: Tokenizer, items: list[Item]) -> None:
    with pytest.raises(ValueError, match="tap=3 must be 1 to 2"):
        signals(folder, model, tokenizer, items, tap=3)


def test_tiers_must_have_been_asked_the_same(taken: Signals) -> None:
    check_same_questions([taken, taken])
    with pytest.raises(ValueError, match="different ids"):
        check_same_questions([taken, taken.taken(np.arange(len(taken))[::-1])])
    with pytest.raises(ValueError, match="have no train questions"):
        taken.of("train")
