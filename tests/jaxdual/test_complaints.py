"""Warnings that would come too often."""

from __future__ import annotations

import logging

import pytest

from jaxdual.complaints import Complaints


def test_a_cause_is_told_at_once_and_then_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    complaints = Complaints(logging.getLogger("here"), lambda: now[0])
    for second in range(125):
        now[0] = float(second)
        complaints.tell("disk full", 2)
        if second == 30:
            complaints.tell("disk gone")
    assert [record.getMessage() for record in caplog.records] == [
        "disk full (2 times)",
        "disk gone (1 times)",
        "disk full (120 times)",
        "disk full (120 times)",
    ]
