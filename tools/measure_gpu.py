"""All that is to be measured on a machine with a GPU, by one command: `make gpu`.

    python -m tools.measure_gpu [--out runs/gpu] [--parts tests kernels step] [--recipe eve_base]
                                [--sizes quick] [--minutes 8.5] [KEY=VALUE ...]

    tests      pytest -m gpu
    kernels    python -m kernels.benchmark: every kernel beside its peers
    step       python -m tools.profile_step: a step of the recipe, its kernels, a routed layer beside a dense

Each part is a process with a share of the minutes (SHARES); one that fails or is stopped leaves the others.
OUT gets the files of the parts, their logs, environment.json, and summary.md: what was measured beside the
targets, ready for the README. With `--device cpu` the same is done at sizes of a CPU, where targets are not
judged. Exit code 2 where there is no GPU, 1 where a part failed or a target was missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Of the minutes, where all parts are measured: 8.5 are 150 s, 210 s and 150 s.
SHARES = {"tests": 5 / 17, "kernels": 7 / 17, "step": 5 / 17}
# Of its share, when the benchmark begins no further shape: the one in hand may take a while.
BEGIN_UNTIL = 0.75
PACKAGES = (
    "torch", "triton", "deepspeed", "liger-kernel", "cut-cross-entropy", "megablocks", "numpy", "pydantic",
    "sentencepiece", "webdataset",
)  # fmt: skip
NEEDED_BY_EVE = ("numpy", "pydantic", "yaml", "PIL", "sentencepiece", "safetensors", "webdataset")


@dataclass(frozen=True)
class Part:
    """How a part ended: `reason` is None where it did what it should."""

    seconds: float
    reason: str | None
    last_line: str


@dataclass(frozen=True)
class Target:
    """`measured` is None where it was not; `met` too."""

    what: str
    target: str
    measured: str | None
    met: bool | None


# ------------------------------------------------------------------------------------------ the environment


def environment(device: str, words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m tools.measure_gpu", *words]),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "missing": [name for name in NEEDED_BY_EVE if importlib.util.find_spec(name) is None],
    }
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "processors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": output_of(
                "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"
            ),
        }
    else:
        found["device"] = f"{platform.machine()} CPU"
    return found


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def output_of(*command: str) -> str | None:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


# -------------------------------------------------------------------------------------------------- the parts


def command_of(part: str, options: argparse.Namespace, seconds: float) -> list[str]:
    if part == "tests":
        words = ["pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        return [sys.executable, "-m", *words]
    if part == "kernels":
        minutes = f"{BEGIN_UNTIL * seconds / 60:.2f}"
        words = ["--device", options.device, "--sizes", options.sizes, "--minutes", minutes]
        words += ["--eager"] * options.eager
        words += ["--operations", *options.operations] if options.operations else []
        words += ["--rounds", str(options.rounds)] if options.rounds else []
        return [sys.executable, "-m", "kernels.benchmark", *words, "--out", str(options.out)]
    words = ["--recipe", options.recipe, "--device", options.device, "--out", str(options.out)]
    words += ["--batch", str(options.batch)] if options.batch else []
    words += ["--steps", str(options.rounds)] if options.rounds else []
    return [sys.executable, "-m", "tools.profile_step", *words, *options.overrides]


def run_part(command: list[str], log: Path, seconds: float) -> Part:
    """Its output goes to the log; past `seconds` it is stopped with all that it started."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            reason = None if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Part(time.monotonic() - start, reason, lines[-1].strip() if lines else "")


# ---------------------------------------------------------------------------------------------- the targets


def targets(kernels: dict[str, Any] | None, step: dict[str, Any] | None, tests: Part | None) -> list[Target]:
    """Those of the kernels' issue, on an H200."""
    found = []
    if tests is not None:
        found.append(Target("tests of the GPU", "all pass", tests.last_line, tests.reason is None))
    for operation in ("dispatch", "combine"):
        for part in ("forward", "backward"):
            share = of_ours(kernels, operation, lambda row, part=part: row["share"]["measured"][part])
            found.append(
                at_least(f"{operation} {part}, share of torch.clone's bandwidth", share, 0.85, "{:.0%}")
            )
    for rows, limit in ((2560, "below"), (512, "at most")):
        for what, value in (
            ("time", lambda row: row["median"]["both"]),
            ("memory", lambda row: row["peak_bytes"]),
        ):
            if rows == 512 and what == "memory":
                continue
            ratio = text_ratio(kernels, rows, value)
            met = None if ratio is None else (ratio < 1 if limit == "below" else ratio <= 1)
            shown = None if ratio is None else f"{ratio:.2f}x"
            name = f"masked text loss, {rows} rows: {what} over torch cross_entropy"
            found.append(Target(name, f"{limit} 1x", shown, met))
    ratio = step["layer_ratio"] if step else None
    found.append(
        Target(
            "soft-MoE layer over a dense one of equal active operations",
            "at most 1.08x",
            None if ratio is None else f"{ratio:.3f}x",
            None if ratio is None else ratio <= 1.08,
        )
    )
    share = None
    if step:
        speeds = [each for each in step["steps"].values() if not isinstance(each, str)]
        chosen = step["steps"].get("engine")
        chosen = chosen if isinstance(chosen, dict) else speeds[0]
        share = chosen["mfu"]
    found.append(at_least("model FLOP utilisation of the step, experts included", share, 0.45, "{:.1%}"))
    return found


def at_least(what: str, value: float | None, least: float, form: str) -> Target:
    shown = None if value is None else form.format(value)
    return Target(what, f"at least {least:.0%}", shown, None if value is None else value >= least)


def of_ours(
    kernels: dict[str, Any] | None, operation: str, value: Callable[[dict[str, Any]], float]
) -> float | None:
    """Of our row of the operation's first shape: T 32,768, D 768, K 2, E 32, uniform on a GPU."""
    rows = kernels["rows"] if kernels else []
    row = next((r for r in rows if r["case"]["operation"] == operation and r["peer"] == "ours"), None)
    return None if row is None or row["reason"] else value(row)


def text_ratio(
    kernels: dict[str, Any] | None, num_rows: int, value: Callable[[dict[str, Any]], float]
) -> float | None:
    rows = kernels["rows"] if kernels else []
    own = {
        row["peer"]: value(row)
        for row in rows
        if row["case"]["operation"] == "masked_text_loss"
        and row["case"]["tokens"] == num_rows
        and row["case"]["width"] == 768
        and not row["reason"]
    }
    if "ours" not in own or "torch cross_entropy" not in own:
        return None
    return own["ours"] / own["torch cross_entropy"]


# ----------------------------------------------------------------------------------------------- the summary


def summary(
    about: dict[str, Any], parts: dict[str, Part], found: list[Target], judged: bool, out: Path
) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items() if number)
    absent = ", ".join(name for name, number in about["packages"].items() if not number)
    lines = [
        f"# Measured on {about['device']}",
        "",
        f"{about['date']}, commit {about['commit']}, `{about['command']}`  ",
        f"{about['system']}, Python {about['python']}, {packages}"
        + (f"; driver and clock {about['driver']}, CUDA {about['cuda']}" if "cuda" in about else "")
        + "  ",
        f"Not installed: {absent or 'nothing of what is measured'}",
        "",
        "| part | s | result |",
        "|---|---:|---|",
    ]
    for name, part in parts.items():
        result = part.last_line if part.reason is None else f"**{part.reason}**: {part.last_line}"
        lines.append(f"| {name} | {part.seconds:.0f} | {result.replace('|', '/')[:200]} |")
    if about["missing"]:
        lines += ["", f"The tests and the step need: pip install {' '.join(about['missing'])}"]
    lines += ["", "| target | wanted | measured | |", "|---|---|---|---|"]
    for target in found:
        verdict = {True: "pass", False: "**miss**", None: "not measured"}[target.met]
        if not judged and target.met is not None:
            verdict = "not judged on a CPU"
        lines.append(f"| {target.what} | {target.target} | {target.measured or ''} | {verdict} |")
    for name in ("step.md", "kernels.md"):
        if (out / name).exists():
            text = (out / name).read_text()
            lines += ["", *("#" + line if line.startswith("#") else line for line in text.splitlines())]
    if (out / "kernels.png").exists():
        lines += ["", "![forward and backward of each operation](kernels.png)"]
    return "\n".join(lines) + "\n"


def read(path: Path) -> dict[str, Any] | None:
    """None where the part did not write it, or not to its end."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.measure_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=tuple(SHARES), default=tuple(SHARES))
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--recipe", default="eve_base")
    parser.add_argument("--batch", type=int, help="of the step; on a GPU the largest that fits")
    parser.add_argument("--sizes", choices=("quick", "full"), default="quick")
    parser.add_argument("--operations", nargs="+", help="of the benchmark; all")
    parser.add_argument("--rounds", type=int, help="of the benchmark, and steps that are timed")
    parser.add_argument("--eager", action="store_true", help="leave out what torch.compile makes of peers")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(argv)
    for name in ("rounds", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            print(f"error: --{name} is {getattr(options, name)}, expected at least 1", file=sys.stderr)
            return 2
    if not 0 < options.minutes < float("inf"):
        print(f"error: --minutes is {options.minutes:g}, expected more than 0", file=sys.stderr)
        return 2
    if importlib.util.find_spec("torch") is None:
        print(f"error: {sys.executable} has no torch: pip install -r requirements.txt", file=sys.stderr)
        return 2
    if options.device == "cuda" and not has_gpu():
        sentence = "this machine has no GPU that torch can use; --device cpu measures what a CPU can"
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("kernels.json", "kernels.md", "kernels.png", "step.json", "step.md", "summary.md"):
        (options.out / name).unlink(missing_ok=True)  # of a run before: a part may make none
    about = environment(options.device, sys.argv[1:] if argv is None else argv)
    (options.out / "environment.json").write_text(json.dumps(about, indent=1))
    print(
        f"{about['device']}, torch {about['packages']['torch']}, commit {about['commit']} -> {options.out}",
        flush=True,
    )
    whole = 60 * options.minutes / sum(SHARES[part] for part in options.parts)
    parts: dict[str, Part] = {}
    found: list[Target] = []
    for name in options.parts:
        seconds = whole * SHARES[name]
        parts[name] = run_part(command_of(name, options, seconds), options.out / f"{name}.log", seconds)
        print(f"{name}: {parts[name].seconds:.0f} s, {parts[name].reason or 'done'}", flush=True)
        found = targets(
            read(options.out / "kernels.json"), read(options.out / "step.json"), parts.get("tests")
        )
        judged = options.device == "cuda"
        # After each part: what is there stays there, whatever ends this process.
        (options.out / "summary.md").write_text(summary(about, parts, found, judged, options.out))
        (options.out / "summary.json").write_text(
            json.dumps(
                {"parts": {n: asdict(p) for n, p in parts.items()}, "targets": [asdict(t) for t in found]},
                indent=1,
            )
        )
    for target in found:
        print(f"{target.what}: {target.measured or 'not measured'} ({target.target})")
    failed = any(part.reason is not None for part in parts.values())
    missed = options.device == "cuda" and any(target.met is False for target in found)
    return 1 if failed or missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
