"""The shard format: what a tar holds, its index from the headers alone, and the manifest beside it.

A shard is a plain tar in webdataset naming. The members of a sample share a key, which is the path
up to the first dot of the last part; what follows is the extension:

    000042.jpg    the image, any format of IMAGE_EXTENSIONS
    000042.json   {"captions": ["...", ...], ...any metadata}; or "caption": "...", as img2dataset writes
    000042.txt    one caption (img2dataset, text-only shards)

manifest.json beside the tars lists each with its counts and checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

from eve.errors import UserError

MANIFEST = "manifest.json"
VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")

Kind = Literal["pair", "image", "text"]

# Lists and objects within one another in a json: no annotation needs more, and a deeper one can neither be
# pickled nor, from about a thousand on, parsed.
MAX_NESTING = 64

_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]+)$")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BLOCK = 512


@dataclass(frozen=True)
class ShardInfo:
    """A line of the manifest. `captions` counts all captions, so up to many times `samples`."""

    name: str
    samples: int
    images: int
    captions: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TarSample:
    """The members of one key: extension (lower case) -> (offset of its bytes in the file, size)."""

    key: str
    members: dict[str, tuple[int, int]]

    @property
    def image(self) -> str | None:
        """The extension of the image, None where there is none."""
        return next((extension for extension in self.members if extension in IMAGE_EXTENSIONS), None)

    @property
    def has_text(self) -> bool:
        return "json" in self.members or "txt" in self.members


@dataclass(frozen=True)
class TarIndex:
    """The samples of a tar in file order.

    `truncated`: the file ends inside a member or without the end-of-archive block; `samples` then
    holds what is whole before that point.
    """

    samples: list[TarSample]
    truncated: bool


def split_name(name: str) -> tuple[str, str] | None:
    """Member name -> (key, extension in lower case); None where the name is not one of a sample."""
    match = _KEY_AND_EXTENSION.match(name)
    return (match[1], match[2].lower()) if match else None


def scan_tar(path: str | Path) -> TarIndex:
    """Indexes a local, uncompressed tar by its headers.

    Members of one key are brought together wherever they stand, so interleaved keys make whole samples; where
    a key has a member twice, the second begins a sample of its own.
    Raises UserError where the file is missing or no tar at all.
    """
    samples: list[TarSample] = []
    open_samples: dict[str, TarSample] = {}
    try:
        with open(path, "rb") as file:
            truncated = False
            for member in tar_members(file, path):
                if member is None:
                    truncated = True
                    break
                name = split_name(member.name)
                if name is None:
                    continue
                key, extension = name
                sample = open_samples.get(key)
                if sample is None or extension in sample.members:
                    sample = open_samples[key] = TarSample(key, {})
                    samples.append(sample)
                sample.members[extension] = (member.offset_data, member.size)
    except FileNotFoundError:
        raise UserError(f"there is no shard {path}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"the shard {path} cannot be read: {error.strerror}") from None
    return TarIndex(samples, truncated)


def tar_members(file: BinaryIO, path: str | Path) -> Iterator[tarfile.TarInfo | None]:
    """Regular files of the tar whose bytes are all there; None last where the tar is cut or broken."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        yield None
        return
    try:
        archive = tarfile.TarFile(fileobj=file)
    except tarfile.ReadError as error:
        if size < _BLOCK:
            yield None
            return
        raise UserError(f"{path} is not an uncompressed tar ({error})") from None
    end = 0
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, EOFError):
            yield None
            return
        if member is None:
            break
        if member.isreg():
            if member.offset_data + member.size > size:
                yield None
                return
            yield member
        end = archive.offset
        # tarfile keeps every header it has seen; a shard can have 100,000.
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
    # tarfile takes a file that simply stops between two members for complete; the zero block tells.
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        yield None


def parse_text(json_bytes: bytes | None, txt_bytes: bytes | None) -> tuple[list[str], dict[str, Any]]:
    """(captions, metadata) of a sample from its json and txt members; captions stripped, no empty ones.

    Raises ValueError as `raw_captions`.
    """
    captions, metadata = raw_captions(json_bytes, txt_bytes)
    return [stripped for caption in captions if (stripped := caption.strip())], metadata


def raw_captions(json_bytes: bytes | None, txt_bytes: bytes | None) -> tuple[list[str], dict[str, Any]]:
    """(captions as they stand, metadata). The json's captions win; the txt is read where it has none.

    Raises ValueError where the json is no object or `parse_json` refuses it, captions are not strings, or the
    bytes are not UTF-8.
    """
    metadata: dict[str, Any] = {}
    captions: Any = None
    if json_bytes is not None:
        metadata = parse_json(json_bytes.decode("utf-8-sig"))
        if not isinstance(metadata, dict):
            raise ValueError(f"its json holds {type(metadata).__name__}, expected an object")
        caption = metadata.pop("caption", None)
        captions = metadata.pop("captions", None) or caption
    if not captions and txt_bytes is not None:
        captions = txt_bytes.decode("utf-8")
    if captions is None:
        captions = []
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("its captions are not a list of strings")
    return captions, metadata


def parse_json(text: str) -> Any:
    """json.loads, and ValueError for what JSON allows but nobody after it can take: half a surrogate pair,
    which is no Unicode text, and nesting deeper than MAX_NESTING."""
    try:
        tree = json.loads(text)
        if text.count("[") + text.count("{") > MAX_NESTING and _nesting(tree) > MAX_NESTING:
            raise RecursionError
    except RecursionError:
        raise ValueError(f"lists and objects nested more than {MAX_NESTING} deep") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(tree, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string with half a surrogate pair, which is no Unicode text") from None
    return tree


def _nesting(tree: Any) -> int:
    """Lists and objects within one another. Scalars cost no call: whole annotation files come this way."""
    if not isinstance(tree, (list, dict)):
        return 0
    children = tree.values() if isinstance(tree, dict) else tree
    return 1 + max((_nesting(child) for child in children if isinstance(child, (list, dict))), default=0)


def read_texts(file: BinaryIO, sample: TarSample) -> tuple[bytes | None, bytes | None]:
    """The bytes of the json and of the txt of a sample of an open tar."""
    return read_member(file, sample, "json"), read_member(file, sample, "txt")


def read_member(file: BinaryIO, sample: TarSample, extension: str) -> bytes | None:
    if extension not in sample.members:
        return None
    offset, size = sample.members[extension]
    file.seek(offset)
    return file.read(size)


def describe_shard(path: str | Path) -> ShardInfo:
    """Counts and checksum of a tar, by reading all of it. A text that cannot be parsed counts as no caption.

    Raises UserError where the tar is cut or broken.
    """
    path = Path(path)
    index = scan_tar(path)
    if index.truncated:
        raise UserError(f"the shard {path} is truncated after {len(index.samples)} samples")
    images = captions = 0
    with open(path, "rb") as file:
        for sample in index.samples:
            images += sample.image is not None
            with contextlib.suppress(ValueError):
                captions += len(parse_text(*read_texts(file, sample))[0])
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardInfo(path.name, len(index.samples), images, captions, path.stat().st_size, digest)


def read_manifest(directory: str | Path) -> list[ShardInfo]:
    """The shards that the manifest of a directory lists. Raises UserError where it is missing or broken."""
    path = Path(directory) / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{directory} has no {MANIFEST}; tools/make_shards.py index writes one") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable: {error}") from None
    if (
        not isinstance(tree, dict)
        or tree.get("version") != VERSION
        or not isinstance(tree.get("shards"), list)
    ):
        raise UserError(f"{path} is not a manifest of version {VERSION}")
    try:
        return [ShardInfo(**shard) for shard in tree["shards"]]
    except TypeError:
        names = ", ".join(field.name for field in fields(ShardInfo))
        raise UserError(f"{path}: each shard must have exactly the keys {names}") from None


def write_manifest(directory: str | Path, shards: Iterable[ShardInfo]) -> None:
    """Writes manifest.json, sorted by name, in one step: a reader sees the old one or the new one."""
    ordered = sorted(shards, key=lambda shard: shard.name)
    tree = {"version": VERSION, "shards": [asdict(shard) for shard in ordered]}
    write_json(Path(directory) / MANIFEST, tree)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Writes to a temporary name beside `path`, then renames."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(tree, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
