"""Test questions through real engines: whether they decide and compute as the ledger says, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cascade.asked import MULTIPLE_CHOICE, Asked, Reader, Setting
from bench.cascade.measure import gates_of
from jaxdual.cascade.evaluation.chain import Chain, Tier
from jaxdual.cascade.evaluation.engines import compare, run_engines
from jaxdual.cascade.evaluation.item_prompts import prompt_of
from jaxdual.cascade.evaluation.judging import paper_gates
from jaxdual.cascade.evaluation.train import Recipe, probe_of
from jaxdual.config import EngineConfig
from jaxdual.tokenizer import Tokenizer

_SIZES: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 64, "max_num_batched_tokens": 2048}


def through_engines(setting: Setting, readers: Sequence[Reader], asked: Sequence[Asked], kept: Path) -> dict[str, Any]:
    """Chosen and the paper's thresholds through engines, and the larger model's engine alone.

    Args:
      setting, readers, asked: of the benchmark.
      kept: folder for the probe's file.
    """
    kind = next(one for one in asked if one.name == MULTIPLE_CHOICE)
    signals = [reader.read(kind) for reader in readers]
    probe, _ = probe_of(signals[0], Recipe(rate=setting.rate, epochs=setting.epochs, seed=setting.seeds[0]))
    file = kept / "probe.safetensors"
    probe.save(file)
    chain = Chain((Tier.of(signals[0], probe), Tier.of(signals[1], None)))
    test = chain.of("test")
    items = [item for item, split in zip(kind.items, kind.splits, strict=True) if split == "test"]
    prompts = []
    for folder in setting.models:
        tokenizer = Tokenizer.from_dir(folder)
        prompts.append([prompt_of(tokenizer, item, setting.form) for item in items])
    small, large = (
        EngineConfig(
            model=str(folder),
            dtype="float32",
            enable_prefix_caching=False,
            probe=str(file) if place == 0 else None,
            **_SIZES,
        )
        for place, folder in enumerate(setting.models)
    )
    (alone,) = run_engines([large], prompts[1:], [], 1)
    found: dict[str, Any] = {"largest_alone": {"seconds": alone.seconds, "lower_tokens": alone.work.lower}}
    for name, gates in (("chosen", gates_of(chain, "both", "none", "full")), ("paper", paper_gates(test))):
        runs = run_engines([small, large], prompts, gates, 1)
        found[name] = compare(test, gates, runs) | {"seconds": sum(run.seconds for run in runs)}
    return found
