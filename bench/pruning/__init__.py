"""Measurements of pruned models."""
