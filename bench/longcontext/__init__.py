"""Long-context tasks, and what decoding methods are worth on them: `python -m bench.longcontext`."""
