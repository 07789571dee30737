"""The configuration of a cascade: its tiers from the smallest to the largest, read from a TOML file."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jaxdual.cascade.gate import TAU_IK, TAU_T, Confidence, Fusion, Gate, Platt
from jaxdual.cascade.options import ConfidenceSpec, check_max_hops
from jaxdual.config import ConfigError, EngineConfig, refuse_unknown
from jaxdual.config_sources import read_config_file

_DEVICE_PART = 0.9  # of a device's memory, that tiers without a `memory_fraction` share
_NAME = re.compile(r"[!-+\--~]{1,128}")  # of a tier: headers of responses list them
# Settings of an engine that tiers have keys of their own for.
_OF_TIERS = {"model": "model", "served_model_name": "name", "probe": "probe"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """USD per million tokens.

    Attributes:
      input: of prompts.
      output: of what is generated.
    """

    input: float = 0.0
    output: float = 0.0

    def of(self, prompt_tokens: int, output_tokens: int) -> float:
        """USD of so many tokens."""
        return (self.input * prompt_tokens + self.output * output_tokens) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTier:
    """A tier with an engine of its own.

    Attributes:
      name: of the tier, under which its model is served, too.
      engine: settings of its engine, its probe's file among them.
      tau_ik, tau_t, platt_ik, platt_t, fusion: see `Gate`; without effect in the last tier.
      temperature: of the letters' own distribution: see `Confidence.temperature`.
      memory_fraction: part of each device's memory that the engine's process may take; on a GPU only.
      prices: of its tokens; None if it has none.
    """

    name: str
    engine: EngineConfig
    tau_ik: float = TAU_IK
    tau_t: float = TAU_T
    platt_ik: Platt | None = None
    platt_t: Platt | None = None
    temperature: float = 1.0
    fusion: Fusion | None = None
    memory_fraction: float = _DEVICE_PART
    prices: Prices | None = None

    @property
    def has_probe(self) -> bool:
        return self.engine.probe is not None

    def gate(self, confidence: Confidence) -> Gate:
        """Its gate, where P(T) is read from these tokens."""
        return Gate(
            confidence, self.tau_ik, self.tau_t, self.platt_ik, self.platt_t, self.fusion, uses_probe=self.has_probe
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalTier:
    """A model behind an OpenAI-compatible HTTP API.

    Attributes:
      name: of the tier.
      url: of the API, up to and with its "/v1".
      model: name of the model there.
      api_key_env: environment variable that holds the key; None for no key.
      connect_timeout: seconds until it must have taken the connection.
      timeout: seconds that it may be silent: before its first token, and between two.
      parameters: that a token meets in the model, for counts of FLOPs; None if that is not known.
      prices: of its tokens; None if it has none.
    """

    name: str
    url: str
    model: str
    api_key_env: str | None = None
    connect_timeout: float = 5.0
    timeout: float = 60.0
    parameters: int | None = None
    prices: Prices | None = None


type TierConfig = LocalTier | ExternalTier


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeConfig:
    """Tiers that answer as one model.

    Attributes:
      tiers: from the smallest to the largest; the last one answers whatever reaches it.
      name: of the cascade as a served model.
      max_hops: escalations of a request at most; the tier that it reaches then answers. None for no limit.
      skip_if_pik_below: a prompt that a tier refuses with a lower P(IK) than this goes to the last tier at once.
      confidence: what P(T) is read from where a request says nothing.

    Raises:
      ConfigError: tiers that don't go together.
    """

    tiers: tuple[TierConfig, ...]
    name: str = "auto"
    max_hops: int | None = None
    skip_if_pik_below: float = 0.0
    confidence: ConfidenceSpec = field(default_factory=ConfidenceSpec)

    def __post_init__(self) -> None:
        names = [tier.name for tier in self.tiers]
        if not self.local:
            raise ConfigError("a cascade needs at least one [[tier]] with a model of its own")
        for name in names:
            if name == self.name or names.count(name) > 1:
                raise ConfigError(f"name={name!r} of a tier must be one that no other tier has, nor the cascade")
            if not _NAME.fullmatch(name):
                raise ConfigError(f"name={name!r} of a tier must be of ASCII characters without blanks and commas")
        for tier in self.tiers[:-1]:
            if isinstance(tier, ExternalTier):
                raise ConfigError(f"tier {tier.name!r}: only the last tier may have a url")
        _check_part("skip_if_pik_below", self.skip_if_pik_below)
        for tier in self.gated:
            if tier.fusion is None and tier.has_probe and self.skip_if_pik_below > tier.tau_ik:
                raise ConfigError(
                    f"skip_if_pik_below={self.skip_if_pik_below} must be at most tau_ik={tier.tau_ik} of tier "
                    f"{tier.name!r}, which refuses nothing above it"
                )
        whole = math.fsum(tier.memory_fraction for tier in self.local)
        if whole > 1 + 1e-9:
            raise ConfigError(f"memory_fraction of all tiers together is {whole:g}; it must be at most 1")

    @property
    def local(self) -> tuple[LocalTier, ...]:
        """Tiers with an engine."""
        return tuple(tier for tier in self.tiers if isinstance(tier, LocalTier))

    @property
    def gated(self) -> tuple[LocalTier, ...]:
        """Tiers that may refuse: all but the last."""
        return tuple(tier for tier in self.tiers[:-1] if isinstance(tier, LocalTier))


def read_cascade(path: str | Path, engine: EngineConfig | None = None) -> CascadeConfig:
    """The cascade of a TOML file; docs/cascade.md has its keys.

    Args:
      path: the file. Models and probes are looked for in its folder first.
      engine: settings of all tiers' engines where `[tier.engine]` says nothing.

    Raises:
      ConfigError: it can't be read, a key is unknown, or a value can't be used; the message names tier and key.
    """
    path, engine = Path(path), engine or EngineConfig()
    try:
        return _read(read_config_file(path), path.parent, engine)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from None


_TOP = ("name", "max_hops", "skip_if_pik_below", "confidence", "tier")
_CONFIDENCE = tuple(each.name for each in fields(ConfidenceSpec))
_EXTERNAL = (
    *("name", "url", "model", "api_key_env", "connect_timeout", "timeout", "parameters", "price_in", "price_out"),
)
_GATE = ("probe", "tau_ik", "tau_t", "platt_ik", "platt_t", "temperature", "fusion")
_LOCAL = ("name", "model", *_GATE, "memory_fraction", "price_in", "price_out", "engine")


def _read(values: Mapping[str, Any], folder: Path, engine: EngineConfig) -> CascadeConfig:
    _refuse_others(values, _TOP, "")
    for setting in _OF_TIERS:
        if getattr(engine, setting) is not None:
            raise ConfigError(
                f"{setting}={getattr(engine, setting)!r} contradicts the cascade: each [[tier]] has its own"
            )
    tiers = values.get("tier", [])
    if not isinstance(tiers, list) or not all(isinstance(tier, dict) for tier in tiers) or not tiers:
        raise ConfigError("[[tier]] is missing: a cascade has at least one")
    local = sum("url" not in tier for tier in tiers)
    given = [tier["memory_fraction"] for tier in tiers if "memory_fraction" in tier and "url" not in tier]
    for value in given:
        _check_part("memory_fraction", value, above=True)
    rest = max(_DEVICE_PART - math.fsum(given), 0.0)
    share = rest / (local - len(given)) if local > len(given) else 0.0
    if local > len(given) and not share:
        raise ConfigError(f"memory_fraction of the tiers that say it is {math.fsum(given):g}; the others have no room")
    made = []
    for number, tier in enumerate(tiers):
        where = f"tier {tier.get('name', number + 1)!r}: "
        try:
            made.append(
                _external(tier)
                if "url" in tier
                else _local(tier, folder, engine, share, is_last=number == len(tiers) - 1)
            )
        except ValueError as error:
            raise ConfigError(f"{where}{error}") from None
    top = {key: values[key] for key in ("name", "skip_if_pik_below") if key in values}
    if "name" in top:
        _text(values, "name")
    if "max_hops" in values:
        try:
            check_max_hops(values["max_hops"])
        except ValueError as error:
            raise ConfigError(str(error)) from None
        top["max_hops"] = values["max_hops"]
    return CascadeConfig(tiers=tuple(made), confidence=_confidence(values.get("confidence", {})), **top)


def _confidence(values: Any) -> ConfidenceSpec:
    if not isinstance(values, dict):
        raise ConfigError(f"confidence={values!r} must be a table, [confidence]")
    _refuse_others(values, _CONFIDENCE, "[confidence]: ")
    kind = values.get("kind", "choices")
    unused = ("letters", "mode") if kind == "opening" else ("opening",)
    for key in unused:
        if key in values:
            raise ConfigError(f"[confidence]: {key}={values[key]!r} has no use with kind={kind!r}")
    try:
        return ConfidenceSpec(**values)
    except ValueError as error:
        raise ConfigError(f"[confidence]: {error}") from None


def _local(values: dict[str, Any], folder: Path, engine: EngineConfig, share: float, *, is_last: bool) -> LocalTier:
    _refuse_others(values, _LOCAL, "")
    if is_last:
        for key in _GATE:
            if key in values:
                raise ConfigError(f"{key}={values[key]!r}: the last tier answers whatever reaches it and has no gate")
    if not isinstance(values.get("engine", {}), dict):
        raise ConfigError(f"engine={values['engine']!r} must be a table, [tier.engine]")
    settings = dict(values.get("engine", {}))
    refuse_unknown(settings, (EngineConfig,))
    for setting, key in _OF_TIERS.items():
        if setting in settings:
            raise ConfigError(f"[tier.engine]: {setting} is the tier's own key {key!r}")
    name = _text(values, "name")
    settings |= {"model": _found(_text(values, "model"), folder), "served_model_name": name}
    if "probe" in values:
        settings["probe"] = _found(_text(values, "probe"), folder)
    fusion = _fusion(values["fusion"]) if "fusion" in values else None
    if fusion is not None:
        for key in ("tau_ik", "tau_t"):
            if key in values:
                raise ConfigError(f"{key}={values[key]!r} has no use: the fusion takes the place of both thresholds")
    for key in ("tau_ik", "platt_ik", "fusion"):
        if key in values and "probe" not in values:
            raise ConfigError(f"{key}={values[key]!r} needs a probe, which gives P(IK)")
    given: dict[str, Any] = {}
    for key in ("tau_ik", "tau_t"):
        if key in values:
            given[key] = _check_part(key, values[key])
    for key in ("platt_ik", "platt_t"):
        if key in values:
            given[key] = _platt(key, values[key])
    if "temperature" in values:
        given["temperature"] = _above_0(values, "temperature")
    return LocalTier(
        name=name,
        engine=dataclasses.replace(engine, **settings),
        fusion=fusion,
        memory_fraction=values.get("memory_fraction", share),
        prices=_prices(values),
        **given,
    )


def _external(values: dict[str, Any]) -> ExternalTier:
    _refuse_others(values, _EXTERNAL, "")
    url = _text(values, "url")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of brackets or ports
        usable = False
    if not usable:
        raise ConfigError(f"url={url!r} must be that of an HTTP API, such as 'http://127.0.0.1:8000/v1'")
    given: dict[str, Any] = {key: _above_0(values, key) for key in ("connect_timeout", "timeout") if key in values}
    if "api_key_env" in values:
        given["api_key_env"] = _text(values, "api_key_env")
    if "parameters" in values:
        given["parameters"] = round(_above_0(values, "parameters"))
    return ExternalTier(
        name=_text(values, "name"), url=url.rstrip("/"), model=_text(values, "model"), prices=_prices(values), **given
    )


def _refuse_others(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{where}unknown key {unknown[0]!r}; known are {', '.join(known)}")


def _found(name: str, folder: Path) -> str:
    """A path relative to the folder if there is something, else as it stands, which may be a hub name."""
    here = folder / name
    return str(here) if here.exists() else name


def _text(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        raise ConfigError(f"{key} is missing")
    if not isinstance(values[key], str) or not values[key]:
        raise ConfigError(f"{key}={values[key]!r} must be a text that is not empty")
    return str(values[key])


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{key}={value!r} must be a number")
    return float(value)


def _above_0(values: Mapping[str, Any], key: str) -> float:
    number = _number(key, values[key])
    if number <= 0:
        raise ConfigError(f"{key}={values[key]!r} must be above 0")
    return number


def _check_part(key: str, value: Any, *, above: bool = False) -> float:
    number = _number(key, value)
    if not 0 <= number <= 1 or (above and not number):
        raise ConfigError(f"{key}={value!r} must be in {'(' if above else '['}0, 1]")
    return number


def _platt(key: str, value: Any) -> Platt:
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError(f"{key}={value!r} must be [slope, intercept]")
    return Platt(_number(key, value[0]), _number(key, value[1]))


def _fusion(value: Any) -> Fusion:
    keys = tuple(each.name for each in fields(Fusion))
    if not isinstance(value, dict) or set(value) != set(keys):
        raise ConfigError(f"fusion={value!r} must have {', '.join(keys)}, and nothing else")
    numbers = {key: _number(f"fusion.{key}", value[key]) for key in keys}
    _check_part("fusion.tau", numbers["tau"])
    return Fusion(**numbers)


def _prices(values: Mapping[str, Any]) -> Prices | None:
    given = {key: _number(key, values[key]) for key in ("price_in", "price_out") if key in values}
    for key, price in given.items():
        if price < 0:
            raise ConfigError(f"{key}={price} must be at least 0")
    return Prices(input=given.get("price_in", 0.0), output=given.get("price_out", 0.0)) if given else None
