"""The long-context evaluation: its arms, intervals and figures, and the command on a model of random weights."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import models
from bench.longcontext import __main__ as command
from bench.longcontext.arms import ARMS, RANDOM_SEEDS, Setting, with_selection
from bench.longcontext.heads import detect_heads
from bench.longcontext.intervals import Figure, compare
from bench.longcontext.items import Ratio
from bench.longcontext.prompts import Prompts
from bench.longcontext.selections import selection_figures
from bench.longcontext.tasks import TASKS
from bench.longcontext.uniform import scaled_copy
from jaxdual import LLM, DyscoParams, SelectionStep
from models.layers import Attend
from models.training import tokenizer
from models.training.retrieval import build_tokenizer
from models.training.train import write_folder


def tiny_config(family: str = "qwen3") -> models.ModelConfig:
    size = build_tokenizer().get_vocab_size()
    return models.ModelConfig(
        family=family,
        vocab_size=size,
        hidden_size=32,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        eos_token_ids=(size - 1, size - 3),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer.save(build_tokenizer(), path)
    write_folder(models.init(tiny_config(), seed=1), path)
    return path


# Arms


def test_arms_differ_in_what_they_raise() -> None:
    setting = Setting([(1, 0), (1, 2)], 2, 4, seed=0, limits={"strength": 3.0})
    params = {arm.name: setting.params(arm, 0) for arm in ARMS}
    assert params["vanilla"] is None
    assert params["uniform"] is None
    assert params["dysco"] == DyscoParams(heads=[(1, 0), (1, 2)], strength=3.0)
    assert params["dysco_32"] == DyscoParams(heads=[(1, 0), (1, 2)], strength=3.0, top_k=32)
    assert params["static"] == DyscoParams(heads=[(1, 0), (1, 2)], strength=3.0, static=True)
    draws = [setting.random_heads(draw) for draw in range(RANDOM_SEEDS)]
    assert params["random"] == DyscoParams(heads=draws[0], strength=3.0)
    assert all(len(set(heads)) == 2 and not set(heads) & {(1, 0), (1, 2)} for heads in draws)
    assert len({tuple(heads) for heads in draws}) > 1
    assert draws == [setting.random_heads(draw) for draw in range(RANDOM_SEEDS)]
    assert {arm.name: arm.draws for arm in ARMS if arm.draws > 1} == {"random": 5}
    assert with_selection(DyscoParams(heads=[(0, 0)])).return_selection


def test_random_heads_are_at_most_the_others() -> None:
    assert Setting([(0, 0), (0, 1), (1, 0)], 2, 2, seed=0).random_heads(0) == [(1, 1)]


# Intervals


def test_paired_differences_have_narrower_intervals_than_means() -> None:
    rng = np.random.default_rng(0)
    hard = (rng.random(400) < 0.5).astype(float)
    better = hard.copy()
    better[np.flatnonzero(hard == 0)[:20]] = 1
    one = np.ones(400)
    found = compare({"vanilla": Figure(hard, one), "dysco": Figure(better, one)}, "vanilla", seed=1)
    assert found["vanilla"]["mean"] == pytest.approx(hard.mean())
    assert "difference" not in found["vanilla"]
    assert found["dysco"]["difference"] == pytest.approx(20 / 400)
    low, high = found["dysco"]["difference_interval"]
    assert 0.02 < low < 20 / 400 < high < 0.08
    assert high - low < 0.5 * (found["dysco"]["interval"][1] - found["dysco"]["interval"][0])
    # A mean of 0/1 has a standard error of sqrt(p (1 - p) / n).
    wide = 2 * 1.96 * math.sqrt(hard.mean() * (1 - hard.mean()) / 400)
    assert np.diff(found["vanilla"]["interval"])[0] == pytest.approx(wide, rel=0.1)
    assert found == compare({"vanilla": Figure(hard, one), "dysco": Figure(better, one)}, "vanilla", seed=1)


def test_ratios_are_of_sums_and_draws_are_averaged_by_item() -> None:
    figure = Figure.mean_of_draws([[Ratio(1, 4), Ratio(1, 1)], [Ratio(3, 4), Ratio(0, 1)]])
    assert figure.mean == pytest.approx(5 / 10)
    assert figure.resampled(np.array([[0, 0], [1, 1], [0, 1]])) == pytest.approx([4 / 8, 1 / 2, 5 / 10])
    with pytest.raises(ValueError, match=r"figures of \[2, 3\] items"):
        compare({"a": figure, "b": Figure(np.ones(3), np.ones(3))}, "a", seed=0)


# Selections


def test_selections_in_figures() -> None:
    relevance = np.array([0.5, 0.2, 0.2, 0.1], np.float32)
    steps = [SelectionStep(3, [0, 1], relevance), SelectionStep(4, [0, 2, 3], np.append(relevance, 0))]
    found = selection_figures([(steps, {1, 2}), (steps[:1], set())], top_k=2, top_p=0.9)
    assert found["steps"] == 3
    assert found["size"] == pytest.approx(7 / 3)
    assert found["relevance"] == pytest.approx((0.7 + 0.8 + 0.7) / 3)
    assert found["limited"] == pytest.approx(2 / 3)
    assert found["jaccard"] == pytest.approx(1 / 4)
    assert found["gold"] == pytest.approx(0.5)
    # Two tokens that are all that top_p wants are not limited by top_k.
    assert selection_figures([(steps[:1], set())], top_k=2, top_p=0.6)["limited"] == 0
    assert selection_figures([], None, 0.9)["size"] is None


# The temperature


def logits_of_attention(model: models.Decoder, tokens: np.ndarray) -> list[np.ndarray]:
    """`[heads, tokens, tokens]` of each layer, before the softmax, in float64, of inputs that do not depend on it."""
    found = []

    def attend(_layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: None) -> tuple[np.ndarray, None]:
        queries, keys = (np.asarray(x, np.float64) for x in (q, k))
        found.append(np.einsum("qhd,khd->hqk", queries, np.repeat(keys, q.shape[1] // k.shape[1], axis=1)))
        return jnp.zeros_like(q), cache

    chosen: Attend = attend  # type: ignore[assignment]
    x, rope = model.embed(jnp.asarray(tokens)), model.rope(jnp.arange(len(tokens)))
    for index in range(model.config.num_layers):
        model.layer(index, x, rope, chosen, None)
    return found


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_a_scaled_copy_divides_all_attention_logits(family: str, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tokenizer.save(build_tokenizer(), source)
    model = models.init(tiny_config(family), seed=2)
    for layer in model.layers:
        if layer.attention.q.bias is not None:
            layer.attention.q.bias[...] += 0.5
    write_folder(model, source)
    copy = scaled_copy(source, tmp_path / "copy", 0.8)
    original, scaled = (models.load(path, dtype="float32") for path in (source, copy))
    tokens = np.arange(20, 40)
    for before, after in zip(*(logits_of_attention(one, tokens) for one in (original, scaled)), strict=True):
        np.testing.assert_allclose(after, before / 0.8, rtol=1e-5, atol=1e-6)
    assert {file.name for file in copy.iterdir()} == {file.name for file in source.iterdir()}
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        scaled_copy(source, tmp_path / "other", 0)


# Prompts and heads


def test_prompts_are_chats_and_say_where_the_lines_are(folder: Path) -> None:
    llm = LLM(folder, max_num_seqs=2)
    prompts, entries = Prompts(llm, {}), build_tokenizer()
    (item,) = TASKS["needle"].items(1, 12, "words", seed=0)
    prompt = prompts.prompt(item)
    assert prompt.tokens == llm.tokenize_chat([{"role": "user", "content": item.messages[0][1]}]).tokens
    assert prompts.length(item) == len(prompt.tokens)
    positions = sorted(prompts.gold_positions(item))
    assert entries.decode([prompt.tokens[place] for place in positions]).strip() == item.gold[0]
    step = TASKS["path_step"].items(2, 12, "words", seed=0)[1]
    begun = prompts.prompt(step)
    without = prompts.prompt(dataclasses.replace(step, reply_start=""))
    assert begun.text is not None
    assert begun.text.endswith("assistant\n" + step.reply_start)
    assert begun.opening is not None
    assert without.opening is not None
    # So that raising begins where it does for a reply from the start.
    assert len(begun.tokens) - begun.opening == len(without.tokens) - without.opening


def test_heads_are_scored_by_lines_of_needles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(model: models.Decoder, prompts: list[object], layers: int) -> None:
        seen.extend([layers, *prompts])

    monkeypatch.setattr("bench.longcontext.heads.detect", keep)
    detect_heads(folder, count=3, lines=10, form="words", seed=0, template_vars={})
    assert seen[0] == 2
    entries = build_tokenizer()
    for item in seen[1:]:
        texts = [entries.decode(item.tokens[first:end]).strip() for first, end in item.documents]
        assert len(texts) == 10
        assert all(text.startswith("The code of ") and text.endswith(".") for text in texts)
        query, null = (
            entries.decode(tokens[start:])
            for tokens, start in ((item.tokens, item.query_start), (item.null_tokens, item.null_query_start))
        )
        (gold,) = item.gold
        key = texts[gold].split()[3]
        assert query.startswith(f"What is the code of {key}?")
        assert null.startswith("What is the code of N/A?")
        assert item.tokens[: item.query_start] == item.null_tokens[: item.null_query_start]


# The command


@pytest.mark.slow
def test_the_command_compares_arms_on_the_same_items(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    arguments = ["--model", str(folder), "--form", "words", "--tasks", "needle,path_step", "--lengths", "128"]
    compared = ("vanilla", "uniform", "dysco", "random", "lag")
    arguments += ["--arms", ",".join(compared)]
    assert command.main([*arguments, "--quick", "--count", "3", "--top", "2", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [(cell["task"], cell["length"]) for cell in report["cells"]] == [
        (task, 128) for task in ("needle", "path_step")
    ]
    assert len(report["heads"]) == 2
    assert len(report["random_heads"]) == RANDOM_SEEDS
    for cell in report["cells"]:
        assert cell["items"] == 3
        assert cell["length"] - 20 <= cell["prompt_tokens"]["max"] <= cell["length"]
        (figures,) = cell["figures"].values()
        assert set(figures) == set(compared)
        assert set(cell["selection"]) == {"dysco", "random", "lag"}
        assert all(one["steps"] > 0 and one["size"] >= 1 for one in cell["selection"].values())
        assert set(cell["times"]) == set(figures) - {"uniform"}
        assert all(one["output_tokens_per_s"] > 0 for one in cell["times"].values())
    printed = capsys.readouterr().out
    assert "3 items of each task and length, where 200 are wanted" in printed
    assert "TTFT, ms" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "needle,haystack"], "must be different ones of needle"),
        (["--heads", "[[0]]"], "must be a JSON list of"),
        (["--heads", "[[0, 1]]", "--profile", "qwen3-8b"], "exclude each other"),
        (["--temperature", "0"], "must be a number above 0"),
        (["--lengths", "128,x"], "must be a whole number"),
    ],
)
def test_calls_that_cannot_work_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_a_length_beyond_the_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(folder), "--form", "words", "--tasks", "needle", "--lengths", "600", "--quick"]
    assert command.main([*arguments, "--heads", "[[1, 0]]", "--arms", "vanilla"]) == 2
    assert "it must be at most 511" in capsys.readouterr().err
