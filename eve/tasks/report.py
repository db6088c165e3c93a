"""Tables of results, for the terminal, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eve.errors import UserError
from eve.tasks.statistics import Interval, Spread

Value = float | int | str | Interval | Spread | None

SUFFIXES = (".md", ".json")


@dataclass(frozen=True)
class Table:
    """Rows of named columns. `notes` say what a reader must know to read the numbers rightly."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    notes: Sequence[str] = ()


def shown(value: Value) -> str:
    """Four decimals, integers in full, an interval as `0.1234 [0.1100, 0.1300]`.

    A number of several seeds as mean ± deviation; differences as mean, least and greatest, with * where all
    seeds agree: `+0.0123 [+0.0100, +0.0150]*`.
    """
    if value is None:
        return "-"
    if isinstance(value, Interval):
        return f"{value.value:z.4f} [{value.low:z.4f}, {value.high:z.4f}]"
    if isinstance(value, Spread):
        return _shown_spread(value)
    if isinstance(value, float):
        return f"{value:z.4f}"
    return str(value)


def _shown_spread(spread: Spread) -> str:
    values = spread.by_seed.values()
    if spread.compared:
        mark = "*" if spread.agrees else ""
        return f"{spread.mean:+z.4f} [{min(values):+z.4f}, {max(values):+z.4f}]{mark}"
    deviation = spread.deviation
    return f"{spread.mean:z.4f}" + ("" if deviation is None else f" ± {deviation:z.4f}")


def to_text(table: Table) -> str:
    """Aligned columns for the terminal: names to the left, numbers to the right; no rows, no columns."""
    if not table.rows:
        return "\n".join([table.title, *table.notes])
    cells = [list(table.columns), *([shown(value) for value in row] for row in table.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.columns))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join((first, *rest)).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([table.title, line(cells[0]), rule, *map(line, cells[1:]), *table.notes])


def to_markdown(table: Table) -> str:
    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"

    rule = ["---", *("---:" for _ in table.columns[1:])]
    rows = [line([shown(value) for value in row]) for row in table.rows]
    notes = [f"\n{note}" for note in table.notes]
    if not table.rows:
        return "\n".join([f"### {table.title}", *notes])
    return "\n".join([f"### {table.title}\n", line(table.columns), line(rule), *rows, *notes])


def to_json(tables: Sequence[Table]) -> str:
    """A list of tables; an interval is [value, low, high], a spread has all seeds; numbers in full."""

    def plain(value: Value) -> object:
        if isinstance(value, Spread):
            deviation = {} if value.compared else {"deviation": value.deviation}
            return {"mean": value.mean, **deviation, "by_seed": dict(value.by_seed)}
        return [value.value, value.low, value.high] if isinstance(value, Interval) else value

    return json.dumps(
        [
            {
                "title": table.title,
                "rows": [
                    {column: plain(value) for column, value in zip(table.columns, row, strict=True)}
                    for row in table.rows
                ],
                "notes": list(table.notes),
            }
            for table in tables
        ],
        indent=1,
    )


def check_output(path: Path) -> None:
    """Raises UserError where `write` could not write there."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--output {path} ends in '{path.suffix}', expected {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no directory {path.parent}")


def write(path: Path, tables: Sequence[Table]) -> None:
    """All tables into a .md or .json file."""
    text = to_json(tables) if path.suffix == ".json" else "\n\n".join(map(to_markdown, tables))
    path.write_text(text + "\n", encoding="utf-8")
