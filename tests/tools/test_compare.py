"""Comparisons: mistakes in a definition, numbers of the tables, memory and time of a step, one real run."""

import json
import math

import numpy as np
import pytest
import torch
import yaml

from eve.errors import UserError
from eve.model import count_parameters
from eve.tasks.report import shown
from eve.tasks.statistics import Interval, Spread
from tests.tiny import write_tiny
from tools.compare import main
from tools.comparisons import cost
from tools.comparisons.cost import Cost, Costs, allocated, timed_variant
from tools.comparisons.definition import (
    DEFINITIONS,
    Budget,
    Measure,
    as_overrides,
    load_comparison,
    load_variant,
)
from tools.comparisons.runs import runs_of
from tools.comparisons.tables import cost_table, difference, read_measure

WORDS = {"name": "words", "task": "pretrain", "table": "Masked words: loss", "column": "right image"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"), num_samples=40)


def definition(directory, recipe, **changes):
    tree = {
        "title": "Trial",
        "recipe": str(recipe),
        "seeds": [1, 2],
        "variants": {
            "soft": {},
            "hard: all": {"model.feed_forward": [{"blocks": "0-1", "router": "modality"}]},
        },
        "measures": [WORDS],
    }
    path = directory / "trial.yaml"
    path.write_text(yaml.safe_dump({**tree, **changes}, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in DEFINITIONS.glob("*.yaml")))
def test_every_comparison_of_the_repository_loads(name):
    comparison, variants = load_comparison(name)
    assert [each.name for each in variants] == list(comparison.variants)
    recipes = [each.recipe for each in variants]
    assert all(a != b for n, a in enumerate(recipes) for b in recipes[:n])


def test_values_reach_the_recipe_as_they_are_written(recipe, tmp_path):
    overrides = {"stages.0.lr": 1e-05, "data.sources.pairs.crop_scale": [0.25, 1], "optimizer.clip": None}
    _, (soft, hard) = load_comparison(definition(tmp_path, recipe, overrides=overrides))
    assert soft.recipe.stages[0].lr == 1e-05
    assert soft.recipe.data.sources["pairs"].crop_scale == (0.25, 1.0)
    assert soft.recipe.optimizer.clip is None
    assert [ff.router for ff in soft.recipe.model.feed_forward] == ["modality", "topk"]
    assert [(ff.blocks, ff.router) for ff in hard.recipe.model.feed_forward] == [((0, 1), "modality")]
    assert as_overrides({"a.b": "0-3", "c": "1", "d": [{"e": None}]}) == ("a.b=0-3", "c='1'", "d=[{e: null}]")
    runs = runs_of([soft, hard], [1, 2], tmp_path / "out")
    assert [run.recipe.seed for run in runs] == [1, 1, 2, 2]
    assert runs[1].directory == tmp_path / "out" / "hard_all" / "seed-1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variant": {}}, "did you mean variants"),
        ({"variants": {"a": {"model.dept": 3}}}, "variant 'a'.*unknown key model.dept; did you mean depth"),
        ({"variants": {"a b": {}, "a, b": {}}}, "not all different: a_b, a_b"),
        ({"measures": []}, "neither measures nor a budget"),
        ({"measures": [{**WORDS, "column": ""}]}, "measure 'words' of pretrain lacks column"),
        ({"overrides": {"evaluation.shards": {"a": "nowhere/*.tar"}}}, "variant 'soft': .*nowhere"),
        ({"measures": [{**WORDS, "task": "retrieval"}]}, "'soft': model.contrast of the checkpoint is null"),
        ({"measures": [{**WORDS, "stage": "pairs"}]}, "variant 'soft' has no stage 'pairs', only pretrain"),
        ({"measures": [{**WORDS, "variants": ["sof"]}]}, "names 'sof', expected one of soft, hard"),
        ({"budget": {"memory_gib": 1, "batches": [8, 4]}}, r"batches \[8, 4\] do not ascend"),
        ({"budget": {"memory_gib": 1, "minutes": 1, "batches": [6]}}, "batch_size 6 is not a multiple"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(recipe, tmp_path, changes, said, capsys):
    out = tmp_path / "out"
    assert main([definition(tmp_path, recipe, **changes), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    with pytest.raises(UserError, match=said):
        raise UserError(error)
    assert not out.exists()


def test_what_a_variant_says_comes_last(recipe, tmp_path):
    """Also where its key is one of all variants', and a part of that is said after it."""
    streams = [{"name": "text", "source": "pairs", "objective": "masked_text"}]
    overrides = {"stages.0.streams": streams, "stages.0.streams.0.text_ratio": 0.25}
    variants = {"first": {}, "other": {"stages.0.streams": [{**streams[0], "text_ratio": 0.75}]}}
    _, found = load_comparison(definition(tmp_path, recipe, overrides=overrides, variants=variants))
    assert [each.recipe.stages[0].streams[0].text_ratio for each in found] == [0.25, 0.75]


def test_an_unknown_comparison_or_variant_is_named(recipe, tmp_path, capsys):
    assert main(["router"]) == 2
    assert "did you mean routers?" in capsys.readouterr().err
    assert main([definition(tmp_path, recipe), "--only", "sof"]) == 2
    assert "only soft, hard: all" in capsys.readouterr().err


def test_a_directory_of_another_recipe_is_not_overwritten(recipe, tmp_path):
    variant = load_variant("soft", str(recipe), ())
    (run,) = runs_of([variant], [1], tmp_path)
    run.directory.mkdir(parents=True)
    (run.directory / "recipe.yaml").write_text(run.recipe.to_yaml())
    runs_of([variant.changed("training.log_every=5")], [1], tmp_path)
    # To go on with a run its data may move; another result may not pass for that of these data.
    with pytest.raises(UserError, match=r"another recipe: data.sources.pairs.mix.0.shards is 'x.tar'"):
        runs_of([variant.changed("data.sources.pairs.mix.0.shards=x.tar")], [1], tmp_path)
    with pytest.raises(UserError, match=r"another recipe: optimizer.clip is 1.0, was 3.0"):
        runs_of([variant.changed("optimizer.clip=1.0")], [1], tmp_path)


def test_spread_and_paired_difference_are_those_of_numpy():
    spread, base = Spread({1: 0.5, 2: 0.75, 3: 0.25}), Spread({3: 0.125, 1: 0.25, 4: 9.0})
    assert spread.mean == 0.5
    assert spread.deviation == pytest.approx(np.std([0.5, 0.75, 0.25], ddof=1))
    assert shown(spread) == "0.5000 ± 0.2500"
    change = difference(spread, base)
    assert change is not None
    assert dict(change.by_seed) == {1: 0.25, 3: 0.125}
    assert shown(change) == "+0.1875 [+0.1250, +0.2500]*"
    assert shown(Spread({1: 0.25, 2: -0.5}, compared=True)) == "-0.1250 [-0.5000, +0.2500]"
    # One seed agrees with nobody.
    assert shown(Spread({1: 0.25}, compared=True)) == "+0.2500 [+0.2500, +0.2500]"
    assert shown(Spread({1: 0.25})) == "0.2500"
    assert difference(spread, Spread({7: 1.0})) is None


def test_a_measure_is_the_mean_of_its_cells(tmp_path):
    path = tmp_path / "tables.json"
    rows = [
        {"cell": "a", "model": 1.0, "gain [95 %]": [0.5, 0.4, 0.6]},
        {"cell": "b", "model": 2, "gain [95 %]": [0.25, 0, 1]},
    ]
    path.write_text(json.dumps([{"title": "Empty", "rows": []}, {"title": "Masked words", "rows": rows}]))
    measure = Measure(name="m", task="pretrain", table="Masked", column="gain")
    assert read_measure(measure, path, "pretrain") == 0.375
    assert (
        read_measure(measure.model_copy(update={"column": "model", "cells": ("b",)}), path, "pretrain") == 2.0
    )
    for changes, said in (
        ({"table": "Empty"}, "0 tables with rows begin with 'Empty'; there are 'Empty', 'Masked words'"),
        ({"column": "loss"}, "0 columns begin with 'loss', expected one of model, gain"),
        ({"column": ""}, "2 columns begin with '', expected one of model, gain"),
        ({"cells": ("c",)}, "no cell 'c', only a, b"),
    ):
        with pytest.raises(UserError, match=said):
            read_measure(measure.model_copy(update=changes), path, "pretrain")


def test_a_held_out_loss_is_that_of_the_stage(tmp_path):
    path = tmp_path / "tables.json"
    rows = [
        {"after": after, "stream": stream, "trained": "no", "measure": "loss", "a": [n, 0, 9], "b": n + 1}
        for n, (after, stream) in enumerate(
            (a, s) for a in ("start", "text", "pairs") for s in ("words", "patches")
        )
    ]
    path.write_text(json.dumps([{"title": "Held-out losses", "rows": rows}]))
    measure = Measure(name="m", task="losses", stream="words", measure="loss")
    assert read_measure(measure, path, "pairs") == 4.5
    assert read_measure(measure.model_copy(update={"stage": "text", "cells": ("b",)}), path, "pairs") == 3.0
    with pytest.raises(UserError, match="0 rows have a stream that begins with 'codes'"):
        read_measure(measure.model_copy(update={"stream": "codes"}), path, "pairs")


def test_memory_is_the_greatest_sum_of_tensors_alive():
    kept = []

    def work():
        kept.append(torch.empty(1 << 20, dtype=torch.uint8))
        for _ in range(3):
            torch.empty(3 << 20, dtype=torch.uint8)
        kept.append(torch.empty(1 << 18))

    peak, left = allocated(work, CPU)
    assert peak == pytest.approx(4 << 20, rel=0.01)
    assert left == pytest.approx(2 << 20, rel=0.01)
    # Of what a work before it has left, the release counts.
    assert allocated(kept.clear, CPU)[1] == pytest.approx(-(2 << 20), rel=0.01)


def test_a_step_holds_weights_moments_and_gradients(recipe, tmp_path, monkeypatch):
    """Measured on a tiny model; time is that of a clock that tells one second for each look."""
    budget = Budget(memory_gib=1, batches=(4, 8), rounds=2)
    _, variants = load_comparison(definition(tmp_path, recipe))
    clock = iter(range(10_000))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(next(clock)))
    path = tmp_path / cost.FILE
    cost.measure_here(variants, budget, path)
    costs = cost.costs_of(variants, budget, tmp_path, measure=False)
    for variant in variants:
        found = costs.variants[variant.name]
        parameters = count_parameters(variant.recipe.model).total
        assert 4 * 4 * parameters < found.peaks[4] < found.peaks[8]
        assert found.seconds == {8: [1.0, 1.0]}
    # A measurement that was broken off goes on with that of its own machine alone.
    assert Costs.read(path, costs.inputs, costs.about) == costs
    assert Costs.read(path, costs.inputs, "another machine") is None
    with pytest.raises(UserError, match="run without --table"):
        cost.costs_of(variants[:1], budget, tmp_path, measure=False)


def test_equal_time_and_cost_are_arithmetic(recipe):
    gib = 2**30
    costs = Costs(
        "",
        "a machine",
        {
            "eve": Cost({8: gib // 2, 16: gib, 32: 2 * gib}, {8: [1.0, 1.0, 2.0], 16: [1.5, 1.5, 3.0]}),
            "all": Cost({8: gib, 16: gib + 1}, {8: [2.0, 4.0, 3.0]}),
        },
    )
    budget = Budget(memory_gib=1, batches=(8, 16, 32), rounds=3, minutes=0.5, published={"all": 3.5})
    table = cost_table(costs, budget)
    eve, all_three = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (eve["largest batch"], all_three["largest batch"]) == (16, 8)
    assert eve["seconds for 1,000 pairs"] == 1000 * 1.5 / 16
    per_pair = [2 / 8 / (1.5 / 16), 4 / 8 / (1.5 / 16), 3 / 8 / (3 / 16)]
    ratio = all_three["time per pair / first"]
    common = all_three["time / first, 8 pairs"]
    assert isinstance(ratio, Interval)
    assert isinstance(common, Interval)
    assert ratio.value == pytest.approx(np.median(per_pair))
    assert (ratio.low, ratio.high) == pytest.approx((min(per_pair), max(per_pair)))
    assert common.value == np.median([2, 4, 1.5])
    assert all_three["published"] == 3.5
    timed = timed_variant(
        load_variant("eve", str(recipe), ("stages.0.warmup_steps=3",)), budget, costs
    ).recipe
    assert timed.data.sources["pairs"].batch_size == 16
    assert (timed.stages[0].steps, timed.stages[0].warmup_steps) == (20, 5)
    with pytest.raises(
        UserError, match=r"'all' with 8 pairs needs 1.00 GiB, more than budget.memory_gib 0.5"
    ):
        costs.batch("all", budget.model_copy(update={"memory_gib": 0.5}))


def test_one_command_trains_measures_and_tells_what_failed(recipe, tmp_path, capsys):
    """Through real processes: one variant to its table, one whose training fails."""
    overrides = {
        "stages.0.steps": 2,
        "training.log_every": 1,
        "evaluation.shards": {"held out": str(recipe.parent / "train" / "*.tar")},
    }
    variants = {"good": {}, "broken": {"stages.0.init_from": str(tmp_path / "nowhere")}}
    path = definition(tmp_path, recipe, overrides=overrides, variants=variants, seeds=[1])
    out = tmp_path / "out"
    assert main([path, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "failed: broken, seed 1: eve.pretrain ended with exit code 2" in error
    assert "nowhere" in error
    (table, differences) = json.loads((out / "table.json").read_text())
    good, broken = table["rows"]
    value = good["words"]["by_seed"]["1"]
    assert 0 < value < 2 * math.log(40)
    assert (good["seeds"], good["steps"], broken["words"], broken["seeds"]) == (1, 2, None, 0)
    assert differences["rows"] == [{"variant": "broken", "words": None}]
    assert not (out / "good" / "seed-1" / "checkpoints").exists()
    made = (out / "good" / "seed-1" / "run.log").stat().st_mtime_ns
    assert main([path, "--out", str(out), "--only", "good"]) == 0
    assert (out / "good" / "seed-1" / "run.log").stat().st_mtime_ns == made
