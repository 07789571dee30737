"""Shapes and types of array arguments are checked while tests run."""

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
    "jaxdual.engine.paged",
    "jaxdual.engine.sampler",
    "jaxdual.engine.steps",
]
install_import_hook(ARRAY_MODULES, "beartype.beartype")
