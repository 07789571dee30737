"""Methods that change how tokens are decoded."""
