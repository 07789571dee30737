"""A model with Interleaved Head Attention behind the gRPC face."""

import asyncio
import random

import pytest

from jaxdual import LLM, AsyncLLM, SamplingParams
from server.proto.jaxdual.v1 import inference_pb2 as pb
from tests.engine.models import TieCounter, folder
from tests.iha_models import config_of, reference_logits
from tests.server.grpc.face import read_all, serving

SETTINGS = {"block_size": 8, "max_model_len": 160, "max_num_seqs": 6, "max_num_batched_tokens": 24, "seed": 0}


@pytest.mark.slow
def test_tokens_are_those_of_the_oracle_beside_sampled_traffic_with_prefix_hits_and_preemption():
    rng = random.Random(4)
    stem = [rng.randrange(96) for _ in range(30)]
    prompts = [
        stem[: rng.choice([0, 16, 30])] + [rng.randrange(96) for _ in range(rng.randint(1, 30))] for _ in range(12)
    ]
    greedy = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    sampled = {"max_tokens": 60, "temperature": 1.0, "seed": 9, "n": 2, "ignore_eos": True}

    def request(prompt, params):
        ids = pb.TokenIds(ids=prompt)
        return pb.GenerateRequest(token_ids=ids, sampling_params=pb.SamplingParams(**params))

    async def use():
        llm = AsyncLLM(str(folder("iha")), **SETTINGS, num_kv_blocks=20)
        async with llm, serving(llm) as face:
            calls = [face.stub.Generate(request(prompt, params)) for prompt in prompts for params in (greedy, sampled)]
            streams = await asyncio.gather(*(read_all(call) for call in calls))
            tokens = [{0: [], 1: []} for _ in streams]
            for found, stream in zip(tokens, streams, strict=True):
                for delta in (delta for message in stream for delta in message.outputs):
                    found[delta.index] += delta.token_ids
            stats = await llm.stats()
            await llm.check_integrity()
            return tokens, stats

    tokens, stats = asyncio.run(asyncio.wait_for(use(), 240))
    assert stats.preemptions > 0
    assert stats.prefix_cache_hits > 0
    alone = LLM(folder("iha"), **SETTINGS | {"max_num_seqs": 1, "enable_prefix_caching": False})
    ties = TieCounter("iha")
    for number, prompt in enumerate(prompts):
        got, drawn = tokens[2 * number][0], tokens[2 * number + 1]
        logits = reference_logits(folder("iha"), config_of("iha"), [*prompt, *got])
        for at, token in enumerate(got, len(prompt) - 1):
            assert logits[at].max() - logits[at, token] <= 1e-3
        for params, found in ((greedy, [got]), (sampled, [drawn[0], drawn[1]])):
            want = alone.generate([{"prompt_token_ids": prompt}], SamplingParams(**params))[0]
            for expected, one in zip(want.outputs, found, strict=True):
                ties.compare(prompt, expected.token_ids, one)
    ties.check()
