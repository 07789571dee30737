"""Batch jobs through the real engine and a tiny model with random weights."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import models
from jaxdual.offline import __main__ as command

FIXTURES = Path(__file__).parents[1] / "fixtures"
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 2047,
}
HEADER = "import os\nimport sys\n\n\ndef main(arguments):\n    for name in arguments:\n        print(name)\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    models.save(models.init(models.load_config(folder), seed=1), folder, dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(FIXTURES / "tokenizer" / name, folder / name)
    return folder


def arguments(model, source, output):
    engine = ["--max-num-seqs", "2", "--max-model-len", "128", "--block-size", "16", "--max-num-batched-tokens", "128"]
    return ["-i", str(source), "-o", str(output), "--model", str(model), "--no-progress", *engine]


def write(path, count):
    lines = [
        {"custom_id": f"text-{i}", "url": "/v1/completions", "body": {"prompt": f"{HEADER}\n# {i}", "max_tokens": 12}}
        for i in range(count)
    ]
    lines[1]["body"] |= {"n": 2, "temperature": 0, "logprobs": 2, "echo": True}
    lines[2]["body"] |= {"prompt": "x " * 500}
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    lines.append({"custom_id": "chat", "url": "/v1/chat/completions", "body": chat})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_batch_through_the_engine_and_again_from_the_middle(model, tmp_path):
    source, output, report = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "report.json"))
    write(source, 8)
    assert command.main([*arguments(model, source, output), "--report", str(report)]) == 0
    whole = output.read_bytes().splitlines(keepends=True)
    rows = {row["custom_id"]: row for row in map(json.loads, whole)}
    assert len(rows) == len(whole) == 9
    assert "at most 127, since max_model_len is 128" in rows["text-2"]["error"]["message"]

    body = rows["text-1"]["response"]["body"]
    assert body["usage"]["completion_tokens"] == 24
    for choice in body["choices"]:
        assert choice["text"].startswith(f"{HEADER}\n# 1")
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == body["usage"]["prompt_tokens"] + 12
        assert logprobs["token_logprobs"][0] is None
        assert all(value < 0 for value in logprobs["token_logprobs"][1:])
        prompt = f"{HEADER}\n# 1"
        assert "".join(logprobs["tokens"][: body["usage"]["prompt_tokens"]]) == prompt
        assert logprobs["text_offset"][body["usage"]["prompt_tokens"]] == len(prompt)
    content = rows["chat"]["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 3 for token in content)
    assert all(token["top_logprobs"][0]["logprob"] >= token["logprob"] for token in content)

    found = json.loads(report.read_text())
    assert found["requests"] == {"ok": 8, "failed": 1, "skipped": 0}
    assert found["prefix_cache"]["hit_tokens"] > 0
    assert found["tokens"]["completion"] == sum(
        row["response"]["body"]["usage"]["completion_tokens"] for row in rows.values() if row["response"]
    )

    output.write_bytes(b"".join(whole[:4]) + whole[4][:30])
    assert command.main(arguments(model, source, output)) == 0
    again = {row["custom_id"]: row for row in map(json.loads, output.read_bytes().splitlines())}
    assert {k: texts(row) for k, row in again.items()} == {k: texts(row) for k, row in rows.items()}


def texts(row):
    """A row without log probabilities, whose last bits depend on what ran beside the request."""
    for choice in row["response"]["body"]["choices"] if row["response"] else ():
        choice["logprobs"] = None
    return row


def test_interrupt_leaves_a_job_that_continues(model, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, 400)
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxdual.offline", *arguments(model, source, output)], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not output.exists() or output.stat().st_size < 2000:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "the same command continues" in error
    assert "Traceback" not in error
    assert 0 < len(output.read_bytes().splitlines()) < 401
