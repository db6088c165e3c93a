"""Draws the curves of one run or more from their metrics.jsonl.

    python tools/plot_metrics.py runs/eve_tiny [runs/other ...] [--output FILE.png] [--panels loss lr ...]

A panel shows every metric that is called `PANEL` or `PANEL/...`; without --panels, the losses one by one
and the usual rest. Runs are told apart by line style, the metrics of a panel by colour. Without --output
the picture is curves.png in the directory of the first run. Needs matplotlib (requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python tools/...` finds eve

from eve.errors import UserError

Curve = tuple[list[int], list[float]]

# Shown where they are, after a panel for the loss of each stream.
PANELS = ("accuracy", "grad_norm", "lr", "time/pairs_per_second")
LINE_STYLES = ("-", "--", ":", "-.")


def read_curves(run: Path) -> dict[str, Curve]:
    """Metric -> (steps, values), in the order of the file; a value that was not finite leaves a gap (NaN).

    `run` is a run directory or a metrics.jsonl. Raises UserError where there is none or a line is no JSON.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"there is no {path}; expected a run directory or its metrics.jsonl")
    curves: dict[str, Curve] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            step = record.pop("step")
        except (json.JSONDecodeError, KeyError, AttributeError):
            raise UserError(f"line {number} of {path} is not a JSON object with a step") from None
        for name, value in record.items():
            steps, values = curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(math.nan if value is None else value)
    return curves


def default_panels(runs: dict[str, dict[str, Curve]]) -> list[str]:
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    losses = [name for name in names if _shows("loss", name)]
    return losses + [panel for panel in PANELS if any(_shows(panel, name) for name in names)]


def draw_curves(runs: dict[str, dict[str, Curve]], panels: Sequence[str], output: Path) -> None:
    """One picture, two panels side by side. Raises UserError where a panel matches nothing.

    Needs matplotlib; raises UserError without it.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("matplotlib is not installed; pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = math.ceil(len(panels) / 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 3.2 * rows), squeeze=False, layout="constrained")
    for panel, axis in zip(panels, axes.flat, strict=False):
        names = sorted({name for curves in runs.values() for name in curves if _shows(panel, name)})
        if not names:
            known = sorted({name for curves in runs.values() for name in curves})
            raise UserError(
                f"no metric is called '{panel}' or '{panel}/...'; the metrics are {', '.join(known)}"
            )
        for style, (run, curves) in enumerate(runs.items()):
            for colour, name in enumerate(name for name in names if name in curves):
                label = f"{run}: {name}" if len(runs) > 1 else name
                line_style = LINE_STYLES[style % len(LINE_STYLES)]
                axis.plot(*curves[name], line_style, color=f"C{colour % 10}", label=label, linewidth=1.2)
        axis.set_title(panel)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1 or len(runs) > 1:
            axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def _shows(panel: str, name: str) -> bool:
    return name == panel or name.startswith(panel + "/")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, help="default: curves.png in the first RUN")
    parser.add_argument("--panels", nargs="+")
    options = parser.parse_args(arguments)
    try:
        curves = {str(run): read_curves(run) for run in options.runs}
        first = options.runs[0]
        output = options.output or (first if first.is_dir() else first.parent) / "curves.png"
        draw_curves(curves, options.panels or default_panels(curves), output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
