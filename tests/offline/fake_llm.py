"""A stand-in for `LLM` without a model: every token is a function of the sequence before it."""

import collections
import time
import zlib
from pathlib import Path

from jaxdual import CompletionOutput, EngineConfig, EngineStats, Logprob, RequestMetrics, RequestOutput, SamplingParams
from jaxdual.front import Front
from jaxdual.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "tokenizer"
LONGEST_PROMPT = 500


class FakeLLM:
    """Runs `max_num_seqs` sequences at once, one token a step; ends a sequence at a token that 7 divides."""

    system_fingerprint = "fp_fake"

    def __init__(self, config=None):
        self.config = config or EngineConfig(max_num_seqs=4)
        self.served_model_name = self.config.served_model_name or "fake"
        self.running = {}
        self.waiting = collections.deque()
        self.tokenizer = Tokenizer.from_dir(TOKENIZER)
        self.front = Front(None, self.tokenizer, vocab_size=self.tokenizer.vocab_size, max_model_len=LONGEST_PROMPT)
        self.idle_slot_steps = 0
        self.most_unfinished = 0
        self.generated = 0
        self.warm = False
        self.aborted = []
        self.seeds = {}
        self.users = {}

    @classmethod
    def from_config(cls, config):
        return cls(config)

    def get_default_sampling_params(self):
        return SamplingParams()

    def get_tokenizer(self):
        return self.tokenizer

    def tokenize(self, prompt, **options):
        return self.front.tokenize(prompt, **options)

    def tokenize_chat(self, messages, **options):
        return self.front.tokenize_chat(messages, **options)

    def submit(self, prompt, params, request_id, *, user):
        ids = prompt.tokens
        if len(ids) > LONGEST_PROMPT:
            raise ValueError(f"the prompt has {len(ids)} tokens, at most {LONGEST_PROMPT} fit")
        self.waiting.append((request_id, list(ids), params, time.monotonic()))
        self.seeds[request_id] = params.seed
        self.users[request_id] = user
        self.most_unfinished = max(self.most_unfinished, self.num_unfinished)

    def abort(self, request_id):
        self.aborted.append(request_id)
        self.waiting = collections.deque(w for w in self.waiting if w[0] != request_id)
        self.running.pop(request_id, None)

    @property
    def num_unfinished(self):
        return len(self.waiting) + len(self.running)

    @property
    def has_unfinished(self):
        return self.num_unfinished > 0

    def step(self):
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            request_id, ids, params, arrival = self.waiting.popleft()
            self.running[request_id] = (ids, params, arrival, [[] for _ in range(params.n)])
        self.idle_slot_steps += self.config.max_num_seqs - len(self.running)
        outputs = []
        for request_id, (ids, params, arrival, tokens) in list(self.running.items()):
            for index, sequence in enumerate(tokens):
                if finish_reason(sequence, params) is None:
                    sequence.append(next_token(ids, sequence, params.seed, index))
                    self.generated += 1
            finished = all(finish_reason(sequence, params) for sequence in tokens)
            if finished:
                del self.running[request_id]
            outputs.append(self.output(request_id, ids, params, arrival, tokens, finished))
        return outputs

    def output(self, request_id, ids, params, arrival, tokens, finished):
        now = time.monotonic()
        completions = [
            CompletionOutput(
                index=index,
                text=self.tokenizer.decode(sequence, skip_special_tokens=True) if finished else "",
                token_ids=list(sequence),
                logprobs=None if params.logprobs is None else [candidates(t) for t in sequence],
                cumulative_logprob=None,
                finish_reason=finish_reason(sequence, params),
                stop_reason=None,
            )
            for index, sequence in enumerate(tokens)
        ]
        return RequestOutput(
            request_id=request_id,
            prompt=None,
            prompt_token_ids=ids,
            prompt_logprobs=None if params.prompt_logprobs is None else [None, *(candidates(t) for t in ids[1:])],
            outputs=completions,
            finished=finished,
            metrics=RequestMetrics(arrival_time=arrival, first_token_time=now, finished_time=now),
            num_cached_tokens=len(ids) // 2,
        )

    def close(self):
        pass

    def warmup(self):
        self.warm = True

    def stats(self):
        return EngineStats(generation_tokens=self.generated, prefix_cache_queries=10)


def next_token(prompt, sequence, seed, index):
    return zlib.crc32(repr((prompt, sequence, seed, index)).encode()) % 1000


def finish_reason(sequence, params):
    if sequence and sequence[-1] % 7 == 0:
        return "stop"
    return "length" if len(sequence) >= params.max_tokens else None


def candidates(token):
    return {token: Logprob(-0.5, 1, ""), (token + 1) % 1000: Logprob(-1.5, 2, "")}
