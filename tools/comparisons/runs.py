"""The runs of a comparison: one process for each variant and seed, then its evaluations.

    OUT/VARIANT/seed-N/            a run directory of eve.pretrain
        run.log                    what its processes said
        measures/WHEN-TASK-HASH.json    tables of eve.evaluate; the hash is of the evaluation's settings

What is finished is not made again, and what was broken off goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from eve.config import Recipe
from eve.errors import UserError
from eve.evaluate import TASKS, check_cells
from eve.pretrain import FREE_KEYS, differing_keys
from eve.training.export import file_name, stage_exports
from tools.comparisons.definition import Measure, Variant, flow
from tools.progress import Progress

LOG = "run.log"
# Of a log that a failure shows.
LAST_LINES = 3
# Reading how far all runs are takes some of the time that they need.
SECONDS_BETWEEN_LOOKS = 10


@dataclass(frozen=True)
class SeedRun:
    """One variant with one seed; `variant.recipe` has the seed."""

    variant: Variant
    seed: int
    directory: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def recipe(self) -> Recipe:
        return self.variant.recipe

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.recipe.stages)

    def is_trained(self) -> bool:
        return (self.directory / "export" / "model.safetensors").is_file()

    def steps_made(self) -> int:
        if self.is_trained():
            return self.steps
        return max((line["step"] for line in read_metrics(self.directory)), default=0)

    def checkpoint(self, task: str, stage: str | None) -> Path:
        """What a task measures: the model at the end of that stage, or of the run; losses those of all."""
        if task == "losses":
            return self.directory
        stages = [each.name for each in self.recipe.stages]
        if stage in (None, stages[-1]):
            return self.directory / "export"
        return stage_exports(self.directory, self.recipe)[stages.index(stage)]

    def evaluation(self, task: str, stage: str | None) -> Path:
        """The file with its tables."""
        settings = flow(self.recipe.evaluation.model_dump(mode="json"))
        digest = f"{zlib.crc32(settings.encode()):08x}"
        moment = "stages" if task == "losses" else f"after_{file_name(stage)}" if stage else "end"
        return self.directory / "measures" / f"{moment}-{task}-{digest}.json"


def runs_of(variants: Iterable[Variant], seeds: Sequence[int], out: Path) -> list[SeedRun]:
    """Seed after seed, so that a table of the first seeds is there early. Raises UserError."""
    variants = list(variants)
    runs = [
        SeedRun(each.changed(f"seed={seed}"), seed, out / each.directory / f"seed-{seed}")
        for seed in seeds
        for each in variants
    ]
    for run in runs:
        check_same_recipe(run)
    return runs


def check_measures(variants: Iterable[Variant], measures: Sequence[Measure]) -> None:
    """Raises UserError where the held-out shards of a variant or what a task measures of it are not there."""
    for variant in variants:
        tasks = [m.task for m in measures if m.variants is None or variant.name in m.variants]
        try:
            for task in dict.fromkeys(tasks):
                TASKS[task].check(variant.recipe)
            if tasks:
                check_cells(variant.recipe.evaluation.shards)
        except UserError as error:
            raise UserError(f"variant '{variant.name}': {error}") from None


def check_same_recipe(run: SeedRun) -> None:
    """Raises UserError where the directory holds a run of another recipe."""
    if not (run.directory / "recipe.yaml").is_file():
        return
    # Other than to go on with a run, other data is another result.
    differing = [
        text
        for key, text in differing_keys(run.directory, run.recipe)
        if key.startswith("data.") or not FREE_KEYS.fullmatch(key)
    ]
    if differing:
        raise UserError(
            f"{run.directory} is of another recipe: {'; '.join(differing[:3])}; remove it or give another "
            "--out"
        )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    path = run_dir / "metrics.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):  # the last one, while it is written
            lines.append(json.loads(line))
    return lines


class Runner:
    """Makes runs and their evaluations, `jobs` at once. SIGTERM and SIGINT let the processes save and end."""

    def __init__(self, runs: Sequence[SeedRun], measures: Sequence[Measure], jobs: int) -> None:
        self.runs, self.measures, self.jobs = runs, measures, jobs
        self.failures: list[str] = []
        self.stopped_by: int | None = None
        self._processes: set[subprocess.Popen[bytes]] = set()
        # A second signal may come while the first is dealt with.
        self._lock = threading.RLock()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // jobs))}

    def make(self) -> int:
        """Exit code: 0, 1 where a run failed, 128 + the signal that stopped all."""
        progress = Progress("steps")
        former = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                futures = [pool.submit(self._make, run) for run in self.runs]
                while not all(future.done() for future in futures):
                    self._say(progress, futures)
                    wait(futures, timeout=SECONDS_BETWEEN_LOOKS)
                for future in futures:
                    future.result()
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        if self.stopped_by is not None:
            print("stopped; the same command goes on", flush=True)
            return 128 + self.stopped_by
        return 1 if self.failures else 0

    def _say(self, progress: Progress, futures: Sequence[Future[None]]) -> None:
        made = sum(
            run.steps if future.done() else run.steps_made()
            for run, future in zip(self.runs, futures, strict=True)
        )
        total = sum(run.steps for run in self.runs)
        progress(min(made, total - 1), total)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        with self._lock:  # not between a process's start and its entry
            for process in list(self._processes):
                process.send_signal(signal.SIGTERM)

    def _make(self, run: SeedRun) -> None:
        try:
            if not run.is_trained():
                self._train(run)
            for task, stage in dict.fromkeys((m.task, m.stage) for m in measures_of(run, self.measures)):
                self._evaluate(run, task, stage)
        except UserError as error:
            if self.stopped_by is None:
                self.failures.append(f"{run.name}: {error}")
                print(f"failed: {run.name}: {error}", file=sys.stderr, flush=True)

    def _train(self, run: SeedRun) -> None:
        run.directory.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        command = ["eve.pretrain", "--recipe", run.variant.recipe_name, "--run_dir", str(run.directory)]
        # --resume starts where there is nothing to go on from.
        self._process(run, [*command, "--resume", *run.variant.overrides])
        # Of a finished run nobody reads them, and they are the most of it.
        shutil.rmtree(run.directory / "checkpoints", ignore_errors=True)
        print(f"trained {run.name} in {time.monotonic() - start:,.0f} s", flush=True)

    def _evaluate(self, run: SeedRun, task: str, stage: str | None) -> None:
        path = run.evaluation(task, stage)
        if path.is_file():
            return
        path.parent.mkdir(exist_ok=True)
        writing = path.with_name(f"writing-{path.name}")
        evaluation = f"evaluation={flow(run.recipe.evaluation.model_dump(mode='json'))}"
        command = ["eve.evaluate", "--task", task, "--checkpoint", str(run.checkpoint(task, stage))]
        self._process(run, [*command, "--output", str(writing), evaluation])
        writing.rename(path)

    def _process(self, run: SeedRun, arguments: Sequence[str]) -> None:
        """Runs a module in a process of its own. Raises UserError with the end of its log where it fails."""
        log = run.directory / LOG
        with open(log, "ab") as file:
            start = file.tell()
            with self._lock:
                if self.stopped_by is not None:
                    raise UserError("stopped")
                process = subprocess.Popen(
                    [sys.executable, "-m", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                )
                self._processes.add(process)
            code = process.wait()
            self._processes.discard(process)
        if code != 0:
            with open(log, "rb") as file:
                file.seek(start)
                said = file.read().decode(errors="replace").splitlines()
            end = " / ".join([line.strip() for line in said if line.strip()][-LAST_LINES:])
            raise UserError(f"{arguments[0]} ended with exit code {code} ({log}): {end}")


def measures_of(run: SeedRun, measures: Iterable[Measure]) -> list[Measure]:
    return [m for m in measures if m.variants is None or run.variant.name in m.variants]
