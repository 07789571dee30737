"""Shapes and types of array arguments are checked while tests run."""

import gc
import importlib.util
import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)  # for meshes; everything else stays on the first

ARRAY_MODULES = [
    "pallas_kernels",
    "models.attention",
    "models.decoder",
    "models.layers",
    "models.moe",
    "models.rope",
    "jaxdual.cascade.evaluation.baselines",
    "jaxdual.cascade.evaluation.calibration",
    "jaxdual.cascade.evaluation.chain",
    "jaxdual.cascade.evaluation.collect",
    "jaxdual.cascade.evaluation.ledger",
    "jaxdual.cascade.evaluation.measures",
    "jaxdual.cascade.probe",
    "jaxdual.cascade.evaluation.routing",
    "jaxdual.cascade.evaluation.rules",
    "jaxdual.cascade.evaluation.signals",
    "jaxdual.cascade.evaluation.thresholds",
    "jaxdual.cascade.evaluation.train",
    "jaxdual.engine.layerwise.programs",
    "jaxdual.engine.mesh_programs",
    "jaxdual.engine.paged",
    "jaxdual.engine.sampler",
    "jaxdual.engine.steps",
    "jaxdual.heads.attention",
    "jaxdual.parallel.exchange",
    "jaxdual.pruning.admm",
    "jaxdual.pruning.dsnot",
    "jaxdual.pruning.induction.absorb",
    "jaxdual.pruning.induction.masks",
    "jaxdual.pruning.induction.regularizers",
    "jaxdual.pruning.induction.starts",
    "jaxdual.pruning.linears",
    "jaxdual.pruning.methods",
    "jaxdual.pruning.moments",
    "jaxdual.pruning.pattern",
    "jaxdual.pruning.scores",
    "jaxdual.pruning.sparsegpt",
]
if importlib.util.find_spec("beartype"):
    install_import_hook(ARRAY_MODULES, "beartype.beartype")
else:  # on a machine that was only lent to run the kernels
    print("beartype is not installed: array types are not checked")


_MANY_MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_mappings() -> Iterator[None]:
    """Lets programs go from module to module: each takes memory mappings, and beyond Linux's 65,530 XLA crashes."""
    yield
    with open("/proc/self/maps", "rb") as maps:
        count = sum(1 for _ in maps)
    if count > _MANY_MAPPINGS:
        gc.collect()
        jax.clear_caches()


@pytest.fixture
def shared_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of this process that run the same model with the same layout trace and compile their programs once."""
    from tests.engine.programs import dysco_programs_of, layer_programs_of, programs_of

    monkeypatch.setattr("jaxdual.engine.device.Programs", programs_of)
    monkeypatch.setattr("jaxdual.engine.dysco_slots.DyscoPrograms", dysco_programs_of)
    monkeypatch.setattr("jaxdual.engine.layerwise.runner.Programs", programs_of)
    monkeypatch.setattr("jaxdual.engine.layerwise.runner.LayerPrograms", layer_programs_of)
