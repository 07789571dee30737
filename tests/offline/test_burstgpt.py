"""BurstGPT's CSV files."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxdual.offline.burstgpt import read_burstgpt
from jaxdual.offline.trace import Session, TraceError, Turn

HEAD = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_each_row_is_a_request_but_those_that_failed(tmp_path: Path) -> None:
    rows = "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,0,0,0,API log\n118.5,GPT-4,1087,230,1317,API log\n"
    assert read_burstgpt(written(tmp_path, HEAD + rows)) == [
        Session("2", (Turn(472, 18),), 5.0),
        Session("4", (Turn(1087, 230),), 118.5),
    ]
    newer = HEAD.replace("Timestamp", "Timestamp,Session ID,Elapsed time")
    assert read_burstgpt(written(tmp_path, newer + "7,a,0.5,GPT-4,10,20,30,API log\n"))[0].turns == (Turn(10, 20),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: column 'Timestamp' is missing"),
        (HEAD.replace("Response", "Answer"), "line 1: column 'Response tokens' is missing"),
        (HEAD, "has no requests"),
        (HEAD + "1,GPT-4,0,0,0,API log\n", "has no requests"),
        (HEAD + "1,GPT-4,7.5,1,2,API log\n", "line 2: Request tokens '7.5' must be a whole number, at least 0"),
        (HEAD + "1,GPT-4,7,-1,2,API log\n", "line 2: Response tokens '-1' must be a whole number"),
        (HEAD + "soon,GPT-4,7,1,2,API log\n", "line 2: Timestamp 'soon' must be a number of seconds"),
        (HEAD + "1,GPT-4\n", "line 2: Request tokens None must be"),
    ],
)
def test_what_is_no_such_trace_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_burstgpt(written(tmp_path, text))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        read_burstgpt(tmp_path / "none.csv")
