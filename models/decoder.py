"""The decoder: embedding, layers of a family, output head."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int
from numpy.typing import ArrayLike

from models.attention import dense_attend
from models.config import ModelConfig
from models.families import family_of
from models.layers import Attend, Linear, Mix, RMSNorm, matmul_precision, random_weights
from models.moe import MoE
from models.rope import Rope, exact_rope_table, rope_table


class Decoder(nnx.Module):
    """A decoder-only language model over flat tokens.

    The parts are callable one by one, so that a caller may stop between layers; `__call__` is all layers at once. A
    step is meant to be jitted with the parameters as leaves: `graphdef, state = nnx.split(model)` outside,
    `nnx.merge(graphdef, state)` inside `jax.jit`.

    Args:
      config: what to build.
      dtype: type of the parameters and of the computation.
      rngs: source of the random initial weights.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        family = family_of(config)
        self.config = config
        self.embedding = random_weights(rngs, (config.vocab_size, config.hidden_size), dtype)
        self.layers = nnx.List(
            [family.build_layer(config, index, dtype=dtype, rngs=rngs) for index in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)
        )

    def embed(self, tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
        """Rows of the embedding; token ids must be below the vocabulary size."""
        rows: jax.Array = self.embedding[...][tokens]
        return rows

    def rope(self, positions: Int[Array, "T"]) -> Rope:
        """Cosine and sine tables `[T, head_dim / 2]` float32 for `layer`, at positions counted from 0."""
        config, head_dim = self.config, self.config.head_dim
        rope = rope_table(config.rope, head_dim, positions)
        if config.iha is None or config.iha.rope != "virtual":
            return rope
        return rope._replace(virtual=exact_rope_table(config.rope, head_dim, positions * config.iha.pseudo_heads))

    def layer(
        self, index: int, x: Float[Array, "T D"], rope: Rope, attend: Attend, cache: Any, mix: Mix | None = None
    ) -> tuple[Float[Array, "T D"], Any]:
        """Layer `index` alone.

        Args:
          index: from 0.
          x: residual stream before the layer, `[T, hidden]`.
          rope: from `rope`.
          attend: `(layer, q [T Hq d], k [T Hkv d], v [T Hkv d], cache) -> (out [T Hq d], cache)`; it writes k and v
            into the cache and attends over it. Of a layer with pseudo heads it gets their `PseudoHeads` as well, behind
            the cache, and q and out are `[T Hq P d]`.
          cache: any pytree, handed to `attend` and back.
          mix: `(layer, mlp, x [T D]) -> out [T D]`, in place of `mlp(x)`: for experts that lie on other devices, or
            are counted; None for the MLP itself.

        Returns:
          Residual stream after the layer, and the cache.
        """
        of_layer = None if mix is None else partial(mix, index)
        return self.layers[index](x, rope, partial(attend, index), cache, of_layer)  # type: ignore[no-any-return]

    def final_norm(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The norm before the output head: the last hidden state of the model."""
        return self.norm(x)

    def unembed(self, x: Float[Array, "T D"]) -> Float32[Array, "T V"]:
        """Logits of rows that are already normalised."""
        if self.lm_head is None:
            weights, contracted = self.embedding[...], 1
        else:
            weights, contracted = self.lm_head.kernel[...], 0
        return jax.lax.dot_general(
            x,
            weights,
            (((1,), (contracted,)), ((), ())),
            precision=matmul_precision(x.dtype),
            preferred_element_type=jnp.float32,
        )

    def head(self, x: Float[Array, "T D"]) -> Float32[Array, "T V"]:
        """Final norm, then logits."""
        return self.unembed(self.final_norm(x))

    def __call__(
        self, tokens: Int[Array, "T"], positions: Int[Array, "T"], attend: Attend, cache: Any, mix: Mix | None = None
    ) -> tuple[Float[Array, "T D"], Any]:
        """Embedding and all layers.

        Args:
          tokens, positions: `[T]` each; rows of different sequences may be mixed, `attend` keeps them apart.
          attend, cache, mix: as for `layer`.

        Returns:
          Residual stream before the final norm, and the cache.
        """
        return self.run(range(self.config.num_layers), self.embed(tokens), positions, attend, cache, mix)

    def run(
        self,
        layers: range,
        x: Float[Array, "T D"],
        positions: Int[Array, "T"],
        attend: Attend,
        cache: Any,
        mix: Mix | None = None,
    ) -> tuple[Float[Array, "T D"], Any]:
        """Some layers, one after the other.

        Args:
          layers: their indices.
          x: residual stream before the first of them, `[T, hidden]`.
          positions, attend, cache, mix: as for `__call__`.

        Returns:
          Residual stream after the last of them, and the cache.
        """
        rope = self.rope(positions)
        for index in layers:
            x, cache = self.layer(index, x, rope, attend, cache, mix)
        return x, cache

    def dense_logits(self, tokens: Int[Array, "B L"]) -> Float32[Array, "B L V"]:
        """Logits of whole sequences, to be traced by the caller (a loss, say); see `logits`."""
        batch, length = tokens.shape
        positions = jnp.tile(jnp.arange(length), batch)
        x, _ = self(tokens.reshape(-1), positions, dense_attend(batch, length, self.config.layer_windows), None)
        return self.head(x).reshape(batch, length, -1)

    def logits(self, tokens: ArrayLike) -> Float32[Array, "B L V"]:
        """Logits at every position of whole sequences, dense causal or windowed attention without a cache.

        Args:
          tokens: `[batch, length]` integers, each row a sequence from position 0.

        Raises:
          ValueError: another rank, type, or a token outside the vocabulary.
        """
        values = np.asarray(tokens)
        if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"tokens are {values.dtype}{list(values.shape)}; integers [batch, length] are expected")
        if values.size and not 0 <= values.min() <= values.max() < self.config.vocab_size:
            raise ValueError(
                f"tokens are {values.min()} to {values.max()}; the vocabulary is 0 to {self.config.vocab_size - 1}"
            )
        graphdef, state = nnx.split(self)
        logits: jax.Array = _jitted_logits(graphdef, state, jnp.asarray(values, jnp.int32))
        return logits

    def set_expert_implementation(self, implementation: str) -> None:
        """Choose the `grouped_matmul` implementation of all mixture layers ("reference" is differentiable)."""
        for layer in self.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.implementation = implementation


@partial(jax.jit, static_argnums=0)
def _jitted_logits(graphdef: Any, state: Any, tokens: Int[Array, "B L"]) -> Float32[Array, "B L V"]:
    logits: jax.Array = nnx.merge(graphdef, state).dense_logits(tokens)
    return logits
