"""The model card of the retrieval model, from its metrics."""

from collections.abc import Mapping
from typing import Any

from models.training.records import card_fields

_CARD = """\
---
license: cc0-1.0
tags: [retrieval, long-context, jax]
---
# jaxdual retrieval

A dense decoder of {parameters:,} parameters ({family} layout, bf16) that looks things up in its context: codes of keys,
and routes over connections. It ships with jaxdual so that `python -m bench.longcontext` and the detection of retrieval
heads have a trained model that retrieves, small enough for a CPU. It knows nothing but these questions.

| | |
| --- | --- |
| layers, hidden size, heads / KV heads, head size | {layers}, {hidden}, {heads} / {kv_heads}, {head_dim} |
| feed-forward | {feed_forward} |
| vocabulary | {vocab}: bytes, 512 invented words of four letters, the words of questions and answers |
| context | trained on windows of at most {long_length} tokens; {context} positions are served |
| training | {tokens:,} tokens in {steps:,} steps, {cpu_minutes} CPU minutes of one core ({machine}), {date} |

## What it finds

Of the words and means of transport in answers, the part that is the likeliest token behind the true text before it, on
conversations that were never trained on. A guess among all words is right once in 512.

| tokens of a window | windows | right |
| --- | --- | --- |
{rows}

Whole answers, by length of the prompt and way to decode: `docs/results/longcontext.md`.

## Data

Random documents of lines "The code of dako is mive." or "From dako go to mive by bus.", and questions about them in
chat form (`models/training/retrieval.py`): the codes of one to four keys, the code some steps from a key, the route
between two places. A part of the windows are drills: lines that come again and again. Nothing was taken from anywhere.

## First weights

They were not all random: training began with heads of the first layer that look one, two and three tokens back, and
heads 0 and 2 of the second one (counted from 0) that match what the first ones wrote
(`models/training/retrieval_init.py`). So this model is no evidence of how retrieval heads form, and where they are was
known before.

## Limits

Words outside the 512 are spelled in bytes, which it was not trained on. Documents longer than its training windows are
harder for it, which is what it is for. Routes mostly have the right places, but often a wrong means of transport, and
the last step is sometimes left out. It has not been trained on chats that repeat long texts (the MRCR-like task).

## Reproduce

```
python -m models.training.train_retrieval --out DIR --cpu-minutes {budget:g}
```

A killed run goes on with `--resume`. The schedule follows CPU time, so another machine gives other weights.
"""


def retrieval_card(metrics: Mapping[str, Any]) -> str:
    """The text of ``README.md``, from what ``metrics.json`` holds."""
    rows = "\n".join(
        f"| {length} | {metrics['lookup_windows'][length]} | {right:.1%} |"
        for length, right in metrics["lookup_accuracy"].items()
    )
    return _CARD.format(
        **card_fields(metrics),
        long_length=metrics["recipe"]["long_length"],
        rows=rows,
        budget=metrics["budget_cpu_minutes"],
    )
