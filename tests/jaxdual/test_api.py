"""`LLM` as its users call it, on a small random model with a real tokenizer."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

import models
from jaxdual import LLM, ConfigError, EngineDeadError, SamplingParams
from tests.engine.models import FIXTURES

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model folder whose generation_config.json recommends sampling parameters."""
    path = tmp_path_factory.mktemp("model") / "random-qwen3"
    config = models.ModelConfig(
        family="qwen3",
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        qk_norm=True,
        eos_token_ids=(2047,),
    )
    models.save(models.init(config, seed=3), path, dtype="float32")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(FIXTURES.parent / "tokenizer" / file, path)
    (path / "generation_config.json").write_text('{"eos_token_id": [2047, 2045], "temperature": 0.6, "top_k": 20}')
    return path


@pytest.fixture(scope="module")
def shared_llm(folder: Path) -> LLM:
    return LLM(folder, block_size=8, max_num_seqs=8)


@pytest.fixture
def llm(shared_llm: LLM) -> LLM:
    yield shared_llm
    assert shared_llm.num_unfinished == 0
    shared_llm.check_integrity()


def test_each_output_of_a_request_is_cached_under_its_own_tokens(llm: LLM) -> None:
    prompt = list(range(3, 19))
    params = SamplingParams(n=2, max_tokens=24, temperature=1.0, seed=5, ignore_eos=True)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params)
    assert output.outputs[0].token_ids[:8] != output.outputs[1].token_ids[:8]
    for one in output.outputs:
        (longer,) = llm.generate({"prompt_token_ids": prompt + one.token_ids}, GREEDY)
        assert longer.num_cached_tokens == 32, "all full blocks but the one that the last token completes"


def test_text_and_token_ids_of_it_give_the_same(llm: LLM) -> None:
    text = "def f(x):\n    return x"
    ids = llm.get_tokenizer().encode(text)
    by_text, by_ids, by_array = llm.generate([text, {"prompt_token_ids": ids}, np.array(ids)], GREEDY)
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids == by_array.outputs[0].token_ids
    assert by_text.outputs[0].text == llm.get_tokenizer().decode(by_text.outputs[0].token_ids, skip_special_tokens=True)
    assert (by_text.prompt, by_ids.prompt) == (text, None)
    assert llm.generate(ids, GREEDY)[0].outputs[0].text == by_text.outputs[0].text


def test_chat_is_generate_on_the_rendered_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    tokenizer = llm.get_tokenizer()
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    want = llm.generate({"prompt_token_ids": tokenizer.encode(rendered)}, GREEDY)[0]
    assert llm.chat(messages, GREEDY)[0].outputs[0].text == want.outputs[0].text
    assert [o.outputs[0].text for o in llm.chat([messages, messages], GREEDY)] == [want.outputs[0].text] * 2


def test_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    want = llm.generate("import os", GREEDY)[0].outputs[0]
    texts = [output.outputs[0].text for output in llm.stream("import os", GREEDY)]
    assert texts[-1] == want.text
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    for output in llm.stream("import os", GREEDY):
        assert not output.finished
        break  # leaving early ends the request, as the fixture checks


def test_several_outputs_share_the_prompt_and_differ(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=10, temperature=1.0, seed=7, ignore_eos=True)
    prompt = "class Stack:\n    def __init__(self):\n        self.items = []\n"
    first = llm.generate(prompt, params)[0]
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in first.outputs}) == 3
    again = llm.generate(prompt, params)[0]
    assert [output.token_ids for output in again.outputs] == [output.token_ids for output in first.outputs]
    single = llm.generate(prompt, SamplingParams(max_tokens=10, temperature=1.0, seed=7, ignore_eos=True))[0]
    assert single.outputs[0].token_ids == first.outputs[0].token_ids


def test_outputs_of_one_request_prefill_its_prompt_once(folder: Path) -> None:
    llm = LLM(folder, block_size=8, max_num_seqs=8)
    prompt = list(range(100, 149))  # six blocks and one token
    llm.generate({"prompt_token_ids": prompt}, SamplingParams(n=4, max_tokens=4, temperature=1.0, ignore_eos=True))
    # The other three take the last token as an ordinary decode step.
    assert llm.stats().computed_prompt_tokens == 49
    assert llm.stats().prefix_cache_hits == 3 * 48


def test_a_stop_string_ends_and_cuts_the_text(llm: LLM) -> None:
    whole = llm.generate("x = ", SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))[0].outputs[0]
    stop = whole.text[10:14]
    start = whole.text.index(stop)
    output = llm.generate("x = ", SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, stop=stop))[0].outputs[
        0
    ]
    assert (output.text, output.finish_reason, output.stop_reason) == (whole.text[:start], "stop", stop)
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]
    assert len(output.token_ids) < len(whole.token_ids)


def test_stop_tokens_end_unless_ignored_or_too_early(llm: LLM) -> None:
    whole = llm.generate("x = ", SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))[0].outputs[0]
    token = whole.token_ids[6]
    first = whole.token_ids.index(token)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, stop_token_ids=[token])
    output = llm.generate("x = ", params)[0].outputs[0]
    assert output.token_ids == whole.token_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)
    late = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, stop_token_ids=[token], min_tokens=12)
    assert token not in llm.generate("x = ", late)[0].outputs[0].token_ids[:12]


def test_end_of_sequence_ids_come_from_the_generation_config(llm: LLM) -> None:
    bias = {2045: 100.0}
    ended = llm.generate("x", SamplingParams(max_tokens=5, temperature=0, logit_bias=bias))[0].outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason, ended.text) == ([2045], "stop", None, "")
    going = llm.generate("x", SamplingParams(max_tokens=5, temperature=0, logit_bias=bias, ignore_eos=True))[0].outputs[
        0
    ]
    assert (going.token_ids, going.finish_reason) == ([2045] * 5, "length")


def test_defaults_come_from_the_generation_config(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 1.0)


def test_output_is_cut_at_the_context(llm: LLM) -> None:
    prompt = {"prompt_token_ids": [5] * 250}
    output = llm.generate(prompt, SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (6, "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt_token_ids": [2048]}, r"token 2048 must be a token id in \[0, 2047\]"),
        ({"prompt_token_ids": [1.5]}, r"token 1\.5 must be"),
        ({"prompt_token_ids": [5] * 256}, "must be at most 255"),
        ({"prompt_ids": [5]}, "has the key"),
        ({"prompt": [5]}, "'prompt' holds a list"),
        (7, "not int"),
        (b"bytes", "not bytes"),
    ],
)
def test_bad_prompts_are_refused_and_nothing_is_left(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(["good", prompt], GREEDY)
    assert not llm.has_unfinished


def test_wrong_numbers_of_parameters_are_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate(["x"], [GREEDY, GREEDY])


def test_a_folder_without_a_tokenizer_takes_ids_only() -> None:
    llm = LLM(FIXTURES / "qwen3", max_num_seqs=2)
    output = llm.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY)[0].outputs[0]
    assert (len(output.token_ids), output.text) == (12, "")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        llm.generate("text", GREEDY)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        llm.chat([{"role": "user", "content": "Hello"}])
    with pytest.raises(ValueError, match="use stop_token_ids"):
        llm.generate({"prompt_token_ids": [1]}, SamplingParams(stop="x"))


def test_random_weights_need_only_a_configuration(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "qwen3" / "config.json", tmp_path)
    llm = LLM(tmp_path, load_format="dummy", max_num_seqs=2)
    again, stored = (LLM(FIXTURES / "qwen3", load_format=form, max_num_seqs=2) for form in ("dummy", "auto"))
    prompt = {"prompt_token_ids": [1, 2, 3]}
    outputs = [one.generate(prompt, GREEDY)[0].outputs[0].token_ids for one in (llm, again, stored)]
    assert outputs[0] == outputs[1] != outputs[2]
    assert llm.info.fingerprint == again.info.fingerprint != stored.info.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_sequences": 3}, "unknown setting 'max_num_sequences'"),
        ({"max_model_len": 257}, "max_model_len=257 must be at most 256"),
        ({"num_kv_blocks": 3}, "num_kv_blocks gives 3 KV pages"),
        ({"kv_cache_memory_bytes": 1000}, "kv_cache_memory_bytes gives 0 KV pages"),
        ({"preemption_mode": "swap"}, "needs host_cache_bytes"),
        ({"max_num_batched_tokens": 8}, "must be at least max_num_seqs"),
        ({"dtype": "int8"}, "dtype='int8' must be one of"),
    ],
)
def test_bad_settings_name_themselves(folder: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(folder, **settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"num_kv_blocks": 10**8}, "KV memory of 100000000 pages"),
        ({"num_kv_blocks": 32, "host_cache_bytes": 10**15}, "host_cache_bytes"),
        ({"max_num_seqs": 10**7, "max_num_batched_tokens": 10**7, "num_kv_blocks": 32}, "max_num_seqs"),
    ],
)
def test_settings_that_this_machine_cannot_hold_name_themselves(
    folder: Path, settings: dict[str, object], name: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.* needs \d+ bytes; this machine has"):
        LLM(folder, **settings)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_breaks_off_leaves_no_request_behind(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    steps = []

    def step() -> list[object]:
        steps.append(1)
        if len(steps) == 3:
            raise error
        return LLM.step(llm)

    monkeypatch.setattr(llm, "step", step)
    with pytest.raises(error):
        llm.generate(["import os", "import sys"], GREEDY)
    monkeypatch.undo()
    while llm.has_unfinished:
        llm.step()
    with pytest.raises(ValueError, match="must be SamplingParams"):
        llm.generate(["a", "b"], [GREEDY, None])  # type: ignore[list-item]


def test_an_engine_that_failed_stays_dead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(folder, max_num_seqs=2)
    running = llm.submit("import os", GREEDY)
    monkeypatch.setattr(llm._engine.runner, "dispatch", lambda *_: 1 / 0)
    with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
        llm.step()
    monkeypatch.undo()
    assert llm.step() == [running]
    assert running.outputs[0].finish_reason == "error"
    for call in (llm.step, lambda: llm.generate("x", GREEDY)):
        with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
            call()
    assert not llm.has_unfinished


def test_models_differ_in_their_fingerprint(folder: Path, llm: LLM) -> None:
    other = LLM(FIXTURES / "qwen3", max_num_seqs=2)
    assert llm.system_fingerprint == LLM(folder, max_num_seqs=2).system_fingerprint != other.system_fingerprint


def test_bfloat16_runs(folder: Path) -> None:
    llm = LLM(folder, dtype="bfloat16", max_num_seqs=2)
    assert len(llm.generate("x = 1", GREEDY)[0].outputs[0].token_ids) == 12
