"""What is measured: probes of several seeds, thresholds from validation questions, and chains on test questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.cascade.asked import MULTIPLE_CHOICE, SHORT, Asked, Reader, Setting, facts
from jaxdual.cascade.evaluation import judging
from jaxdual.cascade.evaluation.calibration import Quality
from jaxdual.cascade.evaluation.chain import Chain, Tier
from jaxdual.cascade.evaluation.report import chosen_report, evaluate
from jaxdual.cascade.evaluation.signals import Signals
from jaxdual.cascade.evaluation.thresholds import Calibration, Goal, Rule, calibrated_gate, choose
from jaxdual.cascade.evaluation.train import ProbeFigures, Recipe, p_ik_of, probe_of, train_probe
from jaxdual.cascade.gate import Gate, PtMode

RATIOS = (2.7, 8.75)  # of the paper's 8B to its 3B model, and of its 70B to its 8B model
VARIANTS: tuple[tuple[str, Rule, Calibration, PtMode], ...] = (
    ("both", "both", "none", "full"),
    ("both, Platt", "both", "platt", "full"),
    ("both, temperature", "both", "temperature", "choices"),
    ("P(T) alone", "p_t", "none", "full"),
    ("P(IK) alone", "p_ik", "none", "full"),
    ("fusion", "fusion", "none", "full"),
)
UNSEEN = 0.1  # part of the facts that one probe is trained without
_SEED = 7


def measure(setting: Setting, readers: Sequence[Reader], asked: Sequence[Asked]) -> dict[str, Any]:
    """Everything but the run through engines."""
    small = readers[0]
    kinds = {one.name: [reader.read(one) for reader in readers] for one in asked}
    signals = kinds[MULTIPLE_CHOICE]
    recipe = Recipe(rate=setting.rate, epochs=setting.epochs, seed=setting.seeds[0])
    probe, trained = probe_of(signals[0], recipe)
    main = Chain((Tier.of(signals[0], probe), Tier.of(signals[1], None)))
    gates = gates_of(main, "both", "none", "full")
    others = {
        name: Chain((Tier.of(kinds[name][0], probe), Tier.of(kinds[name][1], None)))
        for name in kinds
        if name not in (MULTIPLE_CHOICE, SHORT)
    }
    items = next(one.items for one in asked if one.name == MULTIPLE_CHOICE)
    test = main.of("test")
    if setting.p_true:
        with_p_true = small.with_p_true(signals[0], next(one for one in asked if one.name == MULTIPLE_CHOICE))
        test = Chain((dataclasses.replace(test.tiers[0], signals=with_p_true), test.tiers[1]))
    return {
        "probe": dict(probe.training) | {"epochs": [dataclasses.asdict(one) for one in trained.epochs]},
        "multiple_choice": evaluate(test, gates, main.of("validation"), others),
        "variants": variants(main),
        "seeds": [seed_report(signals, dataclasses.replace(recipe, seed=seed)) for seed in setting.seeds],
        "control": control(signals[0], recipe),
        "unseen_facts": unseen_facts(signals[0], items, recipe),
        "taps": taps(small, next(one for one in asked if one.name == MULTIPLE_CHOICE), recipe),
        "assumed_ratios": {str(ratio): assumed(main, ratio) for ratio in RATIOS},
        "loose_thresholds": loose_thresholds(main.of("test")),
        "states": states(main, items, gates),
        "short_answers": short_answers(kinds[SHORT], recipe),
    }


def gates_of(chain: Chain, rule: Rule, calibration: Calibration, mode: PtMode) -> list[Gate]:
    """Chosen on the validation questions of a chain."""
    return list(_chosen(chain, rule, calibration, mode).gates)


def variants(chain: Chain) -> dict[str, Any]:
    """Each rule and calibration, chosen on validation and judged on test questions."""
    found = {}
    for name, rule, calibration, mode in VARIANTS:
        chosen = _chosen(chain, rule, calibration, mode)
        found[name] = {
            "validation": chosen_report(chosen),
            "test": judging.chain_report(chain.of("test"), chosen.gates),
            "tier": judging.tier_report(chain.of("test").tiers[0], chosen.gates[0])["calibrated"],
        }
    return found


def seed_report(signals: Sequence[Signals], recipe: Recipe) -> dict[str, Any]:
    """A probe of another seed: how good it is, and the chain with thresholds chosen for it."""
    probe, _ = probe_of(signals[0], recipe)
    chain = Chain((Tier.of(signals[0], probe), Tier.of(signals[1], None)))
    test, gates = chain.of("test"), gates_of(chain, "both", "none", "full")
    return {
        "seed": recipe.seed,
        "probe": probe.training["test"],
        **{
            name: {key: report[key] for key in ("accuracy", "difference", "saved", "saved_by_paper", "kept", "gates")}
            for name, report in (
                ("chosen", judging.chain_report(test, gates)),
                ("paper", judging.chain_report(test, judging.paper_gates(test))),
            )
        },
    }


def control(signals: Signals, recipe: Recipe) -> dict[str, Any]:
    """A probe that was trained on shuffled labels."""
    probe, _ = probe_of(signals, dataclasses.replace(recipe, shuffled_labels=True))
    return dict(probe.training["test"])


def unseen_facts(signals: Signals, asked: Sequence[Any], recipe: Recipe) -> dict[str, Any]:
    """A probe that is trained without a tenth of the facts, on test questions about these and about the others."""
    about = facts(asked)
    every = np.unique(about)
    hidden = np.random.default_rng(_SEED).choice(every, max(1, round(UNSEEN * len(every))), replace=False)
    unseen = np.isin(about, hidden)
    train, validation = (signals.taken((signals.splits == split) & ~unseen) for split in ("train", "validation"))
    trained = train_probe((train.hidden, train.correct), (validation.hidden, validation.correct), recipe)
    found = {}
    for name, chosen in (("unseen", unseen), ("seen", ~unseen)):
        part = signals.taken((signals.splits == "test") & chosen)
        figures = ProbeFigures.of(p_ik_of(trained.parameters, part.hidden), part.correct)
        found[name] = dataclasses.asdict(figures)
    return found


def taps(reader: Reader, asked: Asked, recipe: Recipe, most: int = 10_000) -> list[dict[str, Any]]:
    """Probes behind each layer, judged on the validation questions of a part of all."""
    part = Asked(asked.name, asked.items[:most], asked.splits[:most])
    found = []
    for tap in range(1, reader.layers + 1):
        signals = reader.read(part, tap)
        train, validation = signals.of("train"), signals.of("validation")
        trained = train_probe((train.hidden, train.correct), (validation.hidden, validation.correct), recipe)
        scores = p_ik_of(trained.parameters, validation.hidden)
        found.append({"tap": tap, **dataclasses.asdict(Quality.of(scores, validation.correct))})
    return found


def assumed(chain: Chain, ratio: float) -> dict[str, Any]:
    """The same answers, as if the larger model had so many times the parameters of the smaller one."""
    size = chain.tiers[0].costs.sizes.parameters
    scaled = chain.with_parameters([size, round(size * ratio)])
    test = scaled.of("test")
    gates = gates_of(scaled, "both", "none", "full")
    return {
        "chosen": judging.chain_report(test, gates),
        "paper": judging.chain_report(test, judging.paper_gates(test)),
    }


def loose_thresholds(test: Chain) -> list[dict[str, Any]]:
    """The paper's table 15: thresholds of P(T) with P(IK) at 0.5 and at 0.8, and without."""
    found = []
    for tau_t in (0.95, 0.9, 0.7, 0.5):
        row: dict[str, Any] = {"tau_t": tau_t}
        for name, tau_ik in (("p_ik 0.5", 0.5), ("p_ik 0.8", 0.8), ("without", None)):
            gate = dataclasses.replace(
                judging.paper_gates(test)[0], tau_t=tau_t, tau_ik=tau_ik or 0.0, uses_probe=tau_ik is not None
            )
            report = judging.chain_report(test, [gate])
            keys = ("accuracy", "pd_points", "pd_percent", "difference", "saved", "saved_by_paper", "kept")
            row[name] = {key: report[key] for key in keys}
        found.append(row)
    return found


def states(chain: Chain, items: Sequence[Any], gates: Sequence[Gate]) -> dict[str, Any]:
    """Test questions by what training told of their facts."""
    test = chain.tiers[0].signals.splits == "test"
    about = np.array([str(item.tags["state"]) for item in items])[test]
    judged = chain.of("test")
    ledger = judged.ledger(gates)
    right, kept = judged.answered(ledger.routes), ledger.routes.answered_by == 0
    return {
        str(state): {
            "questions": int((about == state).sum()),
            "accuracy": [float(one) for one in judged.correct[about == state].mean(axis=0)],
            "chain": float(right[about == state].mean()),
            "kept": float(kept[about == state].mean()),
        }
        for state in np.unique(about)
    }


def short_answers(signals: Sequence[Signals], recipe: Recipe) -> dict[str, Any]:
    """Short answers, judged by the confidence in their opening, with a probe of their own."""
    probe, _ = probe_of(signals[0], recipe)
    chain = Chain((Tier.of(signals[0], probe), Tier.of(signals[1], None)))
    report = evaluate(chain.of("test"), gates_of(chain, "both", "none", "full"), chain.of("validation"), {})
    test = signals[0].of("test")
    opened = np.char.find(test.given, "I do not know") < 0
    return report | {
        "probe": probe.training["test"],
        "refusals": {
            signal.header.model: float((np.char.find(signal.of("test").given, "I do not know") >= 0).mean())
            for signal in signals
        },
        "right_where_it_opens": float(test.correct[opened].mean()) if opened.any() else None,
    }


def _chosen(chain: Chain, rule: Rule, calibration: Calibration, mode: PtMode) -> Any:
    validation = chain.of("validation")
    template = calibrated_gate(validation.tiers[0], rule=rule, calibration=calibration, mode=mode)
    return choose(validation, [template], Goal())


def summary_of(reports: Sequence[Mapping[str, Any]], *path: str) -> list[float]:
    """One figure of each report."""
    values = []
    for report in reports:
        value: Any = report
        for key in path:
            value = value[key]
        values.append(float(value))
    return values
