"""A prefill engine that holds the keys and values of a few layers at a time (DualPath 2.1 and 4.1)."""
