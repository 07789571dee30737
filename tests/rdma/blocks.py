"""What the RDMA run moves: the Full Blocks of a prefill, and whether an engine goes on from what has arrived.

python -m tests.rdma.blocks record FOLDER   prefill; stored blocks in FOLDER/sent, tokens in FOLDER/answers.json
python -m tests.rdma.blocks check FOLDER    the same tokens from the blocks in FOLDER/arrived, which are all read
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

MODEL = Path(__file__).resolve().parents[2] / "models/shipped/small"
BLOCK = 16
PROMPTS = (
    "def parse(line):\n    " + "key, _, value = line.partition('=')\n    " * 8,
    "class Reader:\n    def __init__(self, path):\n        self.path = path\n" * 4,
)


def generate(store: Path, asked: list[Any]) -> tuple[list[Any], Any]:
    """Greedy outputs of an engine on a block store, and its statistics after it has stored everything."""
    from jaxdual import LLM, SamplingParams  # the guest has no JAX

    settings = {"max_model_len": 512, "block_size": BLOCK, "max_num_seqs": 2, "num_kv_blocks": 96}
    llm = LLM(str(MODEL), kv_store=str(store), kv_store_capacity_bytes=1 << 28, **settings)
    outputs = llm.generate(asked, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
    llm.close()
    return outputs, llm.stats()


def record(folder: Path) -> None:
    """Computes, stores and notes what came out."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outputs, stats = generate(folder / "sent", list(PROMPTS))
    assert not stats.store_blocks_lost
    answers = [[list(output.prompt_token_ids), list(output.outputs[0].token_ids)] for output in outputs]
    (folder / "answers.json").write_text(json.dumps(answers))
    files = [path for path in (folder / "sent").rglob("*") if path.is_file()]
    print(
        f"recorded {len(files)} blocks, {sum(path.stat().st_size for path in files)} bytes, of {len(answers)} prompts"
    )


def check(folder: Path) -> None:
    """Has another engine go on from what has arrived."""
    answers = json.loads((folder / "answers.json").read_text())
    outputs, stats = generate(folder / "arrived", [{"prompt_token_ids": prompt} for prompt, _ in answers])
    for (prompt, tokens), output in zip(answers, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == tokens, "other tokens than without the transfer"
        assert output.num_cached_tokens == (len(prompt) - 1) // BLOCK * BLOCK, "blocks were computed, not read"
    print(f"an engine has read {stats.store_blocks_read} blocks that came over RDMA, and given the same tokens")


if __name__ == "__main__":
    {"record": record, "check": check}[sys.argv[1]](Path(sys.argv[2]))
