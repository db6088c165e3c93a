"""Curves read from metrics.jsonl, and a picture that shows them."""

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from eve.errors import UserError
from tools.plot_metrics import default_panels, main, read_curves


@pytest.fixture
def run(tmp_path):
    lines = [
        {"step": 10, "loss/a": 2.0, "lr": 1e-3},
        {"step": 10, "router/x": 0.5},
        {"step": 20, "loss/a": None, "lr": 5e-4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_curves_are_the_numbers_of_the_file(run):
    curves = read_curves(run)
    assert curves["lr"] == ([10, 20], [1e-3, 5e-4])
    assert curves["router/x"] == ([10], [0.5])
    assert curves["loss/a"][1][0] == 2.0
    assert math.isnan(curves["loss/a"][1][1])


def test_each_loss_has_its_panel_and_the_rest_where_it_exists(run):
    assert default_panels({"run": read_curves(run)}) == ["loss/a", "lr"]


def test_a_picture_is_written_with_ink_on_it(run, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is for development only")
    output = tmp_path / "curves.png"
    assert main([str(run), "--output", str(output), "--panels", "loss", "lr", "router"]) == 0
    for given in (run, run / "metrics.jsonl"):
        output.unlink()
        assert main([str(given)]) == 0  # beside the metrics, which is the same file here
        assert output.is_file()
    picture = np.asarray(Image.open(output).convert("RGB"))
    assert (picture != 255).any(axis=-1).sum() > 1000


def test_without_matplotlib_a_sentence_names_the_requirements(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(run)]) == 2
    assert "requirements-dev.txt" in capsys.readouterr().err
    assert not (run / "curves.png").exists()


def test_mistakes_are_one_sentence_with_exit_code_2(run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is for development only")
    assert main([str(run), "--panels", "los"]) == 2
    assert "'los'" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(UserError, match="line 2"):
        read_curves(run)
