"""`python -m bench.selection` on a CPU."""

import json

from bench import device_clock, selection


def test_a_report_says_what_each_form_takes_and_where_they_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(device_clock, "_SECONDS", 0.01)
    file = tmp_path / "selection.json"
    assert selection.main(["--keys", "100", "300", "--sequences", "2", "--json", str(file)]) == 0
    shapes = json.loads(file.read_text())["shapes"]
    assert [(one["keys"], one["sequences"], one["differ"]) for one in shapes] == [(100, 2, 0), (300, 2, 0)]
    for one in shapes:
        assert one["ms"].keys() == selection.FORMS.keys()
        assert min(one["ms"].values()) > 0


def test_a_form_that_selects_others_fails(monkeypatch, capsys):
    monkeypatch.setattr(device_clock, "_SECONDS", 0.01)

    def every_token(relevance, lengths, top_p, top_k):
        return relevance >= 0

    monkeypatch.setitem(selection.FORMS, "search, 1 bit", every_token)
    assert selection.main(["--keys", "200", "--sequences", "1"]) == 1
    assert "200" in capsys.readouterr().out


def test_time_that_is_up_leaves_the_rest_unmeasured(capsys):
    assert selection.main(["--keys", "64", "--sequences", "1", "--seconds", "-1"]) == 0
    assert "no time for 64 keys, 1 sequences" in capsys.readouterr().err
