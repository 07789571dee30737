"""The model card of a trained model, from its metrics."""

from collections.abc import Mapping
from typing import Any

from models.training.records import card_fields
from models.training.tokenizer import render_chat

# One of each use: plain code, a method, a docstring, and a chat request.
PROMPTS = (
    "import os\nimport sys\n\n\ndef main(argv=None):\n",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    'def read_file(path):\n    """',
    "    def __repr__(self):\n        return",
    render_chat(
        [{"role": "user", "content": "Write a Python function `join`: Join two or more path components."}],
        add_generation_prompt=True,
    ),
)

_FOLLOWS_TIME = "The schedule follows CPU time, so another machine gives other weights."

_CARD = """\
---
license: psf-2.0
language: [code]
tags: [python, jax]
---
# jaxdual {size}

A {kind} decoder of {parameters:,} parameters ({family} layout, bf16) that continues Python source. It ships with
jaxdual so that the first command produces real text with no network, and so that tests and measurements have a trained
model. It is far too small to be useful as an assistant.

| | |
| --- | --- |
| layers, hidden size, heads / KV heads, head size | {layers}, {hidden}, {heads} / {kv_heads}, {head_dim} |
| feed-forward | {feed_forward} |
| vocabulary, context | {vocab} (byte-level BPE, shared by all shipped models), {context} tokens |
| training | {tokens:,} tokens in {steps:,} steps, {cpu_minutes} CPU minutes of one core ({machine}), {date} |

## Held-out bits per byte

Measured on the saved bf16 weights, computing in float32, over all {heldout_files} held-out files ({heldout_bytes:,}
bytes), each alone behind one `<|endoftext|>`, in windows of {window} tokens every {stride}; a token is scored once, in
the first window that predicts it.

| | bits per byte |
| --- | --- |
| **this model** | **{bits:.3f}** |
| byte frequencies of the training text | {unigram:.3f} |
| xz of the held-out text alone | {lzma_alone:.3f} |
| xz of the held-out text behind the training text | {lzma_after_train:.3f} |

## Data

Python source of CPython {python}'s standard library, without tests and machine-made tables: the files, their SHA-256
and the split are in `models/training/corpus.json`. Held-out files were seen neither by the tokenizer nor in training.
About an eighth of the training tokens are the library's own functions in chat form: the request is "Write a Python
function `name`: first line of its docstring", the answer is the source, ended by `<|im_end|>`. There is no normaliser,
so text comes back byte for byte.

The text is (c) Python Software Foundation and contributors, under the PSF License Agreement (version 2); the weights
are derived from it and may repeat passages of it.

## Limits

It knows the standard library's style and little else: code that looks like Python often does not run. Facts,
reasoning, other languages and long instructions are beyond it. A chat request outside the form above gets an answer of
no value. It was trained on at most {context} tokens of context, and there is no safety training.

## Greedy completions

{samples}

## Reproduce

```
python -m models.training.train --size {size} --out DIR {budget}
```

A killed run goes on with `--resume`. {repeats}
"""


def model_card(metrics: Mapping[str, Any]) -> str:
    """The text of ``README.md``, from what ``metrics.json`` holds."""
    config, baselines = metrics["config"], metrics["baselines_bits_per_byte"]
    minutes = metrics["budget_cpu_minutes"]
    if minutes is None:
        width, repeats = config["intermediate_size"], "The schedule follows steps, whatever time they take."
        budget = f"--intermediate-size {width} --steps {metrics['steps']}"
    else:
        budget, repeats = f"--cpu-minutes {minutes:.0f}", _FOLLOWS_TIME
    moe = config["moe"]
    if moe is None:
        kind, feed_forward = "dense", f"{config['intermediate_size']} (SwiGLU)"
    else:
        kind = "mixture-of-experts"
        feed_forward = (
            f"{moe['num_experts']} experts of {moe['intermediate_size']} (SwiGLU), {moe['num_experts_per_tok']} a token"
        )
    return _CARD.format(
        **card_fields(metrics) | {"feed_forward": feed_forward},
        kind=kind,
        heldout_files=metrics["heldout_files"],
        heldout_bytes=metrics["heldout_bytes"],
        window=metrics["heldout_window"],
        stride=metrics["heldout_stride"],
        bits=metrics["heldout_bits_per_byte"],
        unigram=baselines["unigram"],
        lzma_alone=baselines["lzma_alone"],
        lzma_after_train=baselines["lzma_after_train"],
        python=metrics["corpus_python"],
        samples="\n\n".join(_sample(**sample) for sample in metrics["samples"]),
        budget=budget,
        repeats=repeats,
    )


def _sample(prompt: str, completion: str) -> str:
    return f"Prompt:\n\n````\n{prompt}\n````\n\nContinuation:\n\n````\n{completion}\n````"
