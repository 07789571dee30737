"""The error of this package."""


class ModelError(ValueError):
    """A configuration or checkpoint that cannot be used; the message names the file and the key or tensor."""
