"""The reference side: Hugging Face transformers on torch, on the CPU in float32.

Runs in an environment of its own (`bench.hf_environment`) and imports nothing of jaxdual.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from bench.worker_loop import serve_lines


class Reference:
    """A model and `generate`, greedy, with fixed numbers of new tokens."""

    def __init__(self) -> None:
        self._model: Any = None

    def load(self, model: str, threads: int) -> Mapping[str, Any]:
        """Loads a model folder in float32."""
        torch.set_num_threads(threads)
        start = time.perf_counter()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        # Fixed lengths without the cost of a logits processor: nothing ends an output but its limit.
        self._model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - start,
            "loaded_at": time.monotonic(),
        }

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, cache: str) -> Mapping[str, Any]:
        """Seconds for `new_tokens` of each prompt, as one left-padded batch; `cache` is "dynamic" or "static"."""
        start = time.perf_counter()
        rows = self._generate(prompts, new_tokens, cache)
        seconds = time.perf_counter() - start
        if any(len(row) != new_tokens for row in rows):
            raise RuntimeError(f"outputs of {[len(row) for row in rows]} tokens, {new_tokens} were wanted")
        return {"seconds": seconds, "first": [row[:8] for row in rows], "finished_at": time.monotonic()}

    def mixed(self, items: Sequence[Mapping[str, Any]], batch: int, cache: str) -> Mapping[str, Any]:
        """Static batches of `batch` requests in order of arrival; each runs to its longest output."""
        start = time.perf_counter()
        latencies: list[float] = []
        for first in range(0, len(items), batch):
            group = items[first : first + batch]
            time.sleep(max(0.0, group[-1]["arrival"] - (time.perf_counter() - start)))
            self._generate([item["prompt"] for item in group], max(item["output"] for item in group), cache)
            now = time.perf_counter() - start
            latencies += [now - item["arrival"] for item in group]
        return {"seconds": time.perf_counter() - start, "latencies": latencies}

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, cache: str) -> list[list[int]]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        more = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
        output = self._model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **more)
        rows: list[list[int]] = output[:, width:].tolist()
        return rows


if __name__ == "__main__":
    reference = Reference()
    serve_lines({"load": reference.load, "generate": reference.generate, "mixed": reference.mixed})
