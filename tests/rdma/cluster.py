"""A prefill and a decode engine in the guest, whose KV agents speak verbs, give the tokens of one engine on the host.

python -m tests.rdma.cluster FOLDER   FOLDER/answers.json is of `tests.rdma.blocks record`
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from jaxdual import AsyncLLM, EngineConfig, SamplingParams
from jaxdual.config import ClusterConfig
from tests.rdma.blocks import BLOCK, MODEL

SETTINGS = {
    "model": str(MODEL),
    "max_model_len": 256,
    "block_size": BLOCK,
    "num_kv_blocks": 40,
    # Few shapes, and only those that are needed: an emulated processor takes long to compile.
    "max_num_seqs": 1,
    "max_num_batched_tokens": 32,
    "compile_ahead": False,
}
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


async def together(prompt: list[int]) -> list[int]:
    """What two engines give, of which one computes the prompt and the other goes on from the blocks that came."""
    config = EngineConfig(**SETTINGS, kv_transport="verbs", kv_host="10.9.1.1")
    async with AsyncLLM.from_config(config, cluster=ClusterConfig(prefill=1, decode=1)) as llm:
        output = [output async for output in llm.generate({"prompt_token_ids": prompt}, GREEDY)][-1]
        stats = await llm.stats()
        assert stats.computed_prompt_tokens == len(prompt), "a block was computed again instead of sent"
        assert stats.handed_over_tokens == len(prompt), "not all of the prompt came"
        await llm.check_integrity()
        return list(output.outputs[0].token_ids)


def main() -> None:
    begin = time.monotonic()
    (prompt, want), *_ = json.loads((Path(sys.argv[1]) / "answers.json").read_text())
    got = asyncio.run(together(prompt))
    assert got == want, f"{got} by two engines here, {want} by one on the host"
    print(
        f"two engines that speak verbs have given the host's {len(want)} tokens for a prompt of {len(prompt)}, "
        f"in {time.monotonic() - begin:.0f} s"
    )


if __name__ == "__main__":
    main()
