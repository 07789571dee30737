"""A simulated cluster that is scheduled by the very policies of the real one (`jaxdual.scheduling`)."""
