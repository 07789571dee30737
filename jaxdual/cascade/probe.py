"""P(IK): a small network that tells from a prompt's last hidden state whether the model will answer it right.

The network is that of Mahaut et al. 2024 (amazon-science/factual-confidence-of-llms), which arXiv 2602.22090 follows:
256, 128, 64 and 1 units with ReLU between them, over standardised inputs, in float32.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxdual.result_files import write_whole

WIDTHS = (256, 128, 64)
FORMAT_VERSION = 1
_KEY = "jaxdual.p_ik"  # of the file's metadata


class ProbeParameters(NamedTuple):
    """What P(IK) is computed of: a pytree, for use inside `jax.jit`.

    Attributes:
      mean, deviation: of each channel of the hidden states it was trained on, `[D]`.
      kernels, biases: of each of its layers, `[in, out]` and `[out]`.
    """

    mean: Float32[Array, " D"]
    deviation: Float32[Array, " D"]
    kernels: tuple[Float32[Array, "inputs outputs"], ...]
    biases: tuple[Float32[Array, " outputs"], ...]


def default_tap(num_layers: int) -> int:
    """Layers below the tap where nothing else is said: 24 of the 28 to 36 that the paper's models have, of other depths
    three quarters."""
    return 24 if 28 <= num_layers <= 36 else max(1, int(0.75 * num_layers + 0.5))


def logits(parameters: ProbeParameters, hidden: Float[Array, "rows D"]) -> Float32[Array, " rows"]:
    """Logit of P(IK) of each row.

    Args:
      parameters: of the probe.
      hidden: residual stream behind the tap layer, of the prompt's last token.
    """
    x = (hidden.astype(jnp.float32) - parameters.mean) / parameters.deviation
    last = len(parameters.kernels) - 1
    for place, (kernel, bias) in enumerate(zip(parameters.kernels, parameters.biases, strict=True)):
        x = jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias
        x = x if place == last else jax.nn.relu(x)
    return x[:, 0]


def p_ik(parameters: ProbeParameters, hidden: Float[Array, "rows D"]) -> Float32[Array, " rows"]:
    """P(IK) of each row; see `logits`."""
    return jax.nn.sigmoid(logits(parameters, hidden))


class Standardisation(nnx.Variable):
    """Statistics of the inputs: part of a probe, but not trained."""


class ConfidenceProbe(nnx.Module):
    """The network in training.

    Args:
      mean, deviation: of the inputs, `[D]`; a deviation of 0 (a channel that never changes) counts as 1.
      rngs: source of the initial weights.
    """

    def __init__(self, mean: Float[Array, " D"], deviation: Float[Array, " D"], *, rngs: nnx.Rngs) -> None:
        self.mean = Standardisation(jnp.asarray(mean, jnp.float32))
        self.deviation = Standardisation(jnp.where(jnp.asarray(deviation) > 0, deviation, 1).astype(jnp.float32))
        sizes = (mean.shape[0], *WIDTHS, 1)
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes)])

    def __call__(self, hidden: Float[Array, "rows D"]) -> Float32[Array, " rows"]:
        """Logit of P(IK) of each row."""
        return logits(self.parameters(), hidden)

    def parameters(self) -> ProbeParameters:
        """The arrays, without the module around them."""
        return ProbeParameters(
            self.mean[...],
            self.deviation[...],
            tuple(layer.kernel[...] for layer in self.layers),
            tuple(layer.bias[...] for layer in self.layers),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A trained probe, and the model that it is of.

    Attributes:
      parameters: of the network.
      model: name of the model, for people.
      fingerprint: `model_fingerprint` of the model in the type that it computed in, in hexadecimal.
      num_layers: of the model.
      tap: layers below the tap: the probe reads the output of block `tap`, counted from 1.
      training: figures of its training, for people.
    """

    parameters: ProbeParameters
    model: str
    fingerprint: str
    num_layers: int
    tap: int
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_shapes(self.parameters)
        if not 1 <= self.tap <= self.num_layers:
            raise ValueError(f"tap={self.tap} must be 1 to {self.num_layers}, the model's layers")

    @property
    def hidden_size(self) -> int:
        """Of the states that it reads."""
        return int(self.parameters.mean.shape[0])

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
          ValueError: `check_probe_file` says why.
        """
        check_probe_file(path)
        tensors = {"mean": self.parameters.mean, "deviation": self.parameters.deviation}
        for place, (kernel, bias) in enumerate(zip(self.parameters.kernels, self.parameters.biases, strict=True)):
            tensors |= {f"layers.{place}.kernel": kernel, f"layers.{place}.bias": bias}
        about = {
            "version": FORMAT_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "num_layers": self.num_layers,
            "tap": self.tap,
            "hidden_size": self.hidden_size,
            "training": dict(self.training),
        }
        values = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
        # Not `save_file`, which makes files that only their owner can read.
        write_whole(path, save(values, metadata={"format": "np", _KEY: json.dumps(about)}))


def check_probe_file(path: Path) -> None:
    """Refuses a place for a probe where it would count as weights of a model.

    Raises:
      ValueError: a name that ends in ".safetensors", in a folder with a config.json.
    """
    if path.suffix == ".safetensors" and (path.parent / "config.json").exists():
        raise ValueError(
            f"{path}: all *.safetensors of a model's folder are its weights; give the probe another suffix there, such "
            "as .probe"
        )


def read_probe(path: Path) -> Probe:
    """Reads a file of `Probe.save`, whatever model it is of.

    Raises:
      ValueError: no such file, or none of a probe; the message names it.
    """
    try:
        with safe_open(path, framework="np") as file:
            told = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: can't be read as a probe ({error})") from None
    if told is None:
        raise ValueError(f"{path}: is not a probe; `python -m jaxdual.cascade train` writes them")
    try:
        about = json.loads(told)
        if about["version"] != FORMAT_VERSION:
            raise ValueError(f"its format is version {about['version']}; this is version {FORMAT_VERSION}")
        layers = range(len(WIDTHS) + 1)
        return Probe(
            parameters=ProbeParameters(
                jnp.asarray(tensors["mean"]),
                jnp.asarray(tensors["deviation"]),
                tuple(jnp.asarray(tensors[f"layers.{place}.kernel"]) for place in layers),
                tuple(jnp.asarray(tensors[f"layers.{place}.bias"]) for place in layers),
            ),
            model=about["model"],
            fingerprint=about["fingerprint"],
            num_layers=about["num_layers"],
            tap=about["tap"],
            training=about["training"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no usable probe ({type(error).__name__}: {error})") from None


def load_probe(path: Path, fingerprint: str, num_layers: int, hidden_size: int) -> Probe:
    """Reads the probe of a model.

    Args:
      path: of the file.
      fingerprint: `model_fingerprint` of the model in the type that it computes in, in hexadecimal.
      num_layers, hidden_size: of the model.

    Raises:
      ValueError: as `read_probe`, or a probe of another model; the message names the file.
    """
    probe = read_probe(path)
    for name, found, wanted in (
        ("layers", probe.num_layers, num_layers),
        ("channels of hidden state", probe.hidden_size, hidden_size),
    ):
        if found != wanted:
            raise ValueError(
                f"{path}: is the probe of a model of {found} {name} ({probe.model}); this one has {wanted}"
            )
    if probe.fingerprint != fingerprint:
        raise ValueError(
            f"{path}: is the probe of a model with fingerprint {probe.fingerprint[:16]} ({probe.model}); this one's is "
            f"{fingerprint[:16]}: other weights, or another dtype"
        )
    return probe


def _check_shapes(parameters: ProbeParameters) -> None:
    sizes = (parameters.mean.shape[0] if parameters.mean.ndim == 1 else 0, *WIDTHS, 1)
    found = [parameters.deviation.shape, *(one.shape for one in (*parameters.kernels, *parameters.biases))]
    wanted = [(sizes[0],), *itertools.pairwise(sizes), *((size,) for size in sizes[1:])]
    if found != wanted:
        raise ValueError(f"parameters have shapes {found}; {wanted} are expected")
    if not all(bool(jnp.isfinite(one).all()) for one in jax.tree.leaves(parameters)):
        raise ValueError("parameters must be finite")
