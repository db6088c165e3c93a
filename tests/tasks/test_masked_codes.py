"""Numbers of masked codes by counting, and through `eve.evaluate`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eve.config import load_recipe
from eve.evaluate import main
from eve.model import build_model
from eve.tasks.masked_codes import code_tables
from eve.tasks.masked_words import WordOutcomes
from eve.tasks.pretrain import evaluation_streams
from eve.tasks.statistics import Interval
from eve.training.export import export_model, load_exported
from tests.objectives.test_masked_codes import make_tokenizer
from tests.tasks.test_pretrain import run_dir

__all__ = ["run_dir"]


def test_the_table_counts_hits_and_frequencies() -> None:
    outcomes = WordOutcomes(
        hit_K=np.array([1.0, 0, 1, 1]),
        loss_K=np.array([0.5, 1.5, 1.0, 1.0]),
        label_K=np.array([7, 3, 3, 3]),
        sample_K=np.array([0, 0, 1, 1]),
    )
    (table,) = code_tables({"cell": outcomes}, seed=0)
    cell, pictures, accuracy, unigram, nats, unigram_nats, seen = table.rows[0]
    assert isinstance(accuracy, Interval)
    assert (cell, pictures, accuracy.value, unigram, nats, seen) == ("cell", 2, 0.75, 0.75, 1.0, 2)
    assert unigram_nats == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert accuracy.low == 0.5
    assert accuracy.high == 1.0


def test_codes_are_evaluated_from_the_export(run_dir, tmp_path, capsys) -> None:
    _, recipe, tokenizer = load_exported(run_dir / "export")
    tree = recipe.to_yaml()
    (tmp_path / "recipe.yaml").write_text(tree)
    visual = make_tokenizer(tmp_path / "visual", 16, 4, 9)
    coded = load_recipe(
        str(tmp_path / "recipe.yaml"),
        [
            "model.visual_codes=9",
            "model.mask_token=true",
            f"data.visual_tokenizer={visual}",
            "stages.0.streams=[{name: both, source: pairs, objective: masked_pair, image_target: codes}]",
        ],
    )
    assert [stream.objective for stream in evaluation_streams(coded)] == ["masked_codes", "masked_text"]
    export_model(tmp_path / "export", build_model(coded.model, 1).state_dict(), coded, tokenizer, {})
    assert main(["--task", "pretrain", "--checkpoint", str(tmp_path), "--max-samples", "20"]) == 0
    said = capsys.readouterr().out
    assert "Codes of masked patches" in said
    assert "Masked words" in said
    assert list((tmp_path / "evaluation").glob("*.png"))
    (visual / "visual_tokenizer.json").unlink()
    assert main(["--task", "pretrain", "--checkpoint", str(tmp_path)]) == 2
    assert "is not a visual tokenizer" in capsys.readouterr().err
