"""Tests of the KV agent."""
