"""One engine: requests, padded shapes, jitted step functions, sampling, the step loop."""
