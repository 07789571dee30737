"""Tests of the block stores."""
