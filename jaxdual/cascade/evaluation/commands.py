"""What `python -m jaxdual.cascade` does, command by command."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxdual.cascade.config import CascadeConfig, LocalTier, read_cascade
from jaxdual.cascade.evaluation import judging
from jaxdual.cascade.evaluation.cascade_file import cascade_toml
from jaxdual.cascade.evaluation.chain import Chain, Tier
from jaxdual.cascade.evaluation.collect import collect
from jaxdual.cascade.evaluation.engines import compare, run_engines
from jaxdual.cascade.evaluation.item_prompts import default_form, prompt_of
from jaxdual.cascade.evaluation.items import read_items, split_items
from jaxdual.cascade.evaluation.report import chosen_report, evaluate, format_evaluation, points_text
from jaxdual.cascade.evaluation.signals import Header, read_signals
from jaxdual.cascade.evaluation.thresholds import Goal, Rule, calibrated_gate, choose
from jaxdual.cascade.evaluation.train import Recipe, probe_of
from jaxdual.cascade.gate import Gate
from jaxdual.cascade.letters import confidence_of
from jaxdual.cascade.probe import check_probe_file, default_tap, read_probe
from jaxdual.config import ConfigError, EngineConfig
from jaxdual.model_folder import find_model
from jaxdual.offline.report import write_report
from jaxdual.result_files import check_writable, write_whole
from jaxdual.tokenizer import Tokenizer
from models import load
from models.fingerprint import model_fingerprint


def run_collect(options: argparse.Namespace) -> int:
    """Takes signals of a model over items."""
    _check(options.out, options.json)
    folder, name = find_model(EngineConfig(model=options.model))
    items = read_items(options.items)
    splits = split_items(items) if options.split == "parts" else [options.split] * len(items)
    model, tokenizer = load(folder, dtype=options.dtype), Tokenizer.from_dir(folder)
    with tqdm(total=len(items), unit=" questions", disable=options.no_progress, file=sys.stderr) as bar:
        signals = collect(
            folder,
            name,
            model,
            tokenizer,
            items,
            splits,
            source=str(options.items),
            tap=options.tap or default_tap(model.config.num_layers),
            form=options.form or default_form(tokenizer),
            batch=options.batch,
            max_output=options.max_output,
            p_true=options.p_true,
            done=bar.update,
        )
    signals.save(options.out)
    report = {
        "header": dataclasses.asdict(signals.header),
        "questions": {split: int((signals.splits == split).sum()) for split in sorted(set(splits))},
        "accuracy": float(signals.correct.mean()),
        "prompt_tokens": int(signals.prompt_tokens.sum()),
        "output_tokens": int(signals.output_tokens.sum()),
        "seconds": float(signals.seconds.sum()),
    }
    _write(options.json, report)
    sizes = signals.header.sizes
    print(
        f"{options.out}: {len(signals)} questions asked of {name}, {report['accuracy']:.2%} answered right; tap behind "
        f"layer {sizes.tap} of {sizes.layers}"
    )
    return 0


def run_train(options: argparse.Namespace) -> int:
    """Trains a probe on signals."""
    _check(options.out, options.json)
    check_probe_file(options.out)
    recipe = Recipe(
        rate=options.rate,
        epochs=options.epochs,
        batch=options.batch,
        seed=options.seed,
        shuffled_labels=options.shuffled_labels,
    )
    with tqdm(total=recipe.epochs, unit=" epochs", disable=options.no_progress, file=sys.stderr) as bar:
        probe, trained = probe_of(read_signals(options.signals), recipe, bar.update)
    probe.save(options.out)
    _write(options.json, dict(probe.training) | {"epochs": [dataclasses.asdict(one) for one in trained.epochs]})
    test = probe.training["test"]
    print(
        f"{options.out}: probe of {probe.model}, epoch {trained.best} of {recipe.epochs}; of test questions accuracy "
        f"{test['accuracy']:.3f}, AUROC {test['quality']['auroc']:.3f}, ECE {test['quality']['ece']:.3f}"
    )
    return 0


def run_calibrate(options: argparse.Namespace) -> int:
    """Chooses thresholds on validation questions and writes the cascade's file."""
    _check(options.out, options.json)
    if options.out.suffix != ".toml":
        raise ConfigError(f"--out {options.out}: its name must end with .toml")
    probes = [Path(files[1]) if len(files) > 1 else None for files in options.tier]
    chain = _chain(options.tier, options.price)
    validation = chain.of("validation")
    goal = Goal(epsilon=options.epsilon, certainty=options.certainty, budget=options.budget)
    templates = [
        calibrated_gate(tier, rule=options.rule, calibration=options.calibration, mode=options.mode)
        for tier in validation.tiers[:-1]
    ]
    chosen = choose(validation, templates, goal, options.points)
    write_whole(options.out, cascade_toml(options.out, chain, chosen.gates, probes))
    report = {
        "rule": options.rule,
        "calibration": options.calibration,
        "goal": dataclasses.asdict(goal),
        "questions": len(validation),
        **chosen_report(chosen),
        "tiers": [
            judging.tier_report(tier, gate) for tier, gate in zip(validation.tiers, [*chosen.gates, None], strict=True)
        ],
    }
    _write(options.json, report)
    print(
        f"{options.out}: of {len(validation)} validation questions {chosen.accuracy.value:.2%} right "
        f"({points_text(report['difference'])} beside the largest model) at {chosen.cost.value:.1%} of its compute; "
        f"the best of {chosen.considered} combinations, so too good"
    )
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """Judges a cascade's file on test questions."""
    _check(None, options.json)
    config = read_cascade(options.cascade)
    _check_rule(options.cascade, config)
    every = chain_of(config, options.signals)
    for tier, asked, file in zip(config.gated, every.tiers, options.signals, strict=False):
        _check_confidence(file, asked.signals.header, tier, config)
    test, gates = every.of("test"), gates_of(config, every)
    others = {name: chain_of(config, [Path(file) for file in files]) for name, *files in options.other}
    report = evaluate(test, gates, every.of("validation"), others)
    if options.engines:
        report["engines"] = _by_engines(config, test, gates)
    _write(options.json, {"cascade": str(options.cascade), **report})
    print(format_evaluation(report))
    return 0


def chain_of(config: CascadeConfig, files: Sequence[Path]) -> Chain:
    """The chain of a cascade's tiers over questions, of a file of signals for each.

    Raises:
      ValueError: another number of files, or a probe or signals of another model.
    """
    tiers = []
    if len(files) != len(config.tiers):
        raise ValueError(f"{len(files)} files of signals for {len(config.tiers)} tiers; each needs one")
    for tier, file in zip(config.tiers, files, strict=True):
        if not isinstance(tier, LocalTier):
            raise ValueError(f"tier {tier.name!r}: signals are of models of one's own, and this one is at {tier.url}")
        probe = None if tier.engine.probe is None else read_probe(Path(tier.engine.probe))
        prices = (0.0, 0.0) if tier.prices is None else (tier.prices.input, tier.prices.output)
        signals = read_signals(file)
        folder, _ = find_model(tier.engine)
        if model_fingerprint(folder, signals.header.dtype).hex() != signals.header.fingerprint:
            raise ConfigError(f"{file}: has signals of {signals.header.model}, and tier {tier.name!r} is {folder}")
        tiers.append(Tier.of(signals, probe, price_in=prices[0], price_out=prices[1]))
    return Chain(tuple(tiers))


def _check_confidence(file: Path, header: Header, tier: LocalTier, config: CascadeConfig) -> None:
    """Raises `ConfigError` for signals whose P(T) is read from something else than the cascade's."""
    wanted, (folder, _) = config.confidence, find_model(tier.engine)
    if header.kind != wanted.kind:
        raise ConfigError(f"{file}: has signals of {header.kind!r}, and the cascade's confidence is {wanted.kind!r}")
    if header.tokens != confidence_of(wanted, Tokenizer.from_dir(folder), tier.name).tokens:
        raise ConfigError(f"{file}: has signals of other letters, or of another opening, than {wanted}")


def gates_of(config: CascadeConfig, chain: Chain) -> list[Gate]:
    """A cascade's gates, over the tokens of its models' signals."""
    gates = []
    for tier, asked in zip(config.gated, chain.tiers, strict=False):
        header = asked.signals.header
        if header.kind == "choices" and config.confidence.mode == "choices":
            gates.append(tier.gate(header.confidence("choices", tier.temperature)))
        else:
            gates.append(tier.gate(header.confidence()))
    return gates


def _check_rule(file: Path, config: CascadeConfig) -> None:
    """Raises `ConfigError` for a cascade in which more than gates decides who answers."""
    between = len(config.tiers) - 1
    if config.max_hops is not None and config.max_hops < between:
        raise ConfigError(
            f"{file}: max_hops={config.max_hops} keeps questions from the last tier; figures are without it"
        )
    if config.skip_if_pik_below > 0 and between > 1:
        raise ConfigError(
            f"{file}: skip_if_pik_below={config.skip_if_pik_below} passes tiers over; figures are without it"
        )


def _by_engines(config: CascadeConfig, test: Chain, gates: Sequence[Gate]) -> dict[str, Any]:
    """The test questions through the cascade's engines."""
    signals = [tier.signals for tier in test.tiers]
    source = signals[0].header.items
    items = {item.id: item for item in read_items(Path(source))}
    missing = [str(id) for id in signals[0].ids if str(id) not in items]
    if missing:
        raise ValueError(f"--engines: {source} has no item {missing[0]!r}, of which there are signals")
    engines = [dataclasses.replace(tier.engine, enable_prefix_caching=False) for tier in config.local]
    prompts = []
    for engine, one in zip(engines, signals, strict=True):
        tokenizer = Tokenizer.from_dir(find_model(engine)[0])
        prompts.append([prompt_of(tokenizer, items[str(id)], one.header.form) for id in one.ids])
    longest = 1 if signals[0].header.kind == "choices" else int(max(one.output_tokens.max() for one in signals))
    return compare(test, gates, run_engines(engines, prompts, gates, longest))


def _chain(tiers: Sequence[Sequence[str]], prices: Sequence[tuple[float, float]]) -> Chain:
    if prices and len(prices) != len(tiers):
        raise ValueError(f"--price is given {len(prices)} times for {len(tiers)} tiers; each needs one, or none has")
    made = []
    for place, files in enumerate(tiers):
        if len(files) > 2 or (place == len(tiers) - 1 and len(files) > 1):
            raise ValueError(
                f"--tier {' '.join(files)}: signals and a probe are expected, of the last tier signals alone"
            )
        probe = read_probe(Path(files[1])) if len(files) > 1 else None
        price_in, price_out = prices[place] if prices else (0.0, 0.0)
        made.append(Tier.of(read_signals(Path(files[0])), probe, price_in=price_in, price_out=price_out))
    for before, tier in itertools.pairwise(made):
        sizes = before.costs.sizes.parameters, tier.costs.sizes.parameters
        if sizes[0] > sizes[1]:
            raise ValueError(
                f"--tier: {before.name}, whose layers have {sizes[0]:,} parameters, comes before {tier.name} with "
                f"{sizes[1]:,}; tiers go from the smallest to the largest"
            )
    return Chain(tuple(made))


def _check(*files: Path | None) -> None:
    named = [file for file in files if file is not None]
    for file in named:
        check_writable(file)
    if len({file.resolve() for file in named}) < len(named):
        raise ConfigError("results must go into different files")


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        write_report(path, report)


RULE_HELP: dict[Rule, str] = {
    "both": "both scores must reach their thresholds",
    "p_t": "P(T) alone",
    "p_ik": "P(IK) alone",
    "fusion": "a logistic regression of both",
}
