"""Policies: pure functions and small state machines over plain data, without I/O, clock or JAX."""
