"""A decoder's parameters before they have values: shapes, names, and where each shall live."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from models.config import ModelConfig
from models.decoder import Decoder

# Chooses where a parameter lives: (dotted path, shape) -> sharding.
type ShardingRule = Callable[[str, tuple[int, ...]], Sharding]

DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    """Refuse a type that parameters cannot have.

    Raises:
      ValueError: not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")


def abstract(config: ModelConfig, dtype: str) -> Decoder:
    """A decoder whose parameters are shapes and types only.

    Raises:
      ValueError: an unknown dtype.
    """
    check_dtype(dtype)
    model: Decoder = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(params=0)))
    return model


def parameters_of(model: nnx.Module) -> dict[str, jax.Array]:
    """The parameters of a model or of a layer by dotted path, as "layers.0.attention.q.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model))
    return {parameter_path(path): leaf for path, leaf in leaves}


def active_parameters(config: ModelConfig) -> tuple[int, ...]:
    """Parameters of each layer that a token meets: of a mixture of experts, those that it chooses."""
    moe = config.moe
    sizes = []
    for layer in abstract(config, "float32").layers:
        parameters = parameters_of(layer)
        experts = sum(value.size for name, value in parameters.items() if ".experts." in f".{name}")
        every = sum(value.size for value in parameters.values())
        chosen = 0 if moe is None else experts * moe.num_experts_per_tok // moe.num_experts
        sizes.append(every - experts + chosen)
    return tuple(sizes)


def with_parameters(config: ModelConfig, parameters: Mapping[str, jax.Array]) -> Decoder:
    """A model that holds `parameters`, in the type that they have; inside a trace they may be tracers.

    Raises:
      ValueError: a parameter that is missing, that the model has not, or of another shape; the message names it.
    """
    graphdef, state = nnx.split(abstract(config, "float32"))
    unused = set(parameters)

    def value(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = parameter_path(path)
        if name not in parameters:
            raise ValueError(f"parameter '{name}' is missing")
        unused.remove(name)
        if parameters[name].shape != leaf.shape:
            raise ValueError(f"parameter '{name}' has shape {parameters[name].shape}; {leaf.shape} is expected")
        return parameters[name]

    state = jax.tree_util.tree_map_with_path(value, state)
    if unused:
        raise ValueError(f"parameter '{min(unused)}' has no place in this model")
    model: Decoder = nnx.merge(graphdef, state)
    return model


def target_shardings(state: nnx.State, rule: ShardingRule | None) -> nnx.State:
    """The sharding of each parameter, in the structure of `state`; without a rule, the default device's."""
    if rule is None:
        single = SingleDeviceSharding(_default_device())
        return jax.tree.map(lambda _: single, state)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: rule(parameter_path(path), leaf.shape), state)


def parameter_path(path: tuple[object, ...]) -> str:
    """The dotted name of a key path of a parameter tree, as in "layers.0.attention.q.kernel"."""
    return ".".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _default_device() -> jax.Device:
    device = jax.config.jax_default_device
    return device if isinstance(device, jax.Device) else jax.local_devices()[0]
