"""What a model's routers choose: profiles of it in files, their figures and pictures, and a command that takes them."""

from jaxdual.routers.profile import RouterProfile, read_profile, write_profile

__all__ = ["RouterProfile", "read_profile", "write_profile"]
