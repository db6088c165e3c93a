"""Tables of a comparison, read from what its runs left behind."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eve.errors import UserError
from eve.model import count_parameters
from eve.tasks.report import Table, Value
from eve.tasks.statistics import Interval, Spread
from tools.comparisons.cost import GIB, Costs
from tools.comparisons.definition import Budget, Comparison, Measure
from tools.comparisons.runs import SeedRun, measures_of, read_metrics


def result_tables(comparison: Comparison, runs: Sequence[SeedRun], jobs: int) -> list[Table]:
    """What was measured of the runs that are there, and how they differ from the first variant's.

    Raises UserError where a measure names what an evaluation does not hold.
    """
    by_variant: dict[str, list[SeedRun]] = {name: [] for name in comparison.variants}
    for run in runs:
        if run.is_trained():
            by_variant[run.variant.name].append(run)
    spreads = {
        name: {measure.name: _spread(measure, some) for measure in comparison.measures}
        for name, some in by_variant.items()
    }
    names = [measure.name for measure in comparison.measures]
    columns = ["variant", *names, "seeds", "parameters", "steps", "seconds per step"]
    rows: list[list[Value]] = []
    for name, some in by_variant.items():
        values: list[Value] = [spreads[name][measure] or None for measure in names]
        rows.append([name, *values, len(some), *_about(some)])
    note = "Mean ± standard deviation (n - 1) over the seeds. Seconds per step: median of the runs' log"
    note += f", {jobs} runs side by side." if jobs > 1 else "."
    notes = [comparison.note, note] if comparison.note else [note]
    partly = [
        f"{name}, {measure.name} ({len(spread.by_seed) if spread else 0} of {len(some)} seeds)"
        for name, some in by_variant.items()
        for measure in comparison.measures
        if (spread := spreads[name][measure.name]) is None or len(spread.by_seed) < len(some)
        if some and measures_of(some[0], [measure])
    ]
    notes += [f"Not of all seeds yet: {'; '.join(partly)}."] if partly else []
    first = next(iter(by_variant))
    tables = [Table(comparison.title, columns, rows, notes)]
    if len(by_variant) > 1:
        changes: list[list[Value]] = [
            [name, *(difference(spreads[name][m], spreads[first][m]) for m in names)]
            for name in by_variant
            if name != first
        ]
        notes = [
            "Mean of the differences seed by seed [least, greatest]. *: all n seeds have one sign, as "
            "without any effect one difference in 2^(n - 1) would."
        ]
        tables.append(Table(f"Difference to {first}", ["variant", *names], changes, notes))
    return tables


def difference(spread: Spread | None, base: Spread | None) -> Spread | None:
    """Seed by seed, of those that both have."""
    if spread is None or base is None:
        return None
    changes = {
        seed: value - base.by_seed[seed] for seed, value in spread.by_seed.items() if seed in base.by_seed
    }
    return Spread(changes, compared=True) if changes else None


def _spread(measure: Measure, runs: Sequence[SeedRun]) -> Spread | None:
    found: dict[int, float] = {}
    for run in runs:
        path = run.evaluation(measure.task, measure.stage)
        if measures_of(run, [measure]) and path.is_file():
            found[run.seed] = read_measure(measure, path, run.recipe.stages[-1].name)
    return Spread(dict(sorted(found.items()))) if found else None


def read_measure(measure: Measure, path: Path, last_stage: str) -> float:
    """Mean over the cells. Raises UserError where table, column or cell is not in the file, or no number."""
    tables: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    try:
        of_cell = (
            _of_losses(measure, tables, last_stage) if measure.task == "losses" else _of(measure, tables)
        )
        values = []
        for cell in measure.cells if measure.cells is not None else of_cell:
            if cell not in of_cell:
                raise UserError(f"no cell '{cell}', only {', '.join(of_cell)}")
            value = of_cell[cell]
            value = value[0] if isinstance(value, list) else value  # of an interval
            if not isinstance(value, int | float):
                raise UserError(f"the cell '{cell}' holds {value!r}, not a number")
            values.append(float(value))
    except UserError as error:
        raise UserError(f"measure '{measure.name}' in {path}: {error}") from None
    return statistics.fmean(values)


def _of(measure: Measure, tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By cell, from a table with a row for each. Raises UserError."""
    by_title = {each["title"]: each["rows"] for each in tables}
    with_rows = [title for title, rows in by_title.items() if rows]
    found = begin_with(measure.table, with_rows)
    if len(found) != 1:
        titles = ", ".join(map(repr, found or by_title))
        raise UserError(f"{len(found)} tables with rows begin with '{measure.table}'; there are {titles}")
    rows = by_title[found[0]]
    first, *columns = rows[0]
    found = begin_with(measure.column, columns)
    if len(found) != 1:
        raise UserError(
            f"{len(found)} columns begin with '{measure.column}', expected one of "
            f"{', '.join(found or columns)}"
        )
    return {row[first]: row[found[0]] for row in rows}


def begin_with(start: str, names: Sequence[str]) -> list[str]:
    """The name itself where it is one, else those that begin so."""
    return [start] if start in names else [name for name in names if name.startswith(start)]


def _of_losses(measure: Measure, tables: Sequence[dict[str, Any]], last_stage: str) -> dict[str, Any]:
    """By cell, from the table whose rows are moments, streams and what is measured. Raises UserError."""
    rows = [row for row in tables[0]["rows"] if row["after"] == (measure.stage or last_stage)]
    found = [
        row
        for row in rows
        if row["stream"].startswith(measure.stream) and row["measure"].startswith(measure.measure)
    ]
    if len(found) != 1:
        there = "; ".join(f"{row['stream']}, {row['measure']}" for row in rows)
        raise UserError(
            f"{len(found)} rows have a stream that begins with '{measure.stream}' and a measure that begins "
            f"with '{measure.measure}', expected one of {there}"
        )
    about = ("after", "stream", "trained", "measure")
    return {cell: value for cell, value in found[0].items() if cell not in about}


def _about(runs: Sequence[SeedRun]) -> list[Value]:
    """[parameters, steps, seconds per step] of the runs of a variant."""
    if not runs:
        return [None, None, None]
    seconds = [
        line["time/step_seconds"]
        for run in runs
        for line in read_metrics(run.directory)
        if line.get("time/step_seconds") is not None
    ]
    parameters = count_parameters(runs[0].recipe.model).total
    return [parameters, runs[0].steps, statistics.median(seconds) if seconds else None]


def cost_table(costs: Costs, budget: Budget, note: str = "") -> Table:
    """One row for each variant, beside the first."""
    first = next(iter(costs.variants))
    common = costs.batches(first, budget)[0]
    columns = ["variant", "largest batch", "GiB", "seconds per step", "least", "pairs per second"]
    columns += ["seconds for 1,000 pairs", "time per pair / first"]
    columns += ["published"] if budget.published else []
    columns += [f"seconds per step, {common} pairs", f"time / first, {common} pairs"]
    rows: list[list[Value]] = []
    base = costs.variants[first]
    for name, cost in costs.variants.items():
        size, first_size = costs.batch(name, budget), costs.batch(first, budget)
        seconds = statistics.median(cost.seconds[size])
        row: list[Value] = [name, size, cost.peaks[size] / GIB, seconds, min(cost.seconds[size])]
        row += [size / seconds, 1000 * seconds / size]
        row.append(
            _ratio([s / size for s in cost.seconds[size]], [s / first_size for s in base.seconds[first_size]])
        )
        if budget.published:
            row.append(budget.published.get(name))
        row += [statistics.median(cost.seconds[common]), _ratio(cost.seconds[common], base.seconds[common])]
        rows.append(row)
    notes = [note] if note else []
    notes += [
        f"The largest of the batches {', '.join(map(str, budget.batches))} whose step needs at most "
        f"{budget.memory_gib:g} GiB: weights, optimizer state, batch, activations, gradients alive at once.",
        f"Medians of {budget.rounds} rounds that alternate between the variants; in brackets the least and "
        f"greatest ratio of a round. Plain loop, no loading of data. {costs.about}.",
    ]
    return Table("Cost of a step", columns, rows, notes)


def _ratio(seconds: Sequence[float], base: Sequence[float]) -> Interval:
    ratios = [a / b for a, b in zip(seconds, base, strict=False)]
    return Interval(statistics.median(ratios), min(ratios), max(ratios))
