"""The trainer of the shipped models: corpus, tokenizer, data, steps, resuming, evaluation, and what was shipped."""

import ast
import hashlib
import json
import math
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import models
from models.attention import dense_attend
from models.shapes import parameters_of, with_parameters
from models.training import corpus, evaluate, tokenizer
from models.training.attention import blocked_attend
from models.training.card import model_card
from models.training.corpus import CorpusFile, Manifest
from models.training.data import Position, WindowStream, chat_examples
from models.training.experts import balance_loss, replace_experts
from models.training.recipes import CONFIGS, Recipe
from models.training.run import Budget, run
from models.training.state import load_state
from models.training.step import learning_rate, losses, optimizer
from models.training.train import heldout_slice, main, write_folder

SHIPPED = Path(models.__file__).parent / "shipped"
SIZES = ("small", "base", "moe")
MAX_BYTES = 15 << 20

SOURCE = '''"""A module."""
import os


def add(first, second):
    """Return the sum of both numbers."""
    return first + second


class Stack:
    """Last in, first out."""

    def push(self, item):
        """Put an item on top of the stack."""
        if item is None:
            raise ValueError("item")
        self.items.append(item)

    def undocumented(self):
        return self.items
'''


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {f"module{number}.py": SOURCE.replace("Stack", f"Stack{number}") for number in range(12)}


@pytest.fixture(scope="module")
def entries(texts: dict[str, str]) -> Tokenizer:
    return tokenizer.train(texts.values(), vocab_size=320)


def tiny(entries: Tokenizer, moe: bool = False) -> models.ModelConfig:
    size = entries.get_vocab_size()
    return models.ModelConfig(
        family="qwen3_moe" if moe else "qwen3",
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        qk_norm=True,
        eos_token_ids=(size - 1, size - 3),
        moe=models.MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=16, norm_topk_prob=True)
        if moe
        else None,
    )


RECIPE = Recipe(tokens_per_step=128, length=32, long_length=64, long_fraction=0.25, peak_rate=1e-2, warmup_steps=4)


# Corpus


def test_manifest_splits_are_disjoint_and_follow_the_path() -> None:
    files = corpus.load_manifest().files
    paths = [entry.path for entry in files]
    assert paths == sorted(set(paths))
    assert all(entry.split == corpus.split_of(entry.path) for entry in files)
    heldout = sum(entry.bytes for entry in files if entry.split == "heldout")
    assert 0.01 < heldout / sum(entry.bytes for entry in files) < 0.1
    assert not any({"test", "tests", "site-packages"} & set(path.split("/")) for path in paths)


@pytest.mark.skipif(
    corpus.load_manifest().python != platform.python_version(), reason="the list is of another Python version"
)
def test_manifest_lists_what_a_scan_of_this_version_finds() -> None:
    found = {entry.path for entry in corpus.scan(corpus.stdlib_root())}
    listed = {entry.path for entry in corpus.load_manifest().files}
    # Distributions may leave modules out (tkinter, idlelib), never add any.
    assert found <= listed


@pytest.fixture
def library(tmp_path: Path) -> tuple[Path, Manifest]:
    names = ["a.py", "pkg/b.py", "pkg/tests/c.py", "encodings/d.py", "_sysconfigdata_x.py", "tiny.py", "latin.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" + "x = 1\r\n" * 20, encoding="utf-8", newline="")
    (tmp_path / "tiny.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 50)
    return tmp_path, Manifest("3.12.0", corpus.scan(tmp_path))


def test_scan_lists_hand_written_utf8_source_only(library: tuple[Path, Manifest]) -> None:
    root, manifest = library
    assert [entry.path for entry in manifest.files] == ["a.py", "pkg/b.py"]
    data = (root / "a.py").read_bytes()
    assert manifest.files[0] == CorpusFile("a.py", hashlib.sha256(data).hexdigest(), len(data), corpus.split_of("a.py"))


def test_changed_and_missing_files_are_refused_by_name(library: tuple[Path, Manifest]) -> None:
    root, manifest = library
    original = (root / "a.py").read_bytes().decode()
    assert corpus.read_texts("train", manifest, root)["a.py"] == original
    (root / "a.py").write_text("x = 2\n")
    (root / "pkg/b.py").unlink()
    with pytest.raises(corpus.CorpusChangedError, match=r"2 of 2 .*\n.*a\.py: sha256 .*\n.*pkg/b\.py: missing"):
        corpus.read_texts("train", manifest, root)
    assert corpus.read_texts("train", manifest, root, allow_changed=True) == {"a.py": "x = 2\n"}


def test_manifest_file_round_trip(library: tuple[Path, Manifest]) -> None:
    root, manifest = library
    corpus.write_manifest(manifest, root / "corpus.json")
    assert corpus.load_manifest(root / "corpus.json") == manifest


# Tokenizer


@settings(max_examples=80, deadline=None)
@given(text=st.text())
def test_tokenizer_round_trip_is_byte_exact(text: str) -> None:
    shipped = _shipped_tokenizer()
    plain = Tokenizer.from_str(shipped.to_str())
    plain.encode_special_tokens = True
    assert plain.decode(plain.encode(text).ids, skip_special_tokens=False) == text


def test_python_indentation_is_one_token() -> None:
    tokens = _shipped_tokenizer().encode("def f():\n            return None").tokens
    assert tokens[-3:] == ["Ġ" * 11, "Ġreturn", "ĠNone"]


def test_special_tokens_are_the_last_ids_and_training_is_repeatable(texts: dict[str, str], entries: Tokenizer) -> None:
    size = entries.get_vocab_size()
    assert [entries.token_to_id(token) for token in tokenizer.SPECIAL_TOKENS] == [size - 3, size - 2, size - 1]
    assert tokenizer.train(texts.values(), vocab_size=320).to_str() == entries.to_str()
    with pytest.raises(ValueError, match="at least 259"):
        tokenizer.train(texts.values(), vocab_size=258)


def test_chat_template_renders_turns_and_refuses_other_roles() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {{ x }}\n"}]
    assert tokenizer.render_chat(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ x }}\n<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="unexpected role: tool"):
        tokenizer.render_chat([{"role": "tool", "content": "x"}])


# Data


def test_chat_examples_ask_for_documented_functions() -> None:
    first, second = chat_examples(SOURCE)
    assert first == (
        "<|im_start|>user\nWrite a Python function `add`: Return the sum of both numbers.<|im_end|>\n"
        '<|im_start|>assistant\ndef add(first, second):\n    """Return the sum of both numbers."""\n'
        "    return first + second<|im_end|>\n"
    )
    assert "method `push` of the class `Stack`: Put an item on top of the stack.<|im_end|>" in second
    answer = second.partition("assistant\n")[2].removesuffix("<|im_end|>\n")
    assert isinstance(ast.parse(answer).body[0], ast.FunctionDef)
    assert chat_examples("def broken(:") == []


def test_an_epoch_holds_every_file_once_between_end_tokens(entries: Tokenizer, texts: dict[str, str]) -> None:
    stream = WindowStream(entries, texts, seed=1)
    position, windows = Position(0, 0, 16), []
    while position.epoch == 0:
        batch, position = stream.batch(position, 1)
        if position.epoch == 0:
            windows.append(batch[0])
    follows = {tuple(window[:4]): window for window in windows}
    assert len(follows) > len(texts)
    end = entries.token_to_id(tokenizer.END_OF_TEXT)
    # Targets alone: neighbouring windows share the token between them.
    counted = sum(int((window[1:] == end).sum()) for window in windows)
    transcripts = len(texts) * 2 // 3
    assert len(texts) + transcripts - 1 <= counted <= len(texts) + transcripts


def test_batches_follow_from_seed_and_position(entries: Tokenizer, texts: dict[str, str]) -> None:
    one, two = (WindowStream(entries, texts, seed=3) for _ in range(2))
    first, position = one.batch(Position(0, 0, 16), 4)
    second, _ = one.batch(position, 4)
    np.testing.assert_array_equal(two.batch(position, 4)[0], second)
    np.testing.assert_array_equal(two.batch(Position(0, 0, 16), 4)[0], first)
    other = WindowStream(entries, texts, seed=4).batch(Position(0, 0, 16), 4)[0]
    assert not np.array_equal(other, first)
    np.testing.assert_array_equal(one.reseeded(4).batch(Position(0, 0, 16), 4)[0], other)
    with pytest.raises(ValueError, match="rows=100000"):
        one.batch(position, 100000)


# Steps


def test_blocked_attention_matches_the_dense_one() -> None:
    batch, length, heads, groups, head_dim = 2, 100, 4, 2, 8
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (batch * length, count, head_dim))
        for key, count in zip(keys, (heads, groups, groups), strict=True)
    )

    def out_and_gradients(attend: Callable[..., Callable[..., tuple[jax.Array, None]]]) -> list[jax.Array]:
        def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, _ = attend(batch, length)(0, *arrays, None)
            return jnp.sum(jnp.sin(out)), out

        gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return [out, *gradients]

    for ours, expected in zip(out_and_gradients(blocked_attend), out_and_gradients(dense_attend), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.slow
def test_trained_experts_compute_what_is_served(entries: Tokenizer) -> None:
    config = tiny(entries, moe=True)
    x = jax.random.normal(jax.random.key(1), (64, 32))

    parameters = parameters_of(models.init(config, seed=2))

    @jax.jit
    def trained(x: jax.Array) -> jax.Array:
        model = with_parameters(config, parameters)
        wrapped = replace_experts(model)
        assert [layer.mlp for layer in model.layers] == wrapped
        return wrapped[0](x)

    served = jax.jit(with_parameters(config, parameters).layers[0].mlp)
    np.testing.assert_allclose(trained(x), served(x), atol=1e-6)


def test_balance_loss_is_one_when_balanced_and_grows_to_the_number_of_experts() -> None:
    even = jnp.full((8, 4), 0.25)
    experts = jnp.arange(8)[:, None] % 4
    assert float(balance_loss(even, experts)) == pytest.approx(1.0)
    assert float(balance_loss(jnp.eye(4)[jnp.zeros(8, int)], jnp.zeros((8, 1), jnp.int32))) == pytest.approx(4.0)


def test_loss_of_a_model_is_that_of_its_logits(entries: Tokenizer) -> None:
    model = models.init(tiny(entries), seed=0)
    windows = np.random.default_rng(0).integers(0, 320, (2, 17)).astype(np.int32)
    recipe = replace(RECIPE, z_loss=0.0)
    total, cross_entropy = jax.jit(losses, static_argnums=(0, 1))(
        model.config, recipe, parameters_of(model), jnp.asarray(windows)
    )
    logits = np.asarray(model.logits(windows[:, :-1]), np.float64)
    log_partition = np.log(np.exp(logits).sum(-1))
    expected = np.mean(log_partition - np.take_along_axis(logits, windows[:, 1:, None], 2)[..., 0])
    assert float(cross_entropy) == pytest.approx(expected, rel=1e-5)
    assert float(total) == float(cross_entropy)


def test_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    recipe = replace(RECIPE, peak_rate=1.0, warmup_steps=4, decay_from=0.5)
    assert [learning_rate(recipe, step, 0.0) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert learning_rate(recipe, 9, 0.75) == pytest.approx(0.5)
    assert learning_rate(recipe, 9, 1.0) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_a_short_run_lowers_the_loss(moe: bool, entries: Tokenizer, texts: dict[str, str], tmp_path: Path) -> None:
    lines = []
    windows, bits_per_nat = heldout_slice(entries, {"held.py": SOURCE * 2}, RECIPE.length)
    _, state = run(
        tiny(entries, moe),
        replace(RECIPE, long_fraction=0.0) if moe else RECIPE,
        Budget(steps=20),
        WindowStream(entries, texts, seed=0),
        windows,
        tmp_path,
        checkpoint_seconds=0.0,
        report=lambda progress, _state: lines.append(progress),
    )
    assert (state.step, state.tokens) == (20, 20 * RECIPE.tokens_per_step)
    assert lines[0].heldout == pytest.approx(math.log(320), rel=0.1)
    assert lines[-1].heldout < 0.75 * lines[0].heldout
    assert lines[-1].fraction == 1.0
    assert bits_per_nat < 1 / math.log(2)


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_uninterrupted_one(entries: Tokenizer, texts: dict[str, str], tmp_path: Path) -> None:
    windows, _ = heldout_slice(entries, {"held.py": SOURCE}, RECIPE.length, windows=1)
    data = WindowStream(entries, texts, seed=0)

    def train(folder: Path, **more: object) -> object:
        return run(tiny(entries), RECIPE, Budget(steps=8), data, windows, folder, **more)[1]  # type: ignore[arg-type]

    steps: list[int] = []
    whole = train(tmp_path / "whole", checkpoint_at={2, 5}, report=lambda line, _state: steps.append(line.step))
    assert steps == [2, 5, 8]
    steps.clear()
    stopped = train(tmp_path / "parts", stop_after=3)
    assert stopped.step == 3
    resumed = train(
        tmp_path / "parts", resume=True, checkpoint_seconds=0.0, report=lambda line, _state: steps.append(line.step)
    )
    assert steps == [4, 5, 6, 7, 8]
    assert (resumed.step, resumed.position, resumed.tokens) == (whole.step, whole.position, whole.tokens)
    assert resumed.position.length == RECIPE.long_length
    for ours, expected in zip(
        jax.tree.leaves((resumed.parameters, resumed.optimizer)),
        jax.tree.leaves((whole.parameters, whole.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, expected)
    assert resumed.cpu_seconds > stopped.cpu_seconds
    initial = replace(whole, optimizer=optimizer(RECIPE, whole.parameters).init(whole.parameters))
    with pytest.raises(ValueError, match="of another run"):
        load_state(initial, "another", tmp_path / "parts")


def test_budget_takes_exactly_one_limit() -> None:
    for wrong in ({}, {"cpu_seconds": 1.0, "steps": 1}, {"steps": 0}):
        with pytest.raises(ValueError, match="exactly one"):
            Budget(**wrong)


# Evaluation


class _Uniform:
    """Gives every token the same probability."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def logits(self, tokens: np.ndarray) -> jax.Array:
        return jnp.zeros((*tokens.shape, self.vocab))


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (1000, 1)])
def test_every_token_is_scored_once(window: int, stride: int, entries: Tokenizer) -> None:
    texts = {"a": SOURCE, "b": "x = 1\n"}
    count = sum(len(entries.encode(text).ids) for text in texts.values())
    size = sum(len(text.encode()) for text in texts.values())
    bits = evaluate.bits_per_byte(_Uniform(320), entries, texts, window, stride)
    assert bits == pytest.approx(count * math.log2(320) / size, rel=1e-5)
    with pytest.raises(ValueError, match="stride=17"):
        evaluate.bits_per_byte(_Uniform(320), entries, texts, 16, 17)


def test_baselines_of_known_text() -> None:
    found = evaluate.baselines({"a": "ab" * 5000}, {"b": "ab" * 50})
    assert found["unigram"] == pytest.approx(1.0, abs=0.05)
    assert found["lzma_after_train"] < found["lzma_alone"]


# Folders


def test_a_written_folder_loads_in_bf16(entries: Tokenizer, tmp_path: Path) -> None:
    model = models.init(tiny(entries), seed=0)
    tokenizer.save(entries, tmp_path)
    write_folder(model, tmp_path)
    loaded = models.load(tmp_path, dtype="float32")
    for name, value in parameters_of(loaded).items():
        expected = parameters_of(model)[name].astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(value, expected)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [319, 317]
    assert [entries.id_to_token(index) for index in generation["eos_token_id"]] == ["<|im_end|>", "<|endoftext|>"]


def test_command_line_refuses_a_missing_state_and_a_bad_budget(
    tmp_path: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus, "read_texts", lambda split, **_: {"a.py": "\n".join(texts.values())})
    assert main(["--size", "small", "--out", str(tmp_path), "--resume"]) == 2
    assert "state.npz" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--size", "small", "--out", str(tmp_path), "--cpu-minutes", "0"])
    for flag in ("--steps", "--intermediate-size"):
        with pytest.raises(SystemExit):
            main(["--size", "small", "--out", str(tmp_path), flag, "0"])


def test_a_card_of_so_many_steps_says_how_they_are_repeated() -> None:
    metrics = json.loads((SHIPPED / "base" / "metrics.json").read_text(encoding="utf-8"))
    card = model_card(metrics | {"budget_cpu_minutes": None})
    assert "--size base --out DIR --intermediate-size 704 --steps 949" in card
    assert "CPU time, so another machine" not in card


def _shipped_tokenizer() -> Tokenizer:
    return tokenizer.load(SHIPPED / "small")


def test_shipped_tokenizers_are_identical() -> None:
    for name in tokenizer.FILES:
        assert len({(SHIPPED / size / name).read_bytes() for size in SIZES}) == 1, name
    assert (SHIPPED / "base" / "chat_template.jinja").read_text(encoding="utf-8") == tokenizer.CHAT_TEMPLATE
    assert _shipped_tokenizer().get_vocab_size() == tokenizer.VOCAB_SIZE


@pytest.mark.parametrize("size", SIZES)
def test_shipped_folder_is_complete_and_within_limits(size: str) -> None:
    folder = SHIPPED / size
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert files.keys() == {
        *tokenizer.FILES,
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "metrics.json",
        "README.md",
    }
    assert max(files.values()) <= MAX_BYTES
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == model_card(metrics)
    assert metrics["train_cpu_minutes"] <= 60.5
    assert metrics["parameters"] <= 7.2e6
    model = models.load(folder, dtype="float32")
    assert model.config == CONFIGS[size]
    assert sum(value.size for value in parameters_of(model).values()) == metrics["parameters"]


@pytest.mark.parametrize("size", SIZES)
def test_shipped_model_predicts_python_it_never_saw(size: str) -> None:
    folder = SHIPPED / size
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["heldout_bits_per_byte"] < 1.75 < metrics["baselines_bits_per_byte"]["unigram"] / 2
    model = models.load(folder, dtype="float32")
    # The source stands in this file, not in the corpus; xz needs more than twice as much.
    bits = evaluate.bits_per_byte(model, tokenizer.load(folder), {"source.py": SOURCE}, window=256, stride=256)
    assert bits < 2.0 < 0.5 * evaluate.baselines({"": ""}, {"source.py": SOURCE})["lzma_alone"]
