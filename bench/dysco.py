"""`python -m bench.dysco`: what DySCO costs a decode step and a first token, and how far its cheaper modes are from it.

Steps of all kinds take turns on one engine, in an order that changes, so that what else the machine does meets them
alike: vanilla, each mode for all sequences, the exact mode for some of them, and the first pass by itself. Compared are
the turns of one round; vanilla is there twice, which shows what differs by chance. Beside each ratio stands that of
the bytes and of the arithmetic of the step (`bench.dysco_cost`).

Agreement is that of each mode with the exact one, over prompts of held-out text, from the model's own greedy tokens and
along the text's own continuation, which all modes are given; vanilla's distance from the exact mode is the yardstick.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import models
from bench.dysco_agreement import MODES, measure_agreement
from bench.dysco_cost import Sizes, StepShape, byte_ratio, flop_ratio
from bench.dysco_steps import TURN, Steps, arms_of, measure_first_tokens, measure_steps, mixed_sizes
from bench.report import header, table, write_json
from jaxdual import LLM, DyscoParams
from models.training.corpus import read_texts

GOAL = 1.15  # times the ratio of bytes
MIXED_GOAL = 1.02  # what vanilla sequences of a mixed step pay besides the first pass
# The best four of `python -m jaxdual.heads detect --model models/shipped/base --count 32 --documents 4 --max-layer 5`:
# layer 5 of 8 is about as far up as the last retrieval head of Qwen3-8B.
HEADS = ((5, 1), (5, 0), (5, 3), (4, 0))
_ROOM = 64  # tokens of the model's reach that decoding is left
_FIRST_TOKENS: dict[str, dict[str, Any] | None] = {
    "vanilla": None,
    "exact": {},
    "tail_chunk": {"mode": "tail_chunk"},
    "lag": {"mode": "lag"},
    "static": {"static": True},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.dysco", description=__doc__)
    parser.add_argument("--model", default="models/shipped/base", help="folder of a dense model")
    parser.add_argument("--heads", type=json.loads, default=HEADS, help="[[layer, head], ...]; default those of base")
    parser.add_argument("--top-k", type=int, default=64, help="a sixteenth of the prompt, as 4096 of 64K")
    parser.add_argument("--tail", type=int, default=4, help="tokens of a prompt that are raised")
    parser.add_argument("--context", type=int, default=960, help="tokens of a prompt")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16], help="of a step")
    parser.add_argument("--turns", type=int, default=150, help=f"of each kind of step, of {TURN} steps each")
    parser.add_argument("--first-tokens", type=int, default=20, help="prompts of which each kind's is timed")
    parser.add_argument("--prompts", type=int, default=64, help="over which modes are compared")
    parser.add_argument("--tokens", type=int, default=48, help="decoded of each")
    parser.add_argument("--quick", action="store_true", help="few of everything, in about four minutes")
    parser.add_argument("--markdown", metavar="FILE", help="where the tables go, as a document has them")
    parser.add_argument("--from-json", metavar="FILE", help="measures nothing: tables of this report")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.quick:
        options.turns, options.first_tokens, options.prompts, options.tokens = 10, 3, 6, 16
    if options.from_json:
        with open(options.from_json, encoding="utf-8") as file:
            report = json.load(file)
    else:
        report = _measured(options)
    tables = _tables(report)
    for title, columns, rows in tables:
        print(f"{title}\n\n{table(columns, rows)}\n")
    if options.markdown:
        with open(options.markdown, "w", encoding="utf-8") as file:
            file.write("\n\n".join(f"{title}\n\n{markdown(columns, rows)}" for title, columns, rows in tables) + "\n")
    return 0


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    heads = [tuple(pair) for pair in options.heads]
    report = header("bench.dysco") | {
        "goal": GOAL,
        "mixed_goal": MIXED_GOAL,
        "heads": heads,
        "context": options.context,
    }
    dysco = {"heads": heads, "top_k": options.top_k, "tail": options.tail, "template_sequences": ()}
    llm = _engine(options, max(options.sequences), enable_prefix_caching=False)
    texts = _texts(llm, options.context, max(options.sequences))
    sizes, last_layer = _sizes(llm), max(layer for layer, _ in heads)
    steps = Steps(llm, texts, DyscoParams(**dysco))
    report["steps"] = []
    for sequences in options.sequences:
        seconds = measure_steps(steps, sequences, options.turns)
        found = step_figures(seconds, sizes, sequences, options.context, last_layer, len(heads))
        report["steps"].append({"sequences": sequences} | found)
        write_json(options.json, report)
    llm.close()

    llm = _engine(options, 1)
    prompts = _texts(llm, options.context, options.first_tokens + 1)
    kinds = {kind: None if of is None else DyscoParams(**dysco | of) for kind, of in _FIRST_TOKENS.items()}
    first = measure_first_tokens(llm, prompts, kinds)
    report["first_token"] = {
        kind: {
            "ms": float(np.median(seconds)) * 1e3,
            "more_ms": _interval((seconds - first["vanilla"]) * 1e3),
        }
        for kind, seconds in first.items()
    }
    write_json(options.json, report)
    llm.close()

    llm = _engine(options, len(MODES))
    given = _texts(llm, options.context - _ROOM + options.tokens, options.prompts)
    likeness = measure_agreement(llm, given, options.context - _ROOM, dysco)
    report["agreement"] = {
        mode: {
            "same_tokens": _interval(likeness.same_tokens[mode], np.mean),
            "divergence": _interval(likeness.divergence[mode], np.mean),
            "divergence_by_vanilla": _quotient(likeness.divergence[mode], likeness.divergence["vanilla"]),
            "same_top": _interval(likeness.same_top[mode], np.mean),
            "jaccard": _interval(likeness.jaccard[mode], np.mean),
        }
        for mode in MODES
        if mode != "exact"
    }
    report |= {"prompts": len(given), "tokens": options.tokens, "prompt_length": options.context - _ROOM}
    write_json(options.json, report)
    llm.close()
    return report


def step_figures(
    seconds: Mapping[str, np.ndarray], sizes: Sizes, sequences: int, context: int, last_layer: int, heads: int
) -> dict[str, Any]:
    """Of the seconds of all kinds of steps: ratios to vanilla, and to what they should be.

    Args:
      seconds: by arm, those of each turn.
      context: tokens of a prompt.
      last_layer, heads: with a retrieval head, and how many there are.
    """
    vanilla, arms = seconds["vanilla"], {}
    for arm in arms_of(sequences):
        found: dict[str, Any] = {"ms": float(np.median(seconds[arm.name])) * 1e3}
        found["ratio"] = _interval(seconds[arm.name] / vanilla)
        if arm.mode is not None and not arm.peek_only:
            shape = StepShape(
                sequences=sequences,
                keys=context + 2,
                peeked=arm.watched if arm.mode in ("exact", "refresh") else 0,
                raised=arm.watched,
                every=TURN if arm.mode == "refresh" else 1,
            )
            found["byte_ratio"] = byte_ratio(sizes, shape, last_layer, 0 if arm.mode == "static" else heads)
            found["flop_ratio"] = flop_ratio(sizes, shape, last_layer)
            found["by_bytes"] = found["ratio"][0] / found["byte_ratio"]
        arms[arm.name] = found
    others = {}
    for part in [sequences, *mixed_sizes(sequences)]:
        name = "exact" if part == sequences else f"exact, {part} of {sequences}"
        others[name] = _interval((seconds[name] - seconds[f"first pass of {part}"]) / vanilla)
    return {"arms": arms, "without_first_pass": others}


def _engine(options: argparse.Namespace, sequences: int, **settings: Any) -> LLM:
    return LLM(
        options.model,
        dtype="float32",
        max_num_seqs=sequences,
        max_num_batched_tokens=2048,
        max_model_len=options.context + _ROOM,
        async_scheduling=False,
        seed=0,
        **settings,
    )


def _texts(llm: LLM, length: int, count: int) -> list[list[int]]:
    """Parts of the text that shipped models have not seen, evenly far apart.

    Raises:
      ValueError: there are not as many tokens.
    """
    text = "\n".join(read_texts("heldout", allow_changed=True).values())
    tokens = llm.get_tokenizer().encode(text)
    if len(tokens) < length + count:
        raise ValueError(f"{count} texts of {length} tokens are more than {len(tokens)}")
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return [tokens[start : start + length] for start in starts]


def _sizes(llm: LLM) -> Sizes:
    return Sizes.of(models.load_config(Path(llm.info.model_folder)), 4)


def _interval(values: np.ndarray, middle: Any = np.median) -> list[float]:
    """Middle of some values, and its 95 % interval by resampling them."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    return [float(middle(values)), *np.percentile(middle(drawn, axis=1), [2.5, 97.5]).tolist()]


def _quotient(values: np.ndarray, by: np.ndarray) -> list[float]:
    """Quotient of two means, and its 95 % interval by resampling pairs."""
    drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    quotients = values[drawn].mean(axis=1) / by[drawn].mean(axis=1)
    return [float(values.mean() / by.mean()), *np.percentile(quotients, [2.5, 97.5]).tolist()]


# Tables: title, names of columns, rows.


def _tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[object]]]]:
    tables = []
    for of_batch in report["steps"]:
        rows: list[list[object]] = [
            [
                name,
                f"{arm['ms']:.2f}",
                _told(arm["ratio"], 3),
                *(f"{arm[key]:.3f}" if key in arm else None for key in ("byte_ratio", "flop_ratio", "by_bytes")),
            ]
            for name, arm in of_batch["arms"].items()
        ]
        columns = ["step", "ms", "by vanilla", "bytes", "arithmetic", "measured by bytes"]
        tables.append((f"Steps of {of_batch['sequences']}, {report['context']} tokens of each", columns, rows))
        rows = [[name, _told(ratio, 3)] for name, ratio in of_batch["without_first_pass"].items()]
        title = f"Steps of {of_batch['sequences']} without their first pass"
        tables.append((title, ["step", "by vanilla"], rows))
    rows = [
        [kind, f"{of_kind['ms']:.1f}", _told(of_kind["more_ms"], 1)] for kind, of_kind in report["first_token"].items()
    ]
    tables.append(
        (
            f"First token of {report['context']}, most of which the prefix cache has",
            ["mode", "ms", "more than vanilla, ms"],
            rows,
        )
    )
    rows = [
        [
            mode,
            _told(found["same_tokens"], 1),
            _told(found["divergence"], 4),
            _told(found["divergence_by_vanilla"], 2),
            _told(found["same_top"], 3),
            _told(found["jaccard"], 3),
        ]
        for mode, found in report["agreement"].items()
    ]
    columns = ["mode", "tokens alike", "KL from exact, nats", "by vanilla's", "likeliest alike", "selections' Jaccard"]
    title = f"Agreement with the exact mode over {report['prompts']} prompts, {report['tokens']} tokens each"
    tables.append((title, columns, rows))
    return tables


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as Markdown has it."""
    lines = [columns, ["---"] * len(columns), *(["–" if cell is None else str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _told(interval: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in interval)
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    sys.exit(main())
