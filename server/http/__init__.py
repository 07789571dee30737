"""The OpenAI-compatible HTTP face."""

from server.http.app import create_app

__all__ = ["create_app"]
