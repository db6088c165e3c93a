"""What the relauncher decides; that it works is shown by tests/test_rank_death.py and test_two_hosts.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from eve.errors import UserError
from tests.tiny import tiny_recipe
from tools import relaunch
from tools.relaunch import choose_layout, read_hostfile

EIGHT = ("data.num_readers=8",)


@pytest.mark.parametrize(
    ("hosts", "overrides", "chosen", "degrees"),
    [
        ({"a": 2, "b": 2}, (), {"a": 2, "b": 2}, (1, 1)),
        # Of five or three processes, the four readers would not get equal shares.
        ({"a": 2, "b": 3}, (), {"a": 2, "b": 2}, (1, 1)),
        ({"b": 3}, (), {"b": 2}, (1, 1)),
        ({"a": 8, "b": 8, "c": 8}, EIGHT, {"a": 8}, (1, 1)),
        ({"a": 8, "b": 8}, (*EIGHT, "parallel.tensor=2"), {"a": 8, "b": 8}, (2, 1)),
        ({"a": 8, "b": 7}, (*EIGHT, "parallel.tensor=2", "parallel.expert=4"), {"a": 8}, (2, 4)),
        ({"a": 3}, ("parallel.tensor=2", "parallel.expert=4"), {"a": 2}, (2, 2)),
        ({"a": 1}, ("parallel.tensor=2", "parallel.expert=4"), {"a": 1}, (1, 1)),
        # The micro-batch stays as well: of four processes each would have 4 samples.
        ({"a": 4}, ("training.micro_batch_size=8",), {"a": 2}, (1, 1)),
    ],
)
def test_the_most_processes_that_fit(
    tiny: Path,
    hosts: dict[str, int],
    overrides: tuple[str, ...],
    chosen: dict[str, int],
    degrees: tuple[int, int],
) -> None:
    layout = choose_layout(hosts, tiny_recipe(tiny, *overrides), {})
    assert (layout.hosts, (layout.tensor, layout.expert)) == (chosen, degrees)


def test_nothing_fits(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"no number of processes on a fits the recipe: .*micro-batch 5"):
        choose_layout({"a": 2}, tiny_recipe(tiny, "training.micro_batch_size=5"), {})


def test_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# our machines\ngpu1 slots=8\n\n  gpu2   slots=4 # half of it\n")
    assert read_hostfile(path) == {"gpu1": 8, "gpu2": 4}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gpu1\n", "line 1 of .* is 'gpu1', expected"),
        ("gpu1 slots=8\ngpu1 slots=8\n", "line 2 of .* is 'gpu1 slots=8', expected"),
        ("# none\n", "has no slots"),
        ("gpu1 slots=0\n", "has no slots"),
    ],
)
def test_mistakes_in_a_hostfile(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_hostfile(path)


def test_no_hostfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert relaunch.main(["--hostfile", str(tmp_path / "none"), "--", "--recipe", "eve_tiny"]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: the hostfile {tmp_path}/none cannot be read: No such file"
    )
