"""Ids of users: text by which an engine knows that the same one asks again."""

from __future__ import annotations

MAX_USER_CHARS = 512


def checked_user(user: str | None, name: str = "user") -> str | None:
    """A user's id; None where none is given, or an empty one.

    Args:
      name: of the field that it came in, for the error.

    Raises:
      ValueError: it is no text, too long, or can't be sent anywhere.
    """
    if user is None or user == "":
        return None
    if not isinstance(user, str):
        raise ValueError(f"{name} must be text, not {type(user).__name__}")
    if len(user) > MAX_USER_CHARS:
        raise ValueError(f"{name} has {len(user)} characters; at most {MAX_USER_CHARS} are possible")
    try:
        user.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode at character {error.start}") from None
    return user
