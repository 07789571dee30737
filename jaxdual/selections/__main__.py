"""`python -m jaxdual.selections`: answers a prompt by DySCO, and writes a page of what each step selected.

Exit status: 0 when the page was written, 1 when files or the engine fail, 2 for a call that can't work, 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdual.api import LLM
from jaxdual.arguments import above_0, json_object, run_command, whole
from jaxdual.config import ConfigError, EngineConfig
from jaxdual.config_sources import add_arguments, read_config
from jaxdual.decoding.dysco import Dysco, DyscoModel, DyscoParams, template_mask
from jaxdual.decoding.profiles import read_profile
from jaxdual.errors import EngineDeadError
from jaxdual.front import TokenizedPrompt
from jaxdual.model_folder import find_model
from jaxdual.result_files import check_writable, write_whole
from jaxdual.sampling_params import SamplingParams
from jaxdual.selections.page import selection_page
from jaxdual.served_model import dysco_model
from models import load_config

_PROG = "python -m jaxdual.selections"
_MAX_TOKENS = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return run_command(_PROG, lambda: _run(options), failures=(EngineDeadError, OSError))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Answers a prompt with attention that is raised by DySCO, and writes a page, one HTML file, that "
        "shows step by step which tokens were selected.",
        epilog="Tokens are the likeliest ones. Limits that are not given are the profile's.",
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="its text is the prompt")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message, in the chat template")
    parser.add_argument(
        "--chat-template-kwargs", type=json_object, metavar="JSON", help='say, {"enable_thinking": false}'
    )
    parser.add_argument("--max-tokens", type=whole(1), default=_MAX_TOKENS, metavar="N", help=f"default {_MAX_TOKENS}")
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--heads", type=_heads, metavar="JSON", help="retrieval heads: [[layer, head], ...], from 0")
    heads.add_argument("--profile", metavar="NAME|FILE", help="of retrieval heads; default the one of the model's name")
    parser.add_argument(
        "--top-p",
        type=_limit(float),
        default=argparse.SUPPRESS,
        metavar="P",
        help="selected relevance at most, or none",
    )
    parser.add_argument(
        "--top-k", type=_limit(int), default=argparse.SUPPRESS, metavar="K", help="selected tokens at most, or none"
    )
    parser.add_argument(
        "--strength", type=above_0, default=argparse.SUPPRESS, metavar="X", help="what weights are multiplied by"
    )
    parser.add_argument(
        "--observe",
        type=whole(0),
        default=argparse.SUPPRESS,
        metavar="N",
        help="tokens that make the first relevance; default 8",
    )
    parser.add_argument(
        "--tail", type=whole(0), default=argparse.SUPPRESS, metavar="N", help="raised tokens of the prompt's end"
    )
    parser.add_argument("--static", action="store_true", help="selects once, by what was observed")
    parser.add_argument("--html", type=Path, required=True, metavar="FILE", help="where the page goes")
    add_arguments(parser, EngineConfig)
    return parser


def _run(options: argparse.Namespace) -> int:
    config = read_config(EngineConfig, options)
    check_writable(options.html)
    if options.chat_template_kwargs is not None and not options.chat:
        raise ConfigError("--chat-template-kwargs needs --chat")
    text = _text(options)
    params = _params(options)
    folder, name = find_model(config)
    model = load_config(folder)
    if model.iha is not None:
        raise ConfigError(f"{folder}: the model has Interleaved Head Attention, for which DySCO is not defined")
    profile = None if config.dysco_profile is None else read_profile(config.dysco_profile)
    asked = DyscoModel(name, model.num_layers, model.num_heads, profile=profile)
    asked.resolved(params, 1, None)  # before weights are read
    llm = LLM.from_config(config)
    prompt = _tokenized(llm, text, options)
    info = llm.info
    dysco = dysco_model(info).resolved(params, len(prompt.tokens), prompt.opening)
    sampling = SamplingParams(max_tokens=options.max_tokens, temperature=0, dysco=params)
    (request,) = llm.generate(prompt, sampling)
    llm.close()
    if request.outputs[0].error is not None:
        raise EngineDeadError(request.outputs[0].error)
    template = template_mask(prompt.tokens, dysco.template_sequences).tolist()
    page = selection_page(
        request, llm.get_tokenizer(), template=template, facts={"model": info.served_model_name, **_facts(dysco)}
    )
    write_whole(options.html, page)
    steps = len(request.outputs[0].selection or ())
    print(request.outputs[0].text)
    print(f"{options.html}: {len(prompt.tokens)} tokens of prompt, {steps} steps, {len(page.encode())} bytes")
    return 0


def _text(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        return str(options.prompt)
    if options.prompt_file.resolve() == options.html.resolve():
        raise ConfigError("prompt and page must be different files")
    try:
        return str(options.prompt_file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{options.prompt_file}: not UTF-8: {error}") from None


def _params(options: argparse.Namespace) -> DyscoParams:
    names = ("top_p", "top_k", "strength", "observe", "tail", "static")
    given: dict[str, Any] = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return DyscoParams(heads=options.heads, profile=options.profile, return_selection=True, **given)


def _tokenized(llm: LLM, text: str, options: argparse.Namespace) -> TokenizedPrompt:
    if not options.chat:
        return llm.tokenize(text)
    return llm.tokenize_chat([{"role": "user", "content": text}], template_vars=options.chat_template_kwargs)


def _facts(dysco: Dysco) -> Mapping[str, object]:
    limits = {"top_p": dysco.top_p, "top_k": dysco.top_k}
    return {
        "retrieval heads": ", ".join(f"{layer}.{head}" for layer, head in dysco.heads),
        **{name: "none" if value is None else value for name, value in limits.items()},
        "strength": dysco.strength,
        "history": f"{dysco.history:.3g}",
        **({"static": "selected once"} if dysco.static else {}),
    }


def _heads(text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON list of [layer, head]")
    return value


def _limit(kind: Callable[[str], float]) -> Callable[[str], float | None]:
    """A number, or "none"."""

    def parse(text: str) -> float | None:
        if text == "none":
            return None
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number, or none") from None

    return parse


if __name__ == "__main__":
    sys.exit(main())
