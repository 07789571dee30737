"""jaxdual's own gRPC interface."""
