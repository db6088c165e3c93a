"""Builds shards from annotations and raw images: parallel, resumable, and the same bytes with any workers.

The samples are cut into shards before any image is read, so a shard depends on its own samples alone:

    plan_samples(annotations, store) -> samples, missing      keys and places of the images
    build_shards(samples, reader, out, options, ...)          each shard is the job of one worker process

The directory keeps a journal, build.jsonl: the options in its first line, then a line for each finished
shard. A later call keeps the finished shards whose checksum still holds, makes the others, and refuses other
options. A broken image is left out and named in bad_images.tsv with its reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from eve.data.captions import Annotation
from eve.data.image_store import ImageReader, ImageStore, Location
from eve.data.manifest import IMAGE_EXTENSIONS, ShardInfo, write_manifest
from eve.data.resize import BadImage, prepare_image
from eve.data.shard_writer import Record, clean_key, shard_name, write_shard
from eve.errors import UserError

JOURNAL = "build.jsonl"
BAD_IMAGES = "bad_images.tsv"

Bad = tuple[str, str]  # name of an image, reason


@dataclass(frozen=True)
class BuildOptions:
    """What changes the bytes. `resize`: short side in pixels, None keeps every image byte for byte."""

    shard_size: int = 1000
    resize: int | None = None
    quality: int = 90


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A sample whose image has been found (`location` is None for a text)."""

    key: str
    name: str
    location: Location | None
    captions: list[str]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class BuildReport:
    shards: list[ShardInfo]
    bad: list[Bad]
    kept: int  # shards that an earlier run had finished


def plan_samples(
    annotations: Iterable[Annotation], store: ImageStore | None
) -> tuple[list[PlannedSample], list[Bad]]:
    """Samples in the order of the annotations, with keys made of the image names, and the missing images.

    Raises UserError where a name fits several images.
    """
    samples: list[PlannedSample] = []
    missing: list[Bad] = []
    keys: dict[str, int] = {}
    for number, annotation in enumerate(annotations):
        location = None
        if annotation.image is None:
            key = f"{number:09d}"
        else:
            assert store is not None
            if (location := store.find(annotation.image)) is None:
                missing.append((annotation.image, "missing"))
                continue
            head, _, extension = annotation.image.rpartition(".")
            key = clean_key(head if extension.lower() in IMAGE_EXTENSIONS else annotation.image)
        # Names that differ in what a key cannot hold: the second is called NAME-1.
        while (times := keys.get(key, 0)) > 0:
            keys[key] = times + 1
            key = f"{key}-{times}"
        keys[key] = 1
        samples.append(
            PlannedSample(key, annotation.image or key, location, annotation.captions, annotation.metadata)
        )
    return samples, missing


def build_shards(
    samples: list[PlannedSample],
    reader: ImageReader | None,
    out_dir: Path,
    options: BuildOptions,
    *,
    workers: int = 1,
    missing: list[Bad] | None = None,
    max_bad_share: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BuildReport:
    """Writes the shards, the manifest and the list of bad images into `out_dir`.

    `progress` gets (samples done, samples in all) after each shard. Raises UserError where `out_dir` holds
    shards of other options or samples, where more than `max_bad_share` of all samples are bad (`missing`
    included), or where the disk is full; what is finished by then stays and is taken up by the next call.
    """
    missing = missing or []
    chunks = [
        samples[start : start + options.shard_size] for start in range(0, len(samples), options.shard_size)
    ]
    make_directory(out_dir)
    journal = _Journal(out_dir, {**asdict(options), "samples_sha256": _fingerprint(samples)})
    results = journal.finished
    kept, done = len(results), sum(len(chunks[number]) for number in results)

    def check_share() -> None:
        bad = missing + [entry for number in sorted(results) for entry in results[number][1]]
        _write_bad(out_dir, bad)
        total = len(samples) + len(missing)
        if len(bad) > max_bad_share * total:
            raise UserError(
                f"{len(bad)} of {total} samples have a missing or broken image, more than the share "
                f"{max_bad_share:g} allowed, e.g. '{bad[0][0]}' ({bad[0][1]}); see {out_dir / BAD_IMAGES}"
            )

    check_share()
    progress(done, len(samples))
    jobs = [(out_dir / shard_name(i), chunk, options) for i, chunk in enumerate(chunks) if i not in results]
    for info, bad in _run(jobs, reader, min(workers, len(jobs))):
        number = int(info.name.removesuffix(".tar"))
        results[number] = info, bad
        journal.add(info, bad)
        if bad:
            check_share()
        done += len(chunks[number])
        progress(done, len(samples))
    shards = [results[number][0] for number in sorted(results) if results[number][0].samples]
    write_manifest(out_dir, shards)
    bad = missing + [entry for number in sorted(results) for entry in results[number][1]]
    return BuildReport(shards, bad, kept)


Job = tuple[Path, list[PlannedSample], BuildOptions]
Result = tuple[ShardInfo, list[Bad]]

_reader: ImageReader | None = None


def _run(jobs: list[Job], reader: ImageReader | None, workers: int) -> Iterator[Result]:
    """Results in the order in which they are ready."""
    if workers <= 1:
        _start(reader)
        yield from map(_build, jobs)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (reader,))
    pending: set[Future[Result]] = set()
    try:
        for job in jobs:
            # Two jobs a worker are under way at most: a job carries the captions of its samples.
            if len(pending) >= 2 * workers:
                ready, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ready)
            pending.add(pool.submit(_build, job))
        while pending:
            ready, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ready)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(reader: ImageReader | None) -> None:
    # Ctrl-C goes to the whole process group; the parent ends its workers, which finish their shard.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _start(reader)


def _start(reader: ImageReader | None) -> None:
    global _reader
    _reader = reader


def _build(job: Job) -> Result:
    path, samples, options = job
    bad: list[Bad] = []
    info = write_shard(path, _records(samples, options, bad))
    if not info.samples:
        path.unlink()
    return info, bad


def _records(samples: list[PlannedSample], options: BuildOptions, bad: list[Bad]) -> Iterator[Record]:
    for sample in samples:
        if sample.location is None:
            yield Record(sample.key, None, captions=sample.captions, metadata=sample.metadata)
            continue
        assert _reader is not None
        try:
            image_bytes, extension = prepare_image(
                _reader.read(sample.location), options.resize, options.quality
            )
        except (BadImage, OSError, BadZipFile) as error:
            bad.append((sample.name, " ".join(str(error).split())))
            continue
        yield Record(sample.key, image_bytes, extension, sample.captions, sample.metadata)


def make_directory(path: Path) -> None:
    """Raises UserError where there is a file of that name or it may not be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the directory {path} cannot be made: {error.strerror}") from None


class _Journal:
    """build.jsonl. `finished`: shard number -> result, of the shards that still are as they were written."""

    def __init__(self, out_dir: Path, options: dict[str, Any]) -> None:
        self._path = out_dir / JOURNAL
        self.finished: dict[int, Result] = {}
        content = self._path.read_bytes() if self._path.exists() else b""
        # A line without an end was being written when the process died.
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            if any(out_dir.glob("*.tar")):
                raise UserError(
                    f"{out_dir} holds shards that were not made here; give another directory or remove them"
                )
            self._path.write_bytes(b"")
            self._append(options)
            return
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))
        try:
            before, *entries = map(json.loads, whole.splitlines())
        except ValueError:
            raise UserError(f"{self._path} is broken; remove {out_dir} and begin again") from None
        for name, value in options.items():
            if before.get(name) != value:
                raise UserError(_other_options(out_dir, name, before.get(name), value))
        for entry in entries:
            info = ShardInfo(**entry["shard"])
            if info.samples == 0 or _is_intact(out_dir / info.name, info):
                bad = [(name, reason) for name, reason in entry["bad"]]
                self.finished[int(info.name.removesuffix(".tar"))] = info, bad

    def add(self, info: ShardInfo, bad: list[Bad]) -> None:
        self._append({"shard": asdict(info), "bad": bad})

    def _append(self, tree: dict[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(tree, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _other_options(out_dir: Path, name: str, before: object, now: object) -> str:
    if name == "samples_sha256":
        return f"{out_dir} holds shards of other samples (source, selection or order); give another directory"
    return f"{out_dir} holds shards made with {name} {before}, now it is {now}; give another directory"


def _is_intact(path: Path, info: ShardInfo) -> bool:
    if not path.is_file() or path.stat().st_size != info.bytes:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == info.sha256


def _fingerprint(samples: list[PlannedSample]) -> str:
    """Of what is to be written and in which order; not of where the images lie."""
    digest = hashlib.sha256()
    for sample in samples:
        row = [sample.key, sample.name, sample.captions, sample.metadata]
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _write_bad(out_dir: Path, bad: list[Bad]) -> None:
    path = out_dir / BAD_IMAGES
    if not bad:
        path.unlink(missing_ok=True)
        return
    path.write_text("".join(f"{name}\t{reason}\n" for name, reason in bad), encoding="utf-8")
