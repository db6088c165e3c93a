"""Tables in their three forms."""

import json
from pathlib import Path

import pytest

from eve.errors import UserError
from eve.tasks.report import Table, check_output, shown, to_json, to_markdown, to_text, write
from eve.tasks.statistics import Interval

TABLE = Table(
    "Words", ["cell", "n", "gain"], [["a|b", 12, Interval(0.5, 0.25, 0.75)], ["c", 3, 1 / 3]], ["A note."]
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (7, "7"),
        (0.12345, "0.1235"),
        (-1e-9, "0.0000"),
        (Interval(1.0, -1e-9, 2.0), "1.0000 [0.0000, 2.0000]"),
    ],
)
def test_values(value, text):
    assert shown(value) == text


def test_text_is_aligned():
    assert to_text(TABLE).splitlines() == [
        "Words",
        "cell   n                     gain",
        "----  --  -----------------------",
        "a|b   12  0.5000 [0.2500, 0.7500]",
        "c      3                   0.3333",
        "A note.",
    ]


def test_markdown_escapes_the_bar():
    assert to_markdown(TABLE).splitlines() == [
        "### Words",
        "",
        "| cell | n | gain |",
        "| --- | ---: | ---: |",
        "| a\\|b | 12 | 0.5000 [0.2500, 0.7500] |",
        "| c | 3 | 0.3333 |",
        "",
        "A note.",
    ]


def test_json_keeps_every_digit():
    assert json.loads(to_json([TABLE])) == [
        {
            "title": "Words",
            "rows": [
                {"cell": "a|b", "n": 12, "gain": [0.5, 0.25, 0.75]},
                {"cell": "c", "n": 3, "gain": 1 / 3},
            ],
            "notes": ["A note."],
        }
    ]


def test_files_by_their_suffix(tmp_path):
    write(tmp_path / "t.md", [TABLE, TABLE])
    assert (tmp_path / "t.md").read_text().count("### Words") == 2
    write(tmp_path / "t.json", [TABLE])
    assert json.loads((tmp_path / "t.json").read_text())[0]["title"] == "Words"


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match=r"'\.txt'"):
        check_output(tmp_path / "t.txt")
    with pytest.raises(UserError, match="no directory"):
        check_output(Path("no/such/t.md"))
