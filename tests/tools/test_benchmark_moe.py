"""The benchmark of a mixture-of-experts layer times what it says, in a table that adds up."""

from __future__ import annotations

import re

import pytest
import torch

from tools.benchmark_moe import SHAPES, main


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["--rounds", "2", "--tokens", "128", "--experts", "4", "--capacity-factor", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    tables = text.split("\nwidths ")[1:]
    assert [table.splitlines()[0] for table in tables] == [f"{width} / {hidden}" for width, hidden in SHAPES]
    for table in tables:
        rows = re.findall(r"^ +(\S.*?) +([\d.]+) ms +([\d.]+)% of the products$", table, re.MULTILINE)
        names, times, shares = zip(*rows, strict=True)
        assert names == ("products", "layer", "router", "dispatch", "bank of experts", "combine")
        for time, share in zip(times, shares, strict=True):
            assert float(time) > 0
            assert float(share) == pytest.approx(100 * float(time) / float(times[0]), rel=0.05, abs=0.2)
        overhead = float(re.findall(r"overhead of the layer: (-?[\d.]+)%", table)[0])
        assert overhead == pytest.approx(float(shares[1]) - 100, abs=0.2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tokens", "64"], "--tokens is 64, expected a multiple of 128"),
        (["--tokens", "300"], "--tokens is 300, expected a multiple of 128"),
        (["--tokens", "0"], "--tokens is 0, expected a multiple of 128"),
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--experts", "0"], "--experts is 0, expected at least 1"),
        (["--k", "0"], "--k is 0, expected at least 1"),
        (["--k", "9"], "--k is 9, expected at most the 8 experts"),
        (["--capacity-factor", "-1"], "--capacity-factor is -1, expected 0 or more"),
    ],
)
def test_mistakes_get_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert (out, error) == ("", f"error: {sentence}\n")
