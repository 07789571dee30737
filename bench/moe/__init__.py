"""Levels of scheduling for mixtures of experts, compared by simulation: `python -m bench.moe`."""
