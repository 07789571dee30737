"""Programs that the engines of a test run share: tracing takes seconds."""

from __future__ import annotations

import copy
from collections.abc import Hashable

from jaxdual.engine.dysco_programs import DyscoPrograms
from jaxdual.engine.layerwise.programs import LayerPrograms
from jaxdual.engine.steps import Programs
from jaxdual.kv.layout import KVLayout
from models import Decoder

_programs: dict[Hashable, Programs] = {}
_dysco_programs: dict[Hashable, DyscoPrograms] = {}
_layer_programs: dict[Hashable, LayerPrograms] = {}


def programs_of(model: Decoder, layout: KVLayout) -> Programs:
    """`Programs` with the weights of `model`, jitted once for all models of its structure."""
    own = Programs(model, layout)
    shared = copy.copy(_programs.setdefault((own._graphdef, own._structure, layout), own))
    shared.leaves = own.leaves
    return shared


def dysco_programs_of(programs: Programs) -> DyscoPrograms:
    """`DyscoPrograms`, jitted once for all `Programs` that share theirs."""
    return _dysco_programs.setdefault(programs.decode, DyscoPrograms(programs))


def layer_programs_of(model: Decoder, *, page_size: int, slots: int) -> LayerPrograms:
    """`LayerPrograms` with the weights of `model`, jitted once for all models of its configuration."""
    own = LayerPrograms(model, page_size=page_size, slots=slots)
    shared = copy.copy(_layer_programs.setdefault((model.config, tuple(own._kinds), page_size, slots), own))
    shared.embedding, shared._leaves = own.embedding, own._leaves
    return shared
