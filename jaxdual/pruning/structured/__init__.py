"""Structured pruning: whole neurons, key-value groups and experts go, and what stays is a smaller dense model."""
