"""The command end to end: the page that it writes, and what it says of bad calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdual import LLM, DyscoParams, SamplingParams
from jaxdual.decoding.dysco import template_mask
from jaxdual.model_folder import shipped_model
from jaxdual.selections import __main__ as command
from tests.selections.test_page import data_of, levels_of, parsed

SETTINGS: dict[str, Any] = {"max_num_seqs": 1, "max_model_len": 256, "dtype": "float32"}
CALL = ["--model", str(shipped_model("small")), "--max-num-seqs", "1", "--max-model-len", "256", "--dtype", "float32"]
PROMPT = 'def largest(values):\n    """Return <the> largest — of `values`."""\n    return '


def profile_file(folder: Path, llm: LLM) -> Path:
    """Of two heads, and with the start of a turn as a template's tokens."""
    opening = llm.get_tokenizer().encode("<|im_start|>user\n", add_special_tokens=False)
    path = folder / "heads.json"
    limits = [{"max_tokens": None, "top_p": 0.9, "top_k": 12, "strength": 2.0}]
    profile = {"models": ["m"], "num_layers": llm.info.num_layers, "num_heads": llm.info.num_heads}
    profile |= {"heads": [[1, 0], [0, 1]], "template_sequences": [opening], "limits": limits}
    path.write_text(json.dumps(profile))
    return path


def test_the_page_shows_what_the_request_selected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(shipped_model("small"), **SETTINGS)
    profile, file, html = profile_file(tmp_path, llm), tmp_path / "prompt.txt", tmp_path / "page.html"
    file.write_text(PROMPT, encoding="utf-8")
    call = [*CALL, "--prompt-file", str(file), "--chat", "--profile", str(profile), "--top-k", "9"]
    assert command.main([*call, "--max-tokens", "6", "--html", str(html)]) == 0
    params = DyscoParams(profile=str(profile), top_k=9, return_selection=True)
    (request,) = llm.chat(
        [{"role": "user", "content": PROMPT}], SamplingParams(max_tokens=6, temperature=0, dysco=params)
    )
    page = parsed(html.read_text(encoding="utf-8"))
    data, levels = data_of(page), levels_of(page)
    steps = request.outputs[0].selection
    assert steps is not None
    assert data["position"] == [step.position for step in steps]
    for row, step in zip(levels, steps, strict=True):
        assert np.flatnonzero(row >= data["selected_bit"]).tolist() == step.selected
    spans = page.one("div", id="prompt").children
    marked = ["data-template" in span.attributes for span in spans]
    tokenizer, ids = llm.get_tokenizer(), request.prompt_token_ids
    opening = tokenizer.encode("<|im_start|>user\n", add_special_tokens=False)
    assert marked == template_mask(ids, [opening]).tolist()
    assert sum(marked) == len(opening)
    answer = "".join(span.text for span in page.one("div", id="answer").children)
    assert answer == "".join(tokenizer.decode([token]) for token in request.outputs[0].token_ids)
    facts = {one.one("dt").text: one.one("dd").text for one in page.one("dl").all("div")}
    assert facts.items() >= {"retrieval heads": "1.0, 0.1", "top_p": "0.9", "top_k": "9", "strength": "2.0"}.items()
    out = capsys.readouterr().out
    assert out.startswith(request.outputs[0].text)
    assert f"{len(ids)} tokens of prompt, {len(steps)} steps, {html.stat().st_size} bytes" in out


def test_a_plain_prompt_and_heads_from_the_command_line(tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    call = [*CALL, "--prompt", "a = 1\nb = ", "--heads", "[[1, 0]]", "--top-p", "none", "--top-k", "3", "--static"]
    assert command.main([*call, "--observe", "4", "--tail", "1", "--max-tokens", "3", "--html", str(html)]) == 0
    page = parsed(html.read_text(encoding="utf-8"))
    assert "".join(span.text for span in page.one("div", id="prompt").children) == "a = 1\nb = "
    assert data_of(page)["selected"] == [3] * 4
    facts = {one.one("dt").text: one.one("dd").text for one in page.one("dl").all("div")}
    assert facts.items() >= {"top_p": "none", "top_k": "3", "static": "selected once"}.items()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["--prompt", "x"], "there is no profile for the model 'small': give heads"),
        (["--prompt", "x", "--heads", "[[9, 0]]"], "heads=[9, 0] must be below"),
        (["--prompt", "x", "--heads", "[]"], "must be a list of (layer, head) pairs"),
        (["--prompt", "x", "--heads", "[[0, 0]]", "--top-k", "0"], "top_k=0 must be a whole number of at least 1"),
        (["--prompt", "x", "--heads", "[[0, 0]]", "--top-p", "none", "--top-k", "none"], "can't both be None"),
        (["--prompt", "x", "--heads", "[[0, 0]]", "--chat-template-kwargs", "{}"], "needs --chat"),
        (["--prompt-file", "HERE/page.html", "--heads", "[[0, 0]]"], "must be different files"),
        (["--prompt-file", "HERE/bytes", "--heads", "[[0, 0]]"], "bytes: not UTF-8"),
        (["--prompt", "x", "--heads", "[[0, 0]]", "--html", "/no/such/folder/page.html"], "cannot be written"),
    ],
)
def test_calls_that_can_t_work_are_refused_before_the_model_is_loaded(
    call: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(command.LLM, "from_config", None)
    words = [word.replace("HERE", str(tmp_path)) for word in call]
    assert command.main([*CALL, "--html", str(tmp_path / "page.html"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_file_that_is_not_there_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*CALL, "--prompt-file", str(tmp_path / "none"), "--html", str(tmp_path / "page.html")]) == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--html", "a.html"], "one of the arguments --prompt --prompt-file is required"),
        (["--prompt", "x"], "the following arguments are required: --html"),
        (["--prompt", "x", "--html", "a", "--heads", "{}"], "must be a JSON list of [layer, head]"),
        (["--prompt", "x", "--html", "a", "--heads", "[]", "--profile", "p"], "not allowed with argument"),
        (["--prompt", "x", "--html", "a", "--top-k", "few"], "'few' must be a number, or none"),
        (["--prompt", "x", "--html", "a", "--strength", "0"], "'0' must be a number above 0"),
        (["--prompt", "x", "--html", "a", "--max-tokens", "0"], "must be a whole number of at least 1"),
    ],
)
def test_flags_that_can_t_be_used_end_the_program(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
