"""Array functions for serving: reference implementations and GPU kernels."""
