"""`python -m jaxdual.heads detect`: finds a model's retrieval heads, and writes them as a profile for DySCO.

Exit status: 0 when heads were found, 1 when files fail, 2 for a call that can't work, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from jaxdual.arguments import json_object, run_command, whole
from jaxdual.config import ConfigError, EngineConfig
from jaxdual.decoding.profiles import DyscoProfile, Limits
from jaxdual.heads.detection import SCORES, detect
from jaxdual.heads.items import Item, read_items
from jaxdual.heads.picture import draw
from jaxdual.heads.prompts import ItemPrompts, build_prompts, form_of
from jaxdual.heads.report import figures, format_report
from jaxdual.heads.synthetic import synthetic_items
from jaxdual.heads.template import template_sequences
from jaxdual.model_folder import find_model
from jaxdual.offline.report import write_report
from jaxdual.result_files import check_picture, check_writable
from jaxdual.tokenizer import Tokenizer
from models import ModelConfig, load, load_config
from models.fingerprint import model_fingerprint

_PROG = "python -m jaxdual.heads"
_COUNT, _DOCUMENTS = 128, (64, 200)  # of synthetic items


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("count", "documents"):
        if options.items is not None and getattr(options, name) is not None:
            parser.error(f"--{name} is of synthetic items, and --items gives others")
    return run_command(_PROG, lambda: _detect(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROG, description="Retrieval heads of a model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser(
        "detect",
        help="find them",
        description="Scores each head by how much more it looks at the documents that answer a question than it does "
        "without the question (QRHead, arXiv 2506.09944).",
    )
    one.add_argument("--model", metavar="DIR", help="a folder, or a name on the hub; default the shipped one")
    one.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    one.add_argument("--items", type=Path, metavar="FILE.json", help="questions, documents and which answer")
    one.add_argument("--count", type=whole(1), metavar="N", help=f"synthetic items; default {_COUNT}")
    one.add_argument("--documents", type=_documents, metavar="N[-M]", help="of each synthetic item; default 64-200")
    one.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of synthetic items and of random heads")
    one.add_argument("--query-template", metavar="TEXT", help="what follows the documents, with {query} in it")
    one.add_argument(
        "--chat-template-kwargs", type=json_object, default={}, metavar="JSON", help='say, {"enable_thinking": false}'
    )
    one.add_argument("--top", type=whole(1), default=16, metavar="N", help="heads that are told of; default 16")
    one.add_argument("--rank-by", choices=SCORES, default="sum", help="the score that ranks heads; default sum")
    one.add_argument("--max-layer", type=whole(0), metavar="N", help="the last layer that heads are looked for in")
    one.add_argument("--profile", type=Path, metavar="FILE.json", help="where the heads go, for DyscoParams(profile=)")
    one.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the scores by layer")
    one.add_argument("--json", type=Path, metavar="FILE", help="where all scores go")
    one.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def _detect(options: argparse.Namespace) -> int:
    _check_files(options)
    folder, name = find_model(EngineConfig(model=options.model))
    config = load_config(folder)
    if config.iha is not None:
        raise ConfigError(f"{folder}: the model has Interleaved Head Attention; heads are scored by plain attention")
    layers = _layers(options, config)
    tokenizer = Tokenizer.from_dir(folder)
    items = _items(options)
    form = form_of(config.family, options.query_template, options.chat_template_kwargs)
    prompts = [build_prompts(tokenizer, item, form) for item in items]
    _check_lengths(prompts, config)
    model = load(folder, dtype=options.dtype)
    dtype = jnp.dtype(model.embedding[...].dtype).name
    with tqdm(total=len(prompts), unit=" items", disable=options.no_progress, file=sys.stderr) as bar:
        detection = detect(model, prompts, layers, bar.update)
    report = {
        "model": name,
        "fingerprint": model_fingerprint(folder, dtype).hex(),
        "dtype": dtype,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "items": _described(options, items, prompts),
        **figures(detection, options.rank_by, options.top, options.seed),
    }
    print(format_report(report))
    if options.profile is not None:
        profile = _profile(report, template_sequences(tokenizer, options.chat_template_kwargs))
        write_report(options.profile, dataclasses.asdict(profile))
    if options.json is not None:
        write_report(options.json, report)
    if options.plot is not None:
        draw(detection, options.rank_by, options.top, options.plot)
    return 0


def _check_files(options: argparse.Namespace) -> None:
    files = [file for file in (options.profile, options.plot, options.json) if file is not None]
    for file in files:
        check_writable(file)
    named = [file.resolve() for file in (options.items, *files) if file is not None]
    if len(set(named)) < len(named):
        raise ConfigError("items, profile, picture and scores must be different files")
    if options.plot is not None:
        check_picture(options.plot)
    if options.profile is not None and options.profile.suffix != ".json":
        raise ConfigError(f"--profile {options.profile}: its name must end with .json")


def _layers(options: argparse.Namespace, config: ModelConfig) -> int:
    """How many are scored."""
    layers: int = config.num_layers if options.max_layer is None else options.max_layer + 1
    if layers > config.num_layers:
        raise ConfigError(f"--max-layer {options.max_layer} must be below {config.num_layers}, the model's layers")
    if options.top > layers * config.num_heads:
        raise ConfigError(f"--top {options.top} must be at most {layers * config.num_heads}, the heads of all layers")
    return layers


def _items(options: argparse.Namespace) -> list[Item]:
    if options.items is not None:
        return read_items(options.items)
    return synthetic_items(options.count or _COUNT, options.documents or _DOCUMENTS, options.seed)


def _check_lengths(prompts: Sequence[ItemPrompts], config: ModelConfig) -> None:
    for item in prompts:
        length = max(len(item.tokens), len(item.null_tokens))
        if length > config.max_position_embeddings:
            raise ConfigError(
                f"item {item.id!r}: its prompt has {length} tokens, and the model is made for at most "
                f"{config.max_position_embeddings}; of synthetic items, --documents says how long they are"
            )


def _described(options: argparse.Namespace, items: Sequence[Item], prompts: Sequence[ItemPrompts]) -> dict[str, Any]:
    documents, tokens = [len(item.documents) for item in items], [len(item.tokens) for item in prompts]
    return {
        "source": "synthetic" if options.items is None else str(options.items),
        "seed": options.seed,
        "count": len(items),
        "documents": {"min": min(documents), "max": max(documents)},
        "tokens": {"min": min(tokens), "max": max(tokens)},
    }


def _profile(report: Mapping[str, Any], sequences: tuple[tuple[int, ...], ...]) -> DyscoProfile:
    return DyscoProfile(
        models=(report["model"].rpartition("/")[2],),
        num_layers=report["num_layers"],
        num_heads=report["num_heads"],
        heads=tuple((one["layer"], one["head"]) for one in report["heads"]),
        template_sequences=sequences,
        limits=(Limits(),),
        fingerprint=report["fingerprint"],
    )


def _documents(text: str) -> tuple[int, int]:
    """The fewest and the most."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 1, or two: the fewest and the most")
    return low, high


if __name__ == "__main__":
    sys.exit(main())
