"""Tests of the KV accounting."""
