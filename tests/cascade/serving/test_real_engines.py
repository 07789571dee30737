"""A cascade of two of the models that ship with jaxdual, by the service, the server and the batch job."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxdual import SamplingParams
from jaxdual.cascade.config import read_cascade
from jaxdual.cascade.options import CascadeOptions
from jaxdual.cascade.probe import ConfidenceProbe, Probe
from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.cascade.work import Work
from jaxdual.model_folder import shipped_model
from models import load_config
from models.fingerprint import model_fingerprint
from tests.server.program import ROOT, Program, environment

from flax import nnx  # isort: skip

pytestmark = pytest.mark.slow

DEADLINE = 240.0
PROMPT = "def clamp(value, low, high):\n"
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def cascade_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiers "small" and "base", the first with a probe of random weights that lets everything pass."""
    folder = tmp_path_factory.mktemp("cascade")
    config = load_config(shipped_model("small"))
    zeros = jnp.zeros(config.hidden_size)
    network = ConfidenceProbe(zeros, zeros + 1, rngs=nnx.Rngs(0))
    fingerprint = model_fingerprint(shipped_model("small"), "float32").hex()
    tap = config.num_layers - 1
    probe = Probe(
        parameters=network.parameters(), model="small", fingerprint=fingerprint, num_layers=config.num_layers, tap=tap
    )
    probe.save(folder / "small.safetensors")
    file = folder / "cascade.toml"
    engine = "[tier.engine]\nmax_num_seqs = 2\nmax_model_len = 128\nmax_num_batched_tokens = 64\nblock_size = 16\n"
    engine += "compile_ahead = false\n"
    file.write_text(
        f'[[tier]]\nname = "small"\nmodel = "{shipped_model("small")}"\nprobe = "small.safetensors"\n'
        f"tau_ik = 0.0\ntau_t = 1.0\nprice_in = 1.0\n{engine}"
        f'[[tier]]\nname = "base"\nmodel = "{shipped_model("base")}"\n{engine}'
    )
    return file


def test_a_request_goes_through_both_engines_and_survives_the_death_of_one(cascade_file: Path) -> None:
    async def use() -> None:
        async with CascadeLLM.from_config(read_cascade(cascade_file)) as cascade:

            async def ask(options: CascadeOptions | None = None, params: SamplingParams = GREEDY):
                stream = await cascade.submit(PROMPT, params, options=options)
                async for _ in stream:
                    pass
                stream.close()
                return stream.output

            output = await ask()
            small, base = output.decision.hops
            assert (small.outcome, base.outcome, output.decision.tier) == ("p_t", "answered", "base")
            assert 0 < small.p_ik < 1
            assert 0 < small.p_t < 1
            tokens = len(output.prompt_token_ids)
            assert (small.spent.work.lower, small.spent.work.upper) == (tokens, tokens)
            sizes = cascade.engines["small"].info.layer_sizes
            assert small.spent.flops == 2 * sizes.parameters * tokens
            assert (base.spent.output_tokens, base.spent.work.lower) == (6, tokens + 5)
            # What decisions say that tiers computed is what their engines have counted, all of it.
            more = [await ask() for _ in range(3)]
            for place, name in enumerate(("small", "base")):
                spent = sum((one.decision.hops[place].spent.work for one in (output, *more)), Work())
                assert (await cascade.engines[name].stats()).work == spent
            alone = [one async for one in cascade.engines["base"].generate(PROMPT, GREEDY)][-1]
            assert output.outputs[0].token_ids == alone.outputs[0].token_ids
            # P(T) is at least what the model itself says of one of these letters.
            params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
            scored = [one async for one in cascade.engines["small"].generate(PROMPT, params)][-1]
            (row,) = scored.outputs[0].logprobs
            letter = next(entry for entry in row.values() if (entry.decoded_token or "").strip().isalpha())
            letters = CascadeOptions(letters=(letter.decoded_token.strip(), "("))
            assert (await ask(letters)).decision.hops[0].p_t >= math.exp(letter.logprob) - 1e-5

            # The engine dies that is about to judge the prompt; another one does.
            small = cascade.engines["small"]
            asking = asyncio.create_task(ask())
            while not small.num_unfinished:
                await asyncio.sleep(0)
            os.kill(small.engine_pid, signal.SIGKILL)
            output = await asking
            assert [hop.outcome for hop in output.decision.hops] == ["p_t", "answered"]
            assert output.outputs[0].token_ids == alone.outputs[0].token_ids
            assert small.restarts == 1

    asyncio.run(asyncio.wait_for(use(), DEADLINE))


def test_the_server_serves_the_cascade_and_its_tiers(cascade_file: Path, tmp_path: Path) -> None:
    with Program(tmp_path, "--cascade", cascade_file) as server:
        server.wait_until_serving()
        body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0}
        response = server.client.post("/v1/completions", json=body)
        assert response.headers["x-jaxdual-tier"] == "base"
        decision = response.json()["cascade"]
        assert [hop["outcome"] for hop in decision["hops"]] == ["p_t", "answered"]
        response = server.client.post("/v1/completions", json=body | {"cascade": {"max_hops": 0}})
        assert response.headers["x-jaxdual-tier"] == "small"
        small = server.client.post("/v1/completions", json=body | {"model": "small"}).json()
        assert small["choices"][0]["text"] == response.json()["choices"][0]["text"]
        names = [card["id"] for card in server.client.get("/v1/models").json()["data"]]
        assert names == ["auto", "small", "base"]
        assert "serving auto after" in server.log()
        assert 'cascade_requests_total{model_name="auto",reason="last",tier="base"} 1.0' in (
            server.client.get("/metrics").text
        )
        assert len(server.engines()) == 2
        server.process.terminate()
        assert server.process.wait(60) == 0


def test_a_batch_job_runs_through_the_cascade(cascade_file: Path, tmp_path: Path) -> None:
    lines = [
        {"custom_id": f"{number}", "url": "/v1/completions"}
        | {"body": {"prompt": f"def f{number}():", "max_tokens": 4, "temperature": 0}}
        for number in range(12)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--report", tmp_path / "report.json"]
    command = [sys.executable, "-m", "jaxdual.offline", *map(str, files), "--cascade", str(cascade_file)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert {row["response"]["body"]["cascade"]["tier"] for row in rows} == {"base"}
    small, base = json.loads((tmp_path / "report.json").read_text())["tiers"]
    assert (small["outcomes"], base["outcomes"]) == ({"p_t": 12}, {"answered": 12})
    assert small["all_passes"]["price_usd"] == pytest.approx(small["all_passes"]["prompt_tokens"] / 1e6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x"], "model='x' contradicts the cascade"),
        (["--prefill", "1", "--decode", "1"], "its tiers are engines by themselves, and prefill=1"),
    ],
)
def test_flags_that_contradict_a_cascade_are_errors(cascade_file: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "server", "--cascade", str(cascade_file), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
