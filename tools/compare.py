"""Trains the variants of a comparison with several seeds and puts what they reach into tables.

    python -m tools.compare NAME [--out runs/comparisons/NAME] [--jobs 2] [--seeds 1 2 3]
                            [--only VARIANT ...] [--table]

NAME is a file of tools/comparisons/ or a path; tools/comparisons/definition.py says what it holds. Each
variant is trained with each seed by a process of eve.pretrain, `--jobs` at once, and measured by
eve.evaluate. With a budget, what a step of each costs is measured first, in OUT/cost.json.
Writes OUT/VARIANT/seed-N/ (run directories), OUT/table.md and OUT/table.json (with the numbers of all seeds).
What is finished is not made again: stopped, the same command goes on. A run that fails is told and the others
go on; the exit code is 1 then, and 2 with one sentence for a mistake of the user.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eve.errors import UserError
from eve.tasks.report import Table, to_text, write
from tools.comparisons.cost import check_budget, costs_of, timed_variant
from tools.comparisons.definition import load_comparison
from tools.comparisons.runs import Runner, check_measures, runs_of
from tools.comparisons.tables import cost_table, result_tables


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="file of tools/comparisons/ without .yaml, or a path")
    parser.add_argument("--out", type=Path, help="default: runs/comparisons/NAME")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once; they share the cores")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of the file")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run no others")
    parser.add_argument("--table", action="store_true", help="run nothing; tables of what is there")
    options = parser.parse_args(arguments)
    try:
        return compare(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(options: argparse.Namespace) -> int:
    """The exit code. Raises UserError, before anything runs where it can be known."""
    comparison, variants = load_comparison(options.name)
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}, expected at least 1")
    for name in options.only or ():
        if name not in comparison.variants:
            raise UserError(f"--only {name}: there is no such variant, only {', '.join(comparison.variants)}")
    out = options.out or Path("runs/comparisons") / Path(options.name).stem
    seeds = list(dict.fromkeys(options.seeds or comparison.seeds))
    code = 0
    tables: list[Table] = []
    if comparison.budget is not None:
        check_budget(variants, comparison.budget)
    if not options.table:
        check_measures(variants, comparison.measures)
    if comparison.budget is not None:
        costs = costs_of(variants, comparison.budget, out, measure=not options.table)
        tables.append(cost_table(costs, comparison.budget, "" if comparison.measures else comparison.note))
        print(f"\n{to_text(tables[0])}\n", flush=True)
        variants = [timed_variant(each, comparison.budget, costs) for each in variants]
    if comparison.measures:
        runs = runs_of(variants, seeds, out)
        if not options.table:
            wanted = [run for run in runs if not options.only or run.variant.name in options.only]
            code = Runner(wanted, comparison.measures, options.jobs).make()
        results = result_tables(comparison, runs, options.jobs)
        for table in results:
            print(f"\n{to_text(table)}")
        tables += results
    out.mkdir(parents=True, exist_ok=True)
    for name in ("table.md", "table.json"):
        write(out / name, tables)
    print(f"\ntables: {out / 'table.md'}, {out / 'table.json'}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
