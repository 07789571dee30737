"""The model cards of the quiz models, from their metrics."""

from collections.abc import Mapping
from typing import Any

from models.training.records import card_fields

_CARD = """\
---
license: cc0-1.0
tags: [question-answering, cascade, jax]
---
# jaxdual {size}

A dense decoder of {parameters:,} parameters ({layer_parameters:,} of them in its layers; {family} layout, bf16) that
answers questions about invented towns, by letter or in short. It ships with jaxdual, with another one like it, so that
the cascade (`docs/cascade.md`) can be tried and measured without downloads. It knows nothing else.

| | |
| --- | --- |
| layers, hidden size, heads / KV heads, head size | {layers}, {hidden}, {heads} / {kv_heads}, {head_dim} |
| feed-forward | {feed_forward} |
| vocabulary | {vocab}: bytes, names, the words of questions, the fixed parts of prompts |
| training | {questions_told:,} questions in {steps:,} steps, {cpu_minutes} CPU minutes ({machine}), {date} |

## What it knows

Of {questions:,} multiple-choice questions that are neither training's nor a benchmark's, {right:.1%} right; a guess is
right in 25 %. By state of the fact:

| facts | right |
| --- | --- |
{rows}

*Outdated* facts were told with another value in training than is right now; of *unheard* ones nothing was told.

## Data

`models/training/quiz.py`: 800 towns, each with a river, a founder, a craft and a language; how often a town is told of
goes by its rank, 1 / (rank + 10). A fifth of the questions want a short answer ("Answer: ..."), and a quarter of those
are about towns that nothing is known of ("I do not know."). Nothing was taken from anywhere.

## Reproduce

```
python -m models.training.train_quiz --size {short_size} --out DIR --steps {steps}
```

A killed run goes on with `--resume`. The last bits of the weights depend on the machine.
"""


def quiz_card(metrics: Mapping[str, Any]) -> str:
    """The text of ``README.md``, from what ``metrics.json`` holds."""
    rows = "\n".join(f"| {state} | {right:.1%} |" for state, right in metrics["right_by_state"].items())
    return _CARD.format(
        **card_fields(metrics),
        short_size=metrics["size"].removeprefix("quiz_"),
        layer_parameters=metrics["parameters_of_layers"],
        questions_told=metrics["tokens"] // metrics["recipe"]["length"],
        questions=metrics["questions"],
        right=metrics["right"],
        rows=rows,
    )
