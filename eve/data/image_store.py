"""Raw images as people bring them: a folder, a tar (compressed or not) or a zip, read in place."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

from eve.data.manifest import IMAGE_EXTENSIONS, tar_members
from eve.errors import UserError

# Where the bytes of an image lie: a path in the folder, a name in the zip, (offset, size) in the tar.
Location = str | tuple[int, int]

SCRATCH = ".images.scratch"


@dataclass(frozen=True)
class ImageReader:
    """Reads images by location. Small and picklable: a worker process holds one."""

    kind: Literal["folder", "tar", "zip"]
    path: Path

    @cached_property
    def _tar(self) -> BinaryIO:
        return open(self.path, "rb")

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def read(self, location: Location) -> bytes:
        """Raises OSError or zipfile.BadZipFile where the bytes cannot be read."""
        if isinstance(location, tuple):
            offset, size = location
            self._tar.seek(offset)
            return self._tar.read(size)
        return self._zip.read(location) if self.kind == "zip" else (self.path / location).read_bytes()


class ImageStore:
    """The images of a folder or archive by name.

    A compressed tar cannot be read at random: it is unpacked once, as a plain tar, into the directory
    `scratch`; `close` removes it. Raises UserError where `path` is missing or no such thing.
    """

    def __init__(self, path: Path, scratch: Path) -> None:
        self.path = path
        self._scratch: Path | None = None
        if path.is_dir():
            self.reader = ImageReader("folder", path)
        elif not path.exists():
            raise UserError(f"there is no image folder or archive {path}")
        elif zipfile.is_zipfile(path):
            self.reader = ImageReader("zip", path)
        elif tarfile.is_tarfile(path):
            self.reader = ImageReader("tar", self._plain_tar(path, scratch))
        else:
            raise UserError(f"{path} is neither a folder of images nor a tar or zip archive")

    @cached_property
    def locations(self) -> dict[str, Location]:
        """Name -> location of every image; by name for a folder, in the order of the archive else."""
        if self.reader.kind == "folder":
            found: dict[str, Location] = {}
            for folder, folders, files in os.walk(self.path):
                folders.sort()
                relative = os.path.relpath(folder, self.path)
                for file in sorted(files):
                    name = file if relative == "." else f"{relative}/{file}"
                    found[name] = name
        elif self.reader.kind == "zip":
            with zipfile.ZipFile(self.path) as archive:
                found = {entry.filename: entry.filename for entry in archive.infolist()}
        else:
            found = {}
            with open(self.reader.path, "rb") as file:
                for member in tar_members(file, self.path):
                    if member is None:
                        raise UserError(f"the archive {self.path} is truncated after {len(found)} files")
                    found[member.name.removeprefix("./")] = (member.offset_data, member.size)
        return {name: location for name, location in found.items() if _is_image(name)}

    def find(self, name: str) -> Location | None:
        """The image of that path, else the only one whose path ends so, else the only one of that file name.

        A name without an image's extension is the stem of one. None where there is no such image; raises
        UserError where several fit.
        """
        name = name.removeprefix("./")
        if self.reader.kind == "folder" and (self.path / name).is_file():
            return name
        if name in self.locations:
            return self.locations[name]
        base = name.rsplit("/", 1)[-1]
        candidates = self._by_base.get(base, []) if _is_image(base) else self._by_stem.get(base, [])
        # The longest common end of both paths decides, e.g. two folders with files of the same names.
        depth = 1
        while len(candidates) > 1 and depth < len(name.split("/")):
            depth += 1
            tail = "/".join(name.split("/")[-depth:])
            closer = [candidate for candidate in candidates if _ends(candidate, tail, _is_image(base))]
            if not closer:
                break
            candidates = closer
        if len(candidates) > 1:
            raise UserError(f"'{name}' could be {candidates[0]} or {candidates[1]} of {self.path}")
        return self.locations[candidates[0]] if candidates else None

    @cached_property
    def _by_base(self) -> dict[str, list[str]]:
        grouped: dict[str, list[str]] = {}
        for name in self.locations:
            grouped.setdefault(name.rsplit("/", 1)[-1], []).append(name)
        return grouped

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        grouped: dict[str, list[str]] = {}
        for base, names in self._by_base.items():
            grouped.setdefault(base.rsplit(".", 1)[0], []).extend(names)
        return grouped

    def _plain_tar(self, path: Path, scratch: Path) -> Path:
        try:
            with tarfile.open(path, "r:"):
                return path
        except tarfile.ReadError:
            pass
        self._scratch = scratch / SCRATCH
        try:
            with _decompressed(path) as source, open(self._scratch, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (EOFError, OSError) as error:
            self.close()
            raise UserError(f"the archive {path} cannot be unpacked into {scratch}: {error}") from None
        return self._scratch

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.unlink(missing_ok=True)


def _decompressed(path: Path) -> BinaryIO:
    """An open stream of the plain bytes of a compressed tar."""
    with open(path, "rb") as file:
        magic = file.read(2)
    module = {b"\x1f\x8b": gzip, b"BZ": bz2}.get(magic, lzma)
    return module.open(path)  # type: ignore[return-value]


def _is_image(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and base.rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS and "." in base


def _ends(path: str, tail: str, with_extension: bool) -> bool:
    path = path if with_extension else path.rsplit(".", 1)[0]
    return path == tail or path.endswith("/" + tail)
