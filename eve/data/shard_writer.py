"""Writes samples into tar shards (the format is in eve/data/manifest.py).

The bytes of a shard depend on its samples alone: owner, mode and time of the members are fixed.
A shard is written under a temporary name and renamed, so a file named *.tar is always whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from eve.data.manifest import IMAGE_EXTENSIONS, ShardInfo, split_name, write_manifest
from eve.errors import UserError


@dataclass(frozen=True)
class Record:
    """A sample to write. `extension` is that of the image ("jpg"); `metadata` must be JSON-able.

    The key may hold slashes but no dot in its last part; `clean_key` makes one of any name.
    """

    key: str
    image_bytes: bytes | None = None
    extension: str = "jpg"
    captions: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def members(self) -> dict[str, bytes]:
        """Extension -> bytes. A lone text is a txt; captions of an image and metadata are a json."""
        members: dict[str, bytes] = {}
        tree = dict(self.metadata)
        if self.image_bytes is not None:
            members[self.extension] = self.image_bytes
        if self.image_bytes is None and len(self.captions) == 1:
            members["txt"] = self.captions[0].encode()
        elif self.captions:
            tree = {"captions": self.captions, **tree}
        if tree:
            members["json"] = json.dumps(tree, ensure_ascii=False).encode()
        return members


def clean_key(name: str) -> str:
    """A key made of any name: what is no letter, digit, slash, hyphen or underscore becomes '_'.

    >>> clean_key("./train/a dog.v2")
    'train/a_dog_v2'
    """
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return re.sub(r"[^\w/-]", "_", "/".join(parts)) or "_"


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def write_shard(path: Path, records: Iterable[Record]) -> ShardInfo:
    """Writes one shard. Raises UserError where two records have one key or the disk is full."""
    partial = path.with_name(path.name + ".partial")
    samples = images = captions = 0
    keys: set[str] = set()
    try:
        with _HashingFile(partial) as file:
            # In this mode tarfile calls nothing but `write`.
            target: Any = file
            with tarfile.open(fileobj=target, mode="w|", format=tarfile.GNU_FORMAT) as archive:
                for record in records:
                    assert split_name(f"{record.key}.json") == (record.key, "json"), record.key
                    assert record.image_bytes is None or record.extension in IMAGE_EXTENSIONS, (
                        record.extension
                    )
                    if record.key in keys:
                        raise UserError(f"two samples of the shard {path} have the key '{record.key}'")
                    keys.add(record.key)
                    samples += 1
                    images += record.image_bytes is not None
                    captions += len(record.captions)
                    for extension, content in record.members().items():
                        member = tarfile.TarInfo(f"{record.key}.{extension}")
                        member.size, member.mode, member.mtime = len(content), 0o444, 0
                        archive.addfile(member, io.BytesIO(content))
            file.sync()
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return ShardInfo(path.name, samples, images, captions, file.size, file.digest.hexdigest())


def write_shards(records: Iterable[Record], out_dir: str | Path, shard_size: int = 1000) -> list[ShardInfo]:
    """Writes records in their order as 000000.tar, ... of `shard_size` samples, and the manifest.

    `out_dir` is made where missing. Raises UserError where it holds shards already.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if any(out_dir.glob("*.tar")):
        raise UserError(f"{out_dir} holds shards already; remove them or choose another directory")
    iterator = iter(records)
    shards: list[ShardInfo] = []
    while chunk := list(islice(iterator, shard_size)):
        shards.append(write_shard(out_dir / shard_name(len(shards)), chunk))
    write_manifest(out_dir, shards)
    return shards


class _HashingFile:
    """Counts and hashes what is written, so that a shard need not be read again; names the file in errors."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.digest = path, 0, hashlib.sha256()
        with self._named_errors():
            self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)

    def write(self, content: bytes) -> int:
        self.size += len(content)
        self.digest.update(content)
        with self._named_errors():
            return self._file.write(content)

    def sync(self) -> None:
        with self._named_errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> _HashingFile:
        return self

    def __exit__(self, *error: object) -> None:
        with self._named_errors():
            self._file.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
