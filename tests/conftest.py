"""Shapes and types of array arguments are checked while tests run."""

import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

ARRAY_MODULES = [
    "pallas_kernels",
    "models.attention",
    "models.decoder",
    "models.layers",
    "models.moe",
    "models.rope",
    "jaxdual.engine.layerwise.programs",
    "jaxdual.engine.paged",
    "jaxdual.engine.sampler",
    "jaxdual.engine.steps",
]
if importlib.util.find_spec("beartype"):
    install_import_hook(ARRAY_MODULES, "beartype.beartype")
else:  # on a machine that was only lent to run the kernels
    print("beartype is not installed: array types are not checked")
