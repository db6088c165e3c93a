"""Checks tar shards: python tools/verify_shards.py SHARDS [--kind pair|image|text]

SHARDS is a directory, a glob or a brace pattern of local tars. Prints a table and each kind of problem with
examples. Exit code 0: sound, 1: problems, 2: a mistake in the call.

    missing         listed in the manifest, but not there
    truncated       ends in the middle; what follows is lost
    manifest        counts, size or checksum differ from the manifest, or the manifest does not list it
    unread          sample with no member of a known extension, as where a key has a dot in it
    half            sample without an image, or without captions (for the kind of most samples, or --kind)
    image           cannot be decoded in full
    text            json or txt that cannot be parsed
    empty           blank caption
    duplicate-key   a key that occurs before, in this shard or another
    duplicate-image the bytes of an image that occurs before
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eve.data.manifest import (
    MANIFEST,
    Kind,
    ShardInfo,
    TarSample,
    raw_captions,
    read_manifest,
    read_member,
    read_texts,
    scan_tar,
)
from eve.data.resize import BadImage, prepare_image
from eve.data.shards import expand_braces
from eve.errors import UserError
from tools.progress import Progress

PROBLEMS = (
    *("missing", "truncated", "manifest", "unread", "half", "image", "text", "empty"),
    *("duplicate-key", "duplicate-image"),
)
EXAMPLES = 5


@dataclass
class ShardReport:
    """What one worker found in one shard. `problems`: (problem, sample or detail)."""

    info: ShardInfo
    problems: list[tuple[str, str]] = field(default_factory=list)
    # Per sample: key, has an image, number of captions that are not blank, hash of the image's bytes.
    samples: list[tuple[str, bool, int, bytes]] = field(default_factory=list)

    def add(self, problem: str, detail: str) -> None:
        self.problems.append((problem, detail))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="verify_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", help="directory, glob or brace pattern")
    parser.add_argument("--kind", choices=("pair", "image", "text"), help="what each sample should be")
    parser.add_argument("--allow", action="append", default=[], choices=PROBLEMS, help="report, but pass")
    parser.add_argument("--no-decode", action="store_true", help="do not decode the images")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    try:
        paths, listed = find_shards(options.shards)
        reports = verify(paths, listed, options.kind, not options.no_decode, options.workers)
    except UserError as error:
        print(f"verify_shards: {error}", file=sys.stderr)
        return 2
    _print_table(reports)
    found = {problem for report in reports for problem, _ in report.problems}
    return 1 if found - set(options.allow) else 0


def find_shards(pattern: str) -> tuple[list[Path], dict[Path, ShardInfo] | None]:
    """(paths of the pattern, what the manifests beside them list of it), None where there is no manifest.

    The paths include what a manifest lists and is missing. Raises UserError where nothing matches.
    """
    patterns = [str(Path(pattern) / "*.tar")] if Path(pattern).is_dir() else expand_braces(pattern)
    paths = {
        Path(path) for part in patterns for path in (glob.glob(part) if glob.has_magic(part) else [part])
    }
    listed: dict[Path, ShardInfo] | None = None
    for directory in sorted({path.parent for path in paths} | {Path(part).parent for part in patterns}):
        if (directory / MANIFEST).exists():
            infos = {directory / info.name: info for info in read_manifest(directory)}
            named = {path for path in infos if any(fnmatchcase(str(path), part) for part in patterns)}
            paths |= named
            listed = {**(listed or {}), **{path: infos[path] for path in named}}
    if not listed and not any(path.is_file() for path in paths):
        raise UserError(f"no shard matches '{pattern}'")
    return sorted(paths), listed


def verify(
    paths: list[Path],
    listed: dict[Path, ShardInfo] | None,
    kind: Kind | None,
    decode: bool,
    workers: int,
) -> list[ShardReport]:
    """A report for each shard, in order; `kind` None is what most samples of all shards are."""
    progress = Progress("shards")
    check = partial(check_shard, decode=decode)
    if workers > 1 and len(paths) > 1:
        with ProcessPoolExecutor(min(workers, len(paths)), get_context("spawn")) as pool:
            reports = _collect(pool.map(check, paths), len(paths), progress)
    else:
        reports = _collect(map(check, paths), len(paths), progress)
    if listed is not None:
        for path, report in zip(paths, reports, strict=True):
            if ("missing", "") not in report.problems:
                _compare(report, listed.get(path))
    _check_halves(reports, kind)
    _check_duplicates(reports)
    return reports


def _collect(results: Iterator[ShardReport], total: int, progress: Progress) -> list[ShardReport]:
    reports: list[ShardReport] = []
    for report in results:
        reports.append(report)
        progress(len(reports), total)
    return reports


def check_shard(path: Path, decode: bool) -> ShardReport:
    """Everything that can be told from one shard alone."""
    report = ShardReport(ShardInfo(path.name, 0, 0, 0, 0, ""))
    if not path.is_file():
        report.add("missing", "")
        return report
    try:
        index = scan_tar(path)
    except UserError as error:
        report.add("truncated", str(error))
        return report
    if index.truncated:
        report.add("truncated", f"after {len(index.samples)} samples")
    with open(path, "rb") as file:
        for sample in index.samples:
            _check_sample(file, sample, decode, report)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    report.info = ShardInfo(
        name=path.name,
        samples=len(report.samples),
        images=sum(has_image for _, has_image, _, _ in report.samples),
        captions=sum(captions for _, _, captions, _ in report.samples),
        bytes=path.stat().st_size,
        sha256=digest,
    )
    return report


def _check_sample(file: BinaryIO, sample: TarSample, decode: bool, report: ShardReport) -> None:
    captions: list[str] = []
    if sample.image is None and not sample.has_text:
        names = " ".join(f".{extension}" for extension in sample.members)
        report.add("unread", f"{sample.key}: only {names}; a key ends at its first dot")
    try:
        captions, _ = raw_captions(*read_texts(file, sample))
    except ValueError as error:
        report.add("text", f"{sample.key}: {error}")
    blank = sum(not caption.strip() for caption in captions)
    if blank:
        report.add("empty", f"{sample.key}: {blank} of {len(captions)} captions")
    fingerprint = b""
    if sample.image is not None:
        image_bytes = read_member(file, sample, sample.image) or b""
        fingerprint = hashlib.blake2b(image_bytes, digest_size=16).digest()
        if decode:
            try:
                prepare_image(image_bytes, None, 90)
            except BadImage as error:
                report.add("image", f"{sample.key}.{sample.image}: {error}")
    report.samples.append((sample.key, sample.image is not None, len(captions) - blank, fingerprint))


def _compare(report: ShardReport, listed: ShardInfo | None) -> None:
    if listed is None:
        report.add("manifest", "not listed")
        return
    for name in ("samples", "images", "captions", "bytes"):
        found, expected = getattr(report.info, name), getattr(listed, name)
        if found != expected:
            report.add("manifest", f"{name} {found}, listed {expected}")
    if report.info.sha256 != listed.sha256:
        report.add("manifest", "another checksum")


def _check_halves(reports: list[ShardReport], kind: Kind | None) -> None:
    samples = [sample for report in reports for sample in report.samples]
    with_image = 2 * sum(has_image for _, has_image, _, _ in samples) > len(samples)
    with_text = 2 * sum(captions > 0 for _, _, captions, _ in samples) > len(samples)
    needs_image = with_image if kind is None else kind != "text"
    needs_text = with_text if kind is None else kind != "image"
    for report in reports:
        for key, has_image, captions, _ in report.samples:
            if needs_image and not has_image:
                report.add("half", f"{key}: no image")
            if needs_text and not captions:
                report.add("half", f"{key}: no caption")


def _check_duplicates(reports: list[ShardReport]) -> None:
    keys: dict[str, str] = {}
    images: dict[bytes, str] = {}
    for report in reports:
        for key, has_image, _, fingerprint in report.samples:
            place = f"{key} of {report.info.name}"
            if (first := keys.setdefault(key, place)) is not place:
                report.add("duplicate-key", f"{place}, as in {first.rpartition(' of ')[2]}")
            if has_image and (first := images.setdefault(fingerprint, place)) is not place:
                report.add("duplicate-image", f"{place}, as {first}")


def _print_table(reports: list[ShardReport]) -> None:
    """Shards with problems one by one, the sound ones as one line, the sum."""
    width = max(len("problems"), 24, *(len(report.info.name) for report in reports))
    print(f"{'shard':<{width}} {'samples':>10} {'images':>10} {'captions':>10} {'MB':>10}  problems")

    def line(name: str, rows: list[ShardReport]) -> None:
        sums = [
            sum(getattr(row.info, column) for row in rows) for column in ("samples", "images", "captions")
        ]
        size = sum(row.info.bytes for row in rows) / 1e6
        counts = Counter(problem for row in rows for problem, _ in row.problems)
        text = ", ".join(f"{counts[problem]} {problem}" for problem in PROBLEMS if counts[problem]) or "none"
        print(f"{name:<{width}} {sums[0]:>10,} {sums[1]:>10,} {sums[2]:>10,} {size:>10,.1f}  {text}")

    broken = [report for report in reports if report.problems]
    for report in broken:
        line(report.info.name, [report])
    if len(broken) < len(reports):
        line(
            f"{len(reports) - len(broken)} sound shards",
            [report for report in reports if not report.problems],
        )
    if broken:
        line("all", reports)
    for problem in PROBLEMS:
        details = [
            (report.info.name, detail)
            for report in reports
            for name, detail in report.problems
            if name == problem
        ]
        for shard, detail in details[:EXAMPLES]:
            print(f"{problem:<16}{shard}{': ' if detail else ''}{detail}")
        if len(details) > EXAMPLES:
            print(f"{'':<16}and {len(details) - EXAMPLES} more")


if __name__ == "__main__":
    sys.exit(main())
