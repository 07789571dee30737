"""Network faces of jaxdual."""
