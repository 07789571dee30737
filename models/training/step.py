"""One training step: loss, gradients, optimiser update."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float32, Int32

from models import ModelConfig
from models.attention import dense_attend
from models.iha import is_mixing
from models.shapes import with_parameters
from models.training.attention import blocked_attend
from models.training.experts import replace_experts
from models.training.recipes import Recipe

type Parameters = dict[str, jax.Array]

# Gives Muon's updates about the root mean square of Adam's, so that both take one learning rate (Liu et al. 2025).
_UPDATE_RMS = 0.2
_SHORT = 64  # tokens of sequences whose scores are cheaper kept than computed again, one head at a time
# Of mixing and collapse weights: few, all of a size, and each in the gradient of every token.
_MIXING_BETAS = (0.8, 0.95)


def optimizer(recipe: Recipe, parameters: Parameters) -> optax.GradientTransformation:
    """Muon for the matrices inside the layers, AdamW for embedding and norms, after clipping; at learning rate 1.

    Mixing and collapse weights of Interleaved Head Attention have an Adam of their own without decay.
    """
    groups = {name: "mixing" if is_mixing(name) else "rest" for name in parameters}
    rest = optax.contrib.muon(
        learning_rate=1.0,
        adam_learning_rate=recipe.adam_rate,
        weight_decay=recipe.weight_decay,
        adam_b2=0.95,
        consistent_rms=_UPDATE_RMS,
        muon_weight_dimension_numbers=_matrices,
    )
    if "mixing" in groups.values():
        first, second = _MIXING_BETAS
        mixing = optax.adam(recipe.mixing_rate, b1=first, b2=second)
        rest = optax.partition({"mixing": mixing, "rest": rest}, groups)
    return optax.chain(optax.clip_by_global_norm(recipe.clip_norm), rest)


def losses(
    config: ModelConfig, recipe: Recipe, parameters: Mapping[str, jax.Array], windows: Int32[Array, "B window"]
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """What is minimised (cross-entropy plus z-loss and balancing), and the cross-entropy alone; nats a token.

    Tokens of ``windows`` below zero are ``~token``: they are read, but not predicted.
    """
    model = with_parameters(config, parameters)
    balanced = replace_experts(model)
    batch, length = windows.shape[0], windows.shape[1] - 1
    predicted = (windows[:, 1:] >= 0).reshape(-1).astype(jnp.float32)
    windows = jnp.where(windows < 0, ~windows, windows)
    tokens, targets = windows[:, :-1].reshape(-1), windows[:, 1:].reshape(-1)
    positions = jnp.tile(jnp.arange(length), batch)
    attend = (dense_attend if length <= _SHORT else blocked_attend)(batch, length, config.layer_windows)
    hidden, _ = model(tokens, positions, attend, None)
    logits = model.head(hidden)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    correct = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    count = jnp.maximum(predicted.sum(), 1)
    cross_entropy = jnp.sum(predicted * (log_partition - correct)) / count
    total = cross_entropy + recipe.z_loss * jnp.sum(predicted * jnp.square(log_partition)) / count
    if balanced:
        total += recipe.balance * jnp.mean(jnp.stack([moe.loss for moe in balanced]))
    return total, cross_entropy


@partial(jax.jit, static_argnames=("config", "recipe"), donate_argnames=("parameters", "state"))
def train_step(
    config: ModelConfig,
    recipe: Recipe,
    parameters: Parameters,
    state: Any,
    windows: Int32[Array, "B window"],
    rate: Float32[Array, ""],
) -> tuple[Parameters, Any, Float32[Array, ""]]:
    """One update; parameters and optimiser state are donated.

    Args:
        config, recipe: static; each pair, and each shape of ``windows``, is compiled once.
        parameters: by dotted path.
        state: of `optimizer`.
        windows: tokens, neighbours in a row being input and target; one that is only read is ``~token``.
        rate: learning rate.

    Returns:
        New parameters, new state, and the cross-entropy before the update in nats a token.
    """
    gradient = jax.grad(lambda values: losses(config, recipe, values, windows), has_aux=True)
    gradients, cross_entropy = gradient(parameters)
    updates, state = optimizer(recipe, parameters).update(gradients, state, parameters)
    updates = jax.tree.map(lambda update: rate * update, updates)
    return optax.apply_updates(parameters, updates), state, cross_entropy


@partial(jax.jit, static_argnames=("config", "recipe"))
def cross_entropy(
    config: ModelConfig, recipe: Recipe, parameters: Parameters, windows: Int32[Array, "B window"]
) -> Float32[Array, ""]:
    """Mean cross-entropy of the windows, nats a token."""
    return losses(config, recipe, parameters, windows)[1]


def learning_rate(recipe: Recipe, step: int, fraction: float) -> float:
    """Learning rate of a step: linear warm-up by steps, then constant, then linear to zero by share of the budget.

    Args:
        recipe: the schedule.
        step: steps done so far.
        fraction: share of the budget used so far, 0 to 1.
    """
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    decay = min(1.0, (1 - fraction) / (1 - recipe.decay_from))
    return recipe.peak_rate * warm * max(0.0, decay)


def _matrices(parameters: Mapping[str, Any]) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    def numbers(name: str, value: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if isinstance(value, optax.MaskedNode) or value.ndim < 2 or not name.startswith("layers."):
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=value.ndim - 2, output_axis=value.ndim - 1)

    return {name: numbers(name, value) for name, value in parameters.items()}
