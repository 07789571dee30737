"""Measurements of Interleaved Head Attention."""
