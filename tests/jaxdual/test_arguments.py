"""Types of arguments, and exit statuses, that commands have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from jaxdual.arguments import above_0, json_object, run_command, whole


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [(whole(1), "1", 1), (whole(0), "0", 0), (above_0, "0.5", 0.5), (above_0, "1e3", 1000.0), (json_object, "{}", {})],
)
def test_arguments_that_can_be_used(kind: Callable[[str], Any], text: str, value: object) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        *(
            (whole(2), text, "must be a whole number of at least 2")
            for text in ("1", "-3", "2.5", "two", "", "9" * 5000)
        ),
        *((above_0, text, "must be a number above 0") for text in ("0", "-1", "inf", "nan", "much", "")),
        *((json_object, text, "must be a JSON object") for text in ("[]", "1", "{", "")),
    ],
)
def test_arguments_that_cannot_be_used(kind: Callable[[str], Any], text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message) as caught:
        kind(text)
    assert repr(text) in str(caught.value)


def raising(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "more", "status", "told"),
    [
        (ValueError("x=3"), {}, 2, "prog: error: x=3\n"),
        (OSError("no room"), {}, 1, "prog: error: no room\n"),
        (LookupError("gone"), {"failures": (LookupError, OSError)}, 1, "prog: error: gone\n"),
        (KeyboardInterrupt(), {}, 130, "prog: interrupted\n"),
        (KeyboardInterrupt(), {"stopped": "goes on later"}, 130, "goes on later\n"),
    ],
)
def test_what_ends_a_command_is_told_and_becomes_its_status(
    error: BaseException, more: dict[str, Any], status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("prog", raising(error), **more) == status
    assert capsys.readouterr().err == told


def test_a_command_has_its_own_status_and_what_is_not_expected_is_raised() -> None:
    assert run_command("prog", lambda: 5) == 5
    with pytest.raises(LookupError):
        run_command("prog", raising(LookupError()))
