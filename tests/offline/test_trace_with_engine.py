"""A replay through the real engine and a tiny model with random weights."""

import json
from pathlib import Path

import pytest

from jaxdual.async_api import AsyncLLM
from jaxdual.offline import __main__ as command
from jaxdual.offline import replay_command

MODEL = Path(__file__).parents[1] / "fixtures" / "hf" / "qwen3"
BLOCK = 8
TURNS = ((40, 10, 0), (20, 7, 0), (9, 12, 15), (30, 5, 0))  # append, generate, drop


@pytest.fixture
def outputs(monkeypatch):
    """Prompt and output of every request, in the order of their ends, by agent."""
    served = {}

    class Recorded(AsyncLLM):
        async def submit(self, prompt, params=None, request_id=None, **options):
            stream = await super().submit(prompt, params, request_id, **options)
            agent = request_id.partition("-turn")[0]
            served.setdefault(agent, []).append(stream.output)
            return stream

    monkeypatch.setattr(replay_command, "AsyncLLM", Recorded)
    return served


@pytest.mark.slow
def test_replay_sends_real_outputs_again_and_hits_what_arithmetic_says(outputs, tmp_path):
    trace, file = tmp_path / "trace.jsonl", tmp_path / "report.json"
    turns = [{"append": append, "generate": generate, "drop": drop} for append, generate, drop in TURNS]
    trace.write_text("".join(json.dumps({"session_id": name, "turns": turns}) + "\n" for name in "ab"))
    engine = ["--max-num-seqs", "2", "--max-model-len", "128", "--block-size", f"{BLOCK}", "--num-kv-blocks", "64"]
    arguments = ["--trace", str(trace), "--model", str(MODEL), "--report", str(file), "--no-progress", *engine]
    assert command.main(arguments) == 0

    assert len(outputs) == 2
    prompt_tokens = cached_tokens = 0
    for requests in outputs.values():
        context, in_cache = [], 0
        for output, (append, generate, drop) in zip(requests, TURNS, strict=True):
            kept = context[: len(context) - drop]
            assert output.prompt_token_ids[: len(kept)] == kept
            assert len(output.prompt_token_ids) == len(kept) + append
            tokens = output.outputs[0].token_ids
            assert len(tokens) == generate
            # Full blocks of what was computed before; the last output token never was.
            expected = min(len(kept), in_cache) // BLOCK * BLOCK
            assert output.num_cached_tokens == expected
            prompt_tokens, cached_tokens = prompt_tokens + len(output.prompt_token_ids), cached_tokens + expected
            context = [*output.prompt_token_ids, *tokens]
            in_cache = len(context) - 1
    assert outputs["agent-0"][0].prompt_token_ids != outputs["agent-1"][0].prompt_token_ids

    report = json.loads(file.read_text())
    assert report["tokens"] == {"prompt": prompt_tokens, "cached": cached_tokens, "generation": 2 * 34}
    assert report["hit_rate"] == cached_tokens / prompt_tokens
    difference = report["engine"]["difference"]
    assert difference["prefix_cache_queries"] == prompt_tokens
    assert difference["prefix_cache_hits"] == cached_tokens
    assert report["jct_s"] == report["seconds"] > 0
    for agent in report["agents"]:
        times = [request[key] for request in agent["requests"] for key in ("ttft_s", "ttst_s", "tpot_s")]
        assert all(time > 0 for time in times)
        assert agent["jct_s"] >= sum(request["ttft_s"] for request in agent["requests"])
    assert report["ttft_parts_s"]["queue"] is not None
