"""The file of a cascade, as `--cascade` of the server reads it, of gates that were chosen."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxdual.cascade.evaluation.chain import Chain
from jaxdual.cascade.gate import Gate
from models.questions import LETTERS, OPENING

type Value = str | float | Sequence[float] | Sequence[str] | Mapping[str, float]


def cascade_toml(path: Path, chain: Chain, gates: Sequence[Gate], probes: Sequence[Path | None]) -> str:
    """The text of the file.

    Args:
      path: where it will lie: model folders and probes are named from there.
      chain: whose models are the tiers.
      gates: of each tier but the last.
      probes: files of the probes of these.
    """
    header, letters = chain.tiers[0].signals.header, len(chain.tiers[0].signals.header.tokens)
    confidence: dict[str, Value] = {"kind": header.kind}
    if header.kind == "choices":
        confidence["letters"] = list(LETTERS[:letters])
        confidence["mode"] = next((gate.confidence.mode for gate in gates if gate.confidence is not None), "full")
    else:
        confidence["opening"] = OPENING
    blocks = ["[confidence]", *_lines(confidence)]
    for place, (tier, name) in enumerate(zip(chain.tiers, _names(chain), strict=True)):
        values: dict[str, Value] = {"name": name, "model": _from(path, tier.signals.header.folder)}
        if place < len(gates):
            values |= _of_gate(gates[place], None if probes[place] is None else _from(path, str(probes[place])))
        if tier.costs.price_in or tier.costs.price_out:
            values |= {"price_in": tier.costs.price_in, "price_out": tier.costs.price_out}
        blocks += ["", "[[tier]]", *_lines(values)]
    return "\n".join(blocks) + "\n"


def _of_gate(gate: Gate, probe: str | None) -> dict[str, Value]:
    values: dict[str, Value] = {}
    if gate.uses_probe and probe is not None:
        values["probe"] = probe
        if gate.platt_ik is not None:
            values["platt_ik"] = [gate.platt_ik.slope, gate.platt_ik.intercept]
    if gate.platt_t is not None:
        values["platt_t"] = [gate.platt_t.slope, gate.platt_t.intercept]
    if gate.confidence is not None and gate.confidence.temperature != 1:
        values["temperature"] = gate.confidence.temperature
    if gate.fusion is not None:
        fusion = gate.fusion
        values["fusion"] = {
            "p_t": fusion.p_t,
            "p_ik": fusion.p_ik,
            "intercept": fusion.intercept,
            "tau": fusion.tau,
        }
        return values
    if "probe" in values:
        values["tau_ik"] = gate.tau_ik
    # A server reads P(T) in any case; 0 lets all of it pass.
    values["tau_t"] = 0.0 if gate.confidence is None else gate.tau_t
    return values


def _names(chain: Chain) -> list[str]:
    """Of the models; numbered where two have the same."""
    names = [tier.name for tier in chain.tiers]
    return [name if names.count(name) == 1 else f"{name}-{place + 1}" for place, name in enumerate(names)]


def _from(path: Path, target: str) -> str:
    """A file or folder as seen from the cascade's; a name on the hub as it is."""
    return os.path.relpath(target, path.parent) if Path(target).exists() else target


def _lines(values: Mapping[str, Value]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in values.items()]


def _toml(value: Value) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_lines(value)) + " }"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (int, float)):
        return repr(float(value))
    return "[" + ", ".join(_toml(one) for one in value) + "]"
