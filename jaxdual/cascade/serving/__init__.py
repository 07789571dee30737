"""A cascade as one model: who is next, and asking it."""
