"""Raw annotation formats -> `Annotation`s: the image as the file names it, its captions, its metadata.

Every reader keeps the order of its file and brings all captions of an image together. All raise UserError
where the file is missing, cannot be parsed, or lacks what its format promises.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eve.data.manifest import parse_json
from eve.errors import UserError

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = (
    *("image", "image_path", "image_name", "image_file", "filepath", "file_path", "file_name", "filename"),
    *("file", "path", "img", "img_path", "image_id", "id"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "title", "sentence", "sentences", "description", "comment"),
    *("caption_text", "raw", "alt_text", "phrase"),
)
_TOKEN_LINE = re.compile(r"^(\S.*?)#(\d+)\t(.*)$")


@dataclass(slots=True)
class Annotation:
    """`image` is None for a text. `captions` are stripped and never empty; there may be none."""

    image: str | None
    captions: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Columns:
    """Columns of a table by name; None is found by the usual names. `text_only` reads no image column."""

    image: str | None = None
    caption: str | None = None
    delimiter: str | None = None
    text_only: bool = False


def read_table(path: Path, columns: Columns) -> list[Annotation]:
    """A CSV, TSV (with a header line) or JSON-lines file; the suffix or the first line tells which.

    Rows of one image are one annotation. Further columns become metadata: a value where all rows of the
    image agree, else the list of the rows' values. Without a caption column the images stand alone, with a
    warning.
    """
    rows = list(
        _json_rows(path) if path.suffix in (".jsonl", ".ndjson", ".json") else _csv_rows(path, columns)
    )
    if not rows:
        raise UserError(f"{path} holds no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    image = None
    if not columns.text_only:
        image = _column(path, names, columns.image, IMAGE_COLUMNS, "image")
        if image is None:
            raise UserError(
                f"{path} has no image column among {', '.join(names)}; name it with --image-column"
            )
    caption = _column(path, names, columns.caption, CAPTION_COLUMNS, "caption")
    if caption is None and columns.text_only:
        raise UserError(f"{path} has no text column among {', '.join(names)}; name it with --caption-column")

    if caption is None:
        logger.warning(
            "%s has no caption column among %s; the samples are images only; --caption-column names one",
            path,
            ", ".join(names),
        )
    grouped: dict[Any, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows):
        if image is not None and not row.get(image):
            raise UserError(f"row {number + 1} of {path} has no value in the image column '{image}'")
        grouped.setdefault(number if image is None else str(row[image]), []).append(row)
    annotations = []
    for key, group in grouped.items():
        captions: list[str] = []
        for row in group:
            value = row.get(caption) if caption is not None else None
            captions.extend(value if isinstance(value, list) else [] if value is None else [value])
        metadata = {}
        for name in names:
            values = [row[name] for row in group if name in row]
            if name not in (image, caption) and values:
                metadata[name] = values[0] if all(value == values[0] for value in values) else values
        annotations.append(Annotation(None if image is None else key, _strip(path, key, captions), metadata))
    return annotations


def read_flickr(path: Path) -> list[Annotation]:
    """Flickr8k / Flickr30k: lines `image.jpg#0<tab>caption`, or a table `image,caption`."""
    lines = _text(path).split("\n")
    first = next((line for line in lines if line.strip()), "")
    if not _TOKEN_LINE.match(first):
        return read_table(path, Columns())
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(lines):
        if line.strip():
            if not (match := _TOKEN_LINE.match(line)):
                raise UserError(f"line {number + 1} of {path} is not `image#number<tab>caption`")
            captions.setdefault(match[1], []).append(match[3])
    return [Annotation(image, _strip(path, image, group)) for image, group in captions.items()]


def read_coco(path: Path) -> list[Annotation]:
    """COCO captions JSON: `images` [{id, file_name}], `annotations` [{image_id, caption}]."""
    tree = _json(path)
    with _format(path, "a COCO captions JSON with `images` and `annotations`"):
        captions: dict[Any, list[str]] = {image["id"]: [] for image in tree["images"]}
        for annotation in tree["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        return [
            Annotation(
                image["file_name"],
                _strip(path, image["file_name"], captions[image["id"]]),
                {"image_id": image["id"]},
            )
            for image in tree["images"]
        ]


def read_karpathy(path: Path, splits: Iterable[str]) -> list[Annotation]:
    """Karpathy's dataset_coco.json, dataset_flickr30k.json; `splits` as `train`, `restval`; none is all."""
    tree = _json(path)
    with _format(path, "a Karpathy split JSON with `images` of `filename`, `split`, `sentences`"):
        present = list(dict.fromkeys(image["split"] for image in tree["images"]))
        wanted = list(splits) or present
        for split in wanted:
            if split not in present:
                raise UserError(f"{path} has no split '{split}'; it has {', '.join(present)}")
        return [
            Annotation(
                "/".join(part for part in (image.get("filepath"), image["filename"]) if part),
                _strip(path, image["filename"], [sentence["raw"] for sentence in image["sentences"]]),
                {name: image[name] for name in ("split", "imgid", "cocoid") if name in image},
            )
            for image in tree["images"]
            if image["split"] in wanted
        ]


def read_visual_genome(path: Path) -> list[Annotation]:
    """region_descriptions.json: each image's phrases; metadata `boxes` holds their [x, y, width, height]."""
    tree = _json(path)
    annotations = []
    with _format(path, "a Visual Genome region_descriptions JSON, a list of images with `regions`"):
        for image in tree:
            regions = [region for region in image["regions"] if region["phrase"].strip()]
            number = image["id"] if "id" in image else image["image_id"]
            boxes = [[region[side] for side in ("x", "y", "width", "height")] for region in regions]
            phrases = [region["phrase"].strip() for region in regions]
            annotations.append(Annotation(f"{number}.jpg", phrases, {"image_id": number, "boxes": boxes}))
    return annotations


def read_text(path: Path) -> list[Annotation]:
    """One text a line; blank lines are skipped."""
    return [Annotation(None, [line.strip()]) for line in _text(path).split("\n") if line.strip()]


def read_names(path: Path) -> set[str]:
    """A list of image names, one a line, that selects a split."""
    names = {line.strip() for line in _text(path).split("\n")} - {""}
    if not names:
        raise UserError(f"the list {path} is empty")
    return names


def image_labels(names: Iterable[str]) -> list[Annotation]:
    """Images without captions; the folder is the metadata `label` where the images lie in two or more."""
    names = list(names)
    folders = [name.split("/")[-2] if "/" in name else "" for name in names]
    labelled = len(set(folders)) > 1
    return [
        Annotation(name, [], {"label": folder} if labelled and folder else {})
        for name, folder in zip(names, folders, strict=True)
    ]


def select(
    annotations: list[Annotation], names: set[str] | None, under: str, exclude: Iterable[str]
) -> list[Annotation]:
    """Those whose image is listed in `names` (by path, file name or stem), lies `under` a folder, and has no
    metadata `FIELD=VALUE` of `exclude`."""
    tests: list[Callable[[Annotation], bool]] = []
    if names is not None:
        tests.append(lambda annotation: not names.isdisjoint(_spellings(annotation.image or "")))
    if under:
        prefix = under.rstrip("/") + "/"
        tests.append(lambda annotation: (annotation.image or "").startswith(prefix))
    for rule in exclude:
        name, equals, value = rule.partition("=")
        if not equals:
            raise UserError(f"--exclude '{rule}' is not FIELD=VALUE")
        if not any(name in annotation.metadata for annotation in annotations):
            raise UserError(f"--exclude '{rule}': no sample has the field '{name}'")
        tests.append(lambda annotation, n=name, v=value: str(annotation.metadata.get(n)) != v)
    return [annotation for annotation in annotations if all(test(annotation) for test in tests)]


def _spellings(image: str) -> tuple[str, str, str]:
    base = image.rsplit("/", 1)[-1]
    return image, base, base.rsplit(".", 1)[0]


def _csv_rows(path: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    text = _text(path)
    delimiter = columns.delimiter or max("\t,|;", key=text.split("\n", 1)[0].count)
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        for row in reader:
            if len(row) > len(names):
                # A last caption with unquoted commas, as some copies of Flickr's files have it, is one value.
                if names[-1] != columns.caption and names[-1].lower() not in CAPTION_COLUMNS:
                    raise UserError(
                        f"line {reader.line_num} of {path} has {len(row)} values, the header {len(names)}"
                    )
                row = [*row[: len(names) - 1], delimiter.join(row[len(names) - 1 :])]
            if row:
                yield dict(zip(names, row, strict=False))
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of {path} is not CSV: {error}") from None


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(path).split("\n")):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"line {number + 1} of {path} is not readable JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"line {number + 1} of {path} is not a JSON object")
            yield row


def _column(path: Path, names: list[str], asked: str | None, usual: tuple[str, ...], what: str) -> str | None:
    if asked is not None:
        if asked not in names:
            raise UserError(f"{path} has no column '{asked}' for the {what}; it has {', '.join(names)}")
        return asked
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), None)


def _strip(path: Path, key: object, captions: list[Any]) -> list[str]:
    for caption in captions:
        if not isinstance(caption, str):
            raise UserError(f"{path}: a caption of '{key}' is {type(caption).__name__}, expected a string")
    return [stripped for caption in captions if (stripped := " ".join(caption.split()))]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


@contextmanager
def _format(path: Path, expected: str) -> Iterator[None]:
    """Turns a missing key or a wrong type, met while walking a parsed file, into the user's sentence."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} is not {expected} (it lacks {error})") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path} is not {expected} ({error})") from None
