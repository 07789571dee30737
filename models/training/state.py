"""What a run must remember to go on as if it had never stopped, in one file that is replaced whole."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.training.data import Position

FILE = "state.npz"


@dataclass(frozen=True, slots=True)
class TrainState:
    """A run between two steps.

    Attributes:
        parameters: by dotted path.
        optimizer: state of the optimiser, a pytree.
        position: where the data stands.
        step: steps done.
        tokens: tokens predicted in training.
        cpu_seconds: CPU time used by all processes of the run so far.
    """

    parameters: dict[str, jax.Array]
    optimizer: Any
    position: Position
    step: int
    tokens: int
    cpu_seconds: float


def save_state(state: TrainState, identity: str, folder: Path) -> None:
    """Writes the state so that a kill at any moment leaves the old file or the new one.

    Args:
        state: what to write.
        identity: says which run this is; `load_state` refuses another.
        folder: gets `FILE`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree.leaves((state.parameters, state.optimizer))
    arrays = {f"leaf{index}": np.asarray(leaf) for index, leaf in enumerate(leaves)}
    plain = {
        "identity": identity,
        "position": asdict(state.position),
        "step": state.step,
        "tokens": state.tokens,
        "cpu_seconds": state.cpu_seconds,
    }
    temporary = folder / f".{FILE}.tmp"
    with temporary.open("wb") as stream:
        np.savez(stream, plain=np.array(json.dumps(plain)), **arrays)  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(folder / FILE)


def load_state(initial: TrainState, identity: str, folder: Path) -> TrainState:
    """Reads what `save_state` wrote.

    Args:
        initial: the state a fresh run would start from; gives the structure.
        identity: of the run that goes on.
        folder: holds `FILE`.

    Raises:
        ValueError: the file belongs to a run with another identity.
        FileNotFoundError: there is no state.
    """
    leaves, structure = jax.tree.flatten((initial.parameters, initial.optimizer))
    with np.load(folder / FILE) as arrays:
        plain = json.loads(str(arrays["plain"]))
        if plain["identity"] != identity:
            raise ValueError(f"{folder / FILE}: is of another run: {plain['identity']}; this one is {identity}")
        # Copies: a donated step must own its buffers.
        read = [jnp.array(arrays[f"leaf{index}"], leaf.dtype) for index, leaf in enumerate(leaves)]
    parameters, optimizer = jax.tree.unflatten(structure, read)
    return TrainState(
        parameters=parameters,
        optimizer=optimizer,
        position=Position(**plain["position"]),
        step=plain["step"],
        tokens=plain["tokens"],
        cpu_seconds=plain["cpu_seconds"],
    )
