"""Sets of tar shards: what a pattern stands for, how many samples each shard has, and reading them.

A pattern is a directory, path, glob, brace pattern, URL or `pipe:` command, or several joined by `::`:

    data/coco                                     all *.tar of the directory
    data/coco/*.tar    data/{a,b}/{0000..0041}.tar
    https://host/coco/{0000..0041}.tar            needs curl, as webdataset does
    pipe:aws s3 cp s3://bucket/coco/{0000..0041}.tar -

The counts come from the manifest.json beside the shards. A local shard without one is scanned at start
(headers only). The manifest of a URL or command is read through the same address with the file name of
the tar, the last `NAME.tar` in it, replaced by manifest.json: above, that is
`pipe:aws s3 cp s3://bucket/coco/manifest.json -`.

A shard is called by its path relative to the directory that all shards of the set share, so the same set in
another place is the same set.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import tarfile
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from webdataset.gopen import gopen

from eve.data.manifest import MANIFEST, TarIndex, read_manifest, scan_tar, split_name
from eve.errors import UserError

# Attempts at a shard that is streamed, and seconds between them.
ATTEMPTS = 3
PAUSE = 1.0
# Files of local shards that a process keeps open.
MAX_OPEN_FILES = 64

CUT_SHORT = "missing from a shard that is cut short"

_TAR = re.compile(r"[^\s'\"=?&]*\.tar(?![^\s'\"?&#])")
_REMOTE = re.compile(r"^(pipe:|(?!file:)[a-z][a-z0-9+.-]*://)")


class BadSample(Exception):
    """A sample that cannot be used: counted by `reason`, named by shard and key, and skipped."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"sample {key} of shard {shard}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason


@dataclass(frozen=True)
class RawSample:
    """The bytes of the members of one key, by extension (lower case)."""

    shard: str
    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Shard:
    """`address`: local path, URL or `pipe:` command. `samples`: what the manifest says, or the scan."""

    name: str
    address: str
    samples: int


@dataclass(frozen=True)
class ShardSet:
    """Shards sorted by name. `local`: all are files here, read by offset; else all are streamed in order."""

    pattern: str
    shards: tuple[Shard, ...]
    local: bool

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(shard.samples for shard in self.shards)

    @property
    def num_samples(self) -> int:
        return sum(self.counts)


def resolve(pattern: str) -> ShardSet:
    """The shards that a pattern stands for. Raises UserError where there are none, or no counts to be had."""
    addresses = expand(pattern)
    local = not any(_REMOTE.match(address) for address in addresses)
    paths = [_path_in(address) for address in addresses]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths]) if len(paths) > 1 else None
    counts = _local_counts(addresses, pattern) if local else _remote_counts(addresses)
    shards = sorted(
        (
            Shard(os.path.relpath(path, shared) if shared else os.path.basename(path), address, count)
            for path, address, count in zip(paths, addresses, counts, strict=True)
        ),
        key=lambda shard: shard.name,
    )
    for first, second in itertools.pairwise(shards):
        if first.name == second.name:
            raise UserError(f"the shards '{pattern}' name {first.name} twice")
    if not sum(counts):
        raise UserError(f"the shards '{pattern}' hold no samples")
    return ShardSet(pattern, tuple(shards), local)


def expand(pattern: str) -> list[str]:
    """Addresses of a pattern, each ending in .tar. Raises UserError where a part of it matches nothing."""
    addresses: list[str] = []
    for part in (address for joined in pattern.split("::") for address in expand_braces(joined)):
        if _REMOTE.match(part):
            if not _TAR.search(part):
                raise UserError(f"the shard address '{part}' names no .tar file")
            addresses.append(part)
            continue
        path = os.path.expanduser(re.sub(r"^file:(//)?", "", part))
        if os.path.isdir(path):
            path = os.path.join(path, "*.tar")
        found = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not found:
            raise UserError(f"no file matches the shards '{part}'")
        for file in found:
            if not os.path.isfile(file):
                raise UserError(f"there is no shard {file}")
            if not file.endswith(".tar"):
                raise UserError(f"the shard {file} is not a .tar file")
        _refuse_missing(path, set(found))
        addresses.extend(found)
    return addresses


def expand_braces(pattern: str) -> list[str]:
    """`a{0..1}` -> `a0`, `a1`. Raises UserError."""
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"the shards '{pattern}' have a brace without its other half") from None


def _refuse_missing(path: str, found: set[str]) -> None:
    """A glob matches what is there; the manifest knows what should be."""
    if not glob.has_magic(os.path.basename(path)) or glob.has_magic(os.path.dirname(path)):
        return
    directory = os.path.dirname(path)
    if not os.path.isfile(os.path.join(directory, MANIFEST)):
        return
    for info in read_manifest(directory or "."):
        file = os.path.join(directory, info.name)
        if file not in found and fnmatchcase(file, path):
            raise UserError(f"the shard {file} is missing, {os.path.join(directory, MANIFEST)} lists it")


def _path_in(address: str) -> str:
    if not _REMOTE.match(address):
        return os.path.abspath(address)
    path = re.sub(r"^(pipe:)?([a-z][a-z0-9+.-]*:/)?", "", _TAR.findall(address)[-1])
    return os.path.join("/", path)


def _local_counts(addresses: list[str], pattern: str) -> list[int]:
    manifests: dict[str, dict[str, int] | None] = {}
    counts = []
    for address in addresses:
        directory, name = os.path.split(address)
        if directory not in manifests:
            has_one = os.path.isfile(os.path.join(directory, MANIFEST))
            manifests[directory] = (
                {info.name: info.samples for info in read_manifest(directory or ".")} if has_one else None
            )
        manifest = manifests[directory]
        if manifest is not None and name not in manifest:
            raise UserError(
                f"{os.path.join(directory, MANIFEST)} does not list the shard {name} of '{pattern}'; "
                "bring it up to date with tools/make_shards.py index"
            )
        counts.append(_scanned_count(address) if manifest is None else manifest[name])
    return counts


def _scanned_count(path: str) -> int:
    """Nobody knows how many samples a shard without manifest lost that is cut short: it counts as one."""
    index = scan_tar(path)
    return len(index.samples) + index.truncated


def _remote_counts(addresses: list[str]) -> list[int]:
    manifests: dict[str, dict[str, int]] = {}
    counts = []
    for address in addresses:
        if not _REMOTE.match(address):
            counts += _local_counts([address], address)
            continue
        tar = _path_in(address)
        name = os.path.basename(tar)
        head, _, tail = address.rpartition(name)
        where = head + MANIFEST + tail
        if where not in manifests:
            manifests[where] = _fetch_manifest(where)
        if name not in manifests[where]:
            raise UserError(f"{where} does not list the shard {name}")
        counts.append(manifests[where][name])
    return counts


def _fetch_manifest(where: str) -> dict[str, int]:
    try:
        with gopen(where, "rb") as stream:
            content = stream.read()
    except OSError:
        content = b""
    if not content:
        raise UserError(
            f"'{where}' gives no manifest; index the shards with tools/make_shards.py index and put the "
            "manifest.json beside them"
        )
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, MANIFEST).write_bytes(content)
        try:
            return {info.name: info.samples for info in read_manifest(directory)}
        except UserError as error:
            raise UserError(str(error).replace(os.path.join(directory, MANIFEST), where)) from None


# --- local shards: any sample at any time -----------------------------------------------------------------


class LocalShards:
    """Samples of local tars by (shard number, position), read by offset. One for each process."""

    def __init__(self, shard_set: ShardSet, max_indexed: int) -> None:
        """`max_indexed`: samples whose place in their tar is remembered (0.5 KB each), by whole shards. What
        is read in turns should fit: a shard that was forgotten is scanned again."""
        self._shards, self._max_indexed = shard_set.shards, max_indexed
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indices: OrderedDict[int, TarIndex] = OrderedDict()
        self._num_indexed = 0

    def read(self, shard: int, position: int, wanted: Callable[[str], bool]) -> RawSample | BadSample:
        """The members whose extension is `wanted`; a BadSample where the tar has no such sample."""
        name = self._shards[shard].name
        index = self._index(shard)
        if position >= len(index.samples):
            return BadSample(name, f"#{position}", CUT_SHORT)
        sample = index.samples[position]
        file = self._file(shard)
        members = {}
        for extension, (offset, size) in sample.members.items():
            if wanted(extension):
                members[extension] = os.pread(file, size, offset)
        return RawSample(name, sample.key, members)

    def _index(self, shard: int) -> TarIndex:
        if shard in self._indices:
            self._indices.move_to_end(shard)
            return self._indices[shard]
        index = scan_tar(self._shards[shard].address)
        expected = self._shards[shard].samples
        if len(index.samples) > expected:
            raise UserError(
                f"the shard {self._shards[shard].address} holds {len(index.samples)} samples, its manifest "
                f"says {expected}; bring it up to date with tools/make_shards.py index"
            )
        self._indices[shard] = index
        self._num_indexed += len(index.samples)
        while self._num_indexed > self._max_indexed and len(self._indices) > 1:
            self._num_indexed -= len(self._indices.popitem(last=False)[1].samples)
        return index

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        self._files[shard] = os.open(self._shards[shard].address, os.O_RDONLY)
        if len(self._files) > MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


# --- streamed shards: one sample after another ------------------------------------------------------------


def stream_shard(shard: Shard, skip: int, wanted: Callable[[str], bool]) -> Iterator[RawSample | BadSample]:
    """The samples of a shard from position `skip` on, through webdataset's gopen.

    Members of a key must stand together (tools/make_shards.py writes them so). A connection that breaks is
    opened again and what was had already is passed over. As many samples as the manifest says come in any
    case: a BadSample for each that the shard lacks.
    """
    done = skip
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE)
        try:
            for position, sample in enumerate(_stream_once(shard, done, wanted)):
                if done == shard.samples:
                    return
                if position >= done:
                    yield sample
                    done += 1
            break
        except (OSError, tarfile.TarError, EOFError):
            continue
    while done < shard.samples:
        yield BadSample(shard.name, f"#{done}", CUT_SHORT)
        done += 1


def _stream_once(shard: Shard, skip: int, wanted: Callable[[str], bool]) -> Iterator[RawSample]:
    """All samples of a shard; those before `skip` come without their bytes."""
    stream: Any = gopen(shard.address, "rb")
    key: str | None = None
    members: dict[str, bytes] = {}
    position = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                # tarfile keeps every header it has seen.
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                name = split_name(member.name) if member.isreg() else None
                if name is None:
                    continue
                if key is not None and (name[0] != key or name[1] in members):
                    yield RawSample(shard.name, key, {e: m for e, m in members.items() if wanted(e)})
                    members, position = {}, position + 1
                key = name[0]
                file = archive.extractfile(member) if position >= skip and wanted(name[1]) else None
                content = b"" if file is None else file.read()
                if file is not None and len(content) < member.size:
                    raise tarfile.ReadError(f"{shard.name} ends inside {member.name}")
                members[name[1]] = content
            if key is not None:
                yield RawSample(shard.name, key, {e: m for e, m in members.items() if wanted(e)})
        # What follows the end of the archive; a command that still writes would die of a broken pipe.
        while stream.read(1 << 20):
            pass
    finally:
        stream.close()
