"""What was measured, as tables in markdown, as JSON, and as a plot."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.benchmark.cost import Cost, Roofline, costs
from kernels.benchmark.measure import PARTS, Row


@dataclass(frozen=True)
class Machine:
    """`dtype` is that of the rows; `measured` by torch.clone and a matrix product of that type."""

    device: str
    versions: str
    date: str
    command: str
    dtype: torch.dtype
    measured: Roofline
    published: Roofline | None


def machine_lines(machine: Machine) -> list[str]:
    lines = [f"{machine.device}, {machine.versions}, {machine.date}, {machine.dtype}", f"`{machine.command}`"]
    for kind, peak in (("measured", machine.measured), ("published", machine.published)):
        if peak is not None:
            lines.append(f"{kind}: {peak.bandwidth / 1e9:,.0f} GB/s, {peak.flops / 1e12:,.1f} TFLOP/s")
    return lines


def medians(row: Row) -> dict[str, float]:
    return {part: statistics.median(row.seconds[part]) for part in PARTS}


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def shares(row: Row, machine: Machine) -> dict[str, dict[str, float]]:
    """{measured or published: {part: least possible time / time}}."""
    forward, backward = costs(row.case, machine.dtype.itemsize)
    parts = (forward, backward, Cost(forward.bytes + backward.bytes, forward.flops + backward.flops))
    found, seconds = {}, medians(row)
    for kind, peak in (("measured", machine.measured), ("published", machine.published)):
        if peak is not None:
            found[kind] = {
                part: peak.seconds(cost) / seconds[part] for part, cost in zip(PARTS, parts, strict=True)
            }
    return found


COLUMNS = (
    "peer", "forward", "backward", "both", "spread", "both / ours", "share fwd", "share bwd", "of published",
    "host", "peak MB", "",
)  # fmt: skip


def case_table(rows: list[Row], machine: Machine) -> list[str]:
    """A line a peer; times in milliseconds, shares of the roofline as measured."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 2) + "|---|"]
    ours = medians(rows[0])["both"] if rows[0].reason is None else None
    for row in rows:
        if row.reason is not None:
            cells = [row.peer, *[""] * (len(COLUMNS) - 2), row.reason]
        else:
            time, share = medians(row), shares(row, machine)
            cells = [row.peer, *(f"{time[part] * 1e3:.3f}" for part in PARTS)]
            cells.append(f"{spread(row.seconds['both']):.0%}")
            cells.append("" if ours is None else f"{time['both'] / ours:.2f}")
            cells += [f"{share['measured'][part]:.0%}" for part in PARTS[:2]]
            cells.append(f"{share['published']['both']:.0%}" if "published" in share else "")
            cells.append(f"{statistics.median(row.host) * 1e3:.3f}" if row.host else "")
            cells.append("" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}")
            cells.append(f"without {', '.join(row.without)}" if row.without else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(results: list[list[Row]], machine: Machine, left_out: list[str]) -> str:
    """`results`: the rows of each case."""
    lines = ["# Kernels beside their peers", "", *[f"{line}  " for line in machine_lines(machine)], ""]
    lines += [
        "Times in ms, median over rounds that alternate between the peers; spread: half the distance of the "
        "quartiles of both. Share: least time by the measured peaks (kernels/benchmark/cost.py) over the "
        "time; of published: the same of both by the data sheet. Host: ms until both were launched. Peak: "
        "memory of both beyond the inputs.",
        "",
    ]
    for operation in dict.fromkeys(rows[0].case.operation for rows in results):
        lines += [f"## {operation}", ""]
        for rows in results:
            if rows[0].case.operation == operation:
                lines += [f"**{rows[0].case.describe()}**", "", *case_table(rows, machine), ""]
    if left_out:
        lines += ["Not measured, for want of time:", "", *[f"- {each}" for each in left_out], ""]
    return "\n".join(lines)


def as_json(results: list[list[Row]], machine: Machine, left_out: list[str]) -> str:
    def of(row: Row) -> dict[str, Any]:
        found = {**asdict(row), "describe": row.case.describe()}
        if row.reason is None:
            found |= {"median": medians(row), "share": shares(row, machine)}
        forward, backward = costs(row.case, machine.dtype.itemsize)
        return {**found, "cost": {"forward": asdict(forward), "backward": asdict(backward)}}

    about = {**asdict(machine), "dtype": str(machine.dtype)}
    everything = {
        "machine": about,
        "left_out": left_out,
        "rows": [of(row) for rows in results for row in rows],
    }
    return json.dumps(everything, indent=1)


def write(results: list[list[Row]], machine: Machine, left_out: list[str], directory: Path) -> None:
    """kernels.md and kernels.json, each whole at any moment, whatever ends the process."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("kernels.md", markdown(results, machine, left_out)),
        ("kernels.json", as_json(results, machine, left_out)),
    ):
        unfinished = directory / f"{name}.unfinished"
        unfinished.write_text(text)
        unfinished.replace(directory / name)


def plot(results: list[list[Row]], path: Path) -> None:
    """Of each operation the cases that differ from its first in the number of tokens alone: time of both."""
    from matplotlib.figure import Figure

    operations = list(dict.fromkeys(rows[0].case.operation for rows in results))
    columns = min(3, max(1, len(operations)))
    lines = max(1, -(-len(operations) // columns))
    figure = Figure(figsize=(5.2 * columns, 3.8 * lines), layout="constrained")
    for axes, operation in zip(figure.subplots(lines, columns, squeeze=False).flat, operations, strict=False):
        own = [rows for rows in results if rows[0].case.operation == operation]
        base = {**asdict(own[0][0].case), "tokens": 0, "compiled": False}
        alike = [r for r in own if {**asdict(r[0].case), "tokens": 0, "compiled": False} == base]
        for number, name in enumerate(dict.fromkeys(row.peer for rows in alike for row in rows)):
            points = sorted(
                (row.case.tokens, medians(row)["both"] * 1e3)
                for rows in alike
                for row in rows
                if row.peer == name and row.reason is None
            )
            if points:
                style = {"color": "black", "linewidth": 2} if number == 0 else {"color": f"C{number - 1}"}
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
        axes.set(xscale="log", yscale="log", title=f"{operation}\n{own[0][0].case.describe()}")
        axes.title.set_fontsize(8)
        axes.set(xlabel="tokens", ylabel="forward + backward, ms")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend(fontsize=6)
    figure.savefig(path, dpi=130)
