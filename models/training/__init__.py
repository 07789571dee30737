"""Trains the models that ship with the repository. Needs the optional extra ``train`` (optax)."""
