"""Profiles of heads, and what parameters mean for a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxdual import LLM
from jaxdual.decoding.dysco import DyscoModel, DyscoParams
from jaxdual.decoding.profiles import profile_of, read_profile, shipped_names

GOOD: dict[str, Any] = {
    "models": ["m"],
    "num_layers": 4,
    "num_heads": 2,
    "heads": [[3, 1], [0, 0]],
    "template_sequences": [[7, 8]],
    "limits": [
        {"max_tokens": 100, "top_p": None, "top_k": 5, "strength": 3.0},
        {"max_tokens": 200, "top_p": 0.9, "top_k": None, "strength": 1.5},
    ],
}


def test_shipped_profiles_are_those_of_the_authors() -> None:
    """Numbers of heads and last layers as published: sixteen for all but Qwen3-32B."""
    shapes = {}
    for name in shipped_names():
        profile = read_profile(name)
        shapes[name] = (len(profile.heads), max(layer for layer, _ in profile.heads), profile.num_layers)
    assert shapes == {
        "llama-3.1-8b": (16, 19, 32),
        "mixtral-8x7b": (16, 28, 32),
        "qwen3-32b": (32, 53, 64),
        "qwen3-4b": (16, 24, 36),
        "qwen3-8b": (16, 24, 36),
    }
    assert len(set(read_profile("qwen3-4b").heads) & set(read_profile("qwen3-8b").heads)) == 11
    assert profile_of("Qwen/Qwen3-8B") is read_profile("qwen3-8b")
    assert profile_of("/models/qwen3-8b/") is read_profile("qwen3-8b")
    assert profile_of("Qwen/Qwen3-8B-Base") is None


USUAL: dict[str, Any] = {"max_tokens": None, "top_p": 0.9, "top_k": 5, "strength": 2.0}


@pytest.mark.parametrize(
    ("prompt_length", "limits"),
    [(1, (None, 5, 3.0)), (100, (None, 5, 3.0)), (101, (0.9, None, 1.5)), (9999, (0.9, None, 1.5))],
)
def test_what_is_left_open_is_the_profile_s_at_the_prompt_s_length(
    prompt_length: int, limits: tuple[Any, ...], tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(GOOD))
    model = DyscoModel("any", 4, 2)
    found = model.resolved(DyscoParams(profile=str(path)), prompt_length, 7)
    assert (found.top_p, found.top_k, found.strength) == limits
    assert (found.heads, found.template_sequences, found.tail) == (((3, 1), (0, 0)), ((7, 8),), min(7, prompt_length))
    chosen = DyscoParams(profile=str(path), top_p=0.5, top_k=None, strength=4, tail=3, template_sequences=[])
    found = model.resolved(chosen, prompt_length, 7)
    assert (found.top_p, found.top_k, found.strength) == (0.5, None, 4)
    assert (found.template_sequences, found.tail) == ((), min(3, prompt_length))


@pytest.mark.parametrize(
    ("prompt_length", "chosen"),
    [(100, {"top_k": None}), (101, {"top_p": None}), (301, {}), (301, {"top_k": None}), (301, {"top_p": None})],
)
def test_limits_that_a_profile_and_parameters_leave_out_together_are_refused(
    prompt_length: int, chosen: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    nothing = {"max_tokens": None, "top_p": None, "top_k": None, "strength": 2.0}
    path.write_text(json.dumps(GOOD | {"limits": [*GOOD["limits"], nothing]}))
    model = DyscoModel("any", 4, 2)
    with pytest.raises(ValueError, match="top_p and top_k can't both be None: everything would be selected"):
        model.resolved(DyscoParams(profile=str(path), **chosen), prompt_length, 7)
    found = model.resolved(DyscoParams(profile=str(path), **chosen | {"top_k": 3}), prompt_length, 7)
    assert found.top_k == 3


def test_profiles_of_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(GOOD | {"fingerprint": "ab"}))
    params = DyscoParams(profile=str(path))
    with pytest.raises(ValueError, match="is of a model of 4 layers with 2 heads each, and this one has 5 with 2"):
        DyscoModel("any", 5, 2).resolved(params, 10, 2)
    with pytest.raises(ValueError, match="was made of other weights, or of another number type"):
        DyscoModel("any", 4, 2, fingerprint="cd").resolved(params, 10, 2)
    DyscoModel("any", 4, 2, fingerprint="ab").resolved(params, 10, 2)


def test_without_a_profile_limits_are_the_usual_ones() -> None:
    found = DyscoModel("Qwen3-8B", 36, 32).resolved(DyscoParams(heads=[(1, 2)]), 70_000, None)
    assert (found.heads, found.top_p, found.top_k, found.strength) == (((1, 2),), 0.975, 4096, 2.0)
    assert (found.tail, found.template_sequences) == (2, ())
    found = DyscoModel("Qwen3-8B", 36, 32).resolved(DyscoParams(), 70_000, 4)
    assert (len(found.heads), found.top_k, found.strength, found.tail) == (16, 8192, 2.5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": []}, "at least one"),
        ({"heads": [[4, 0]]}, "4 must be below 4"),
        ({"heads": [[0, 2]]}, "2 must be below 2"),
        ({"heads": [[0, 0], [0, 0]]}, "none twice"),
        ({"heads": [[0, 0, 0]]}, "too many values"),
        ({"num_layers": 0}, "0 must be at least 1"),
        ({"num_heads": True}, "True must be a whole number"),
        ({"limits": []}, "limits must not be empty"),
        ({"limits": [{"max_tokens": 1}]}, "KeyError: 'top_p'"),
        ({"limits": [USUAL | {"strength": 0.0}]}, "strength=0.0 must be above 0"),
        ({"limits": [USUAL | {"strength": float("nan")}]}, "strength=nan must be above 0"),
        ({"limits": [USUAL | {"top_p": 7}]}, "top_p=7.0 must be above 0 and at most 1"),
        ({"template_sequences": [[-1]]}, "-1 must be a whole number"),
    ],
)
def test_files_that_are_no_profiles_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=f"is not a profile: .*{message}"):
        read_profile(str(path))


def test_a_chat_s_tail_is_what_its_template_opens_the_answer_with() -> None:
    llm = LLM(max_model_len=128, max_num_seqs=1)
    messages = [{"role": "user", "content": "Write a function."}]
    prompt, closed = (llm.tokenize_chat(messages, add_generation_prompt=opens) for opens in (True, False))
    assert prompt.opening == len(prompt.tokens) - len(closed.tokens) > 0
    assert closed.opening is None
    assert llm.tokenize("def f():").opening is None
