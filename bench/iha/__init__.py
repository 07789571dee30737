"""Experiments with Interleaved Head Attention: `python -m bench.iha`."""
