"""Which drawings are trained on and which are held out: by concept and by who drew them.

    folder                                    concept        drawn by
    train                                     train          Google, Microsoft, OpenMoji, EmojiOne
    validation/seen_concept-seen_style        train          the same, drawings never trained on
    validation/unseen_concept-seen_style      validation     the same
    validation/seen_concept-unseen_style      train          Mozilla
    validation/unseen_concept-unseen_style    validation     Mozilla
    test/...                                  test           Twitter for the unseen style

A concept goes with all of its kin: "man detective" with "detective", "woman walking: facing right" with
"person walking". Kin are hashed, 80 % to train and 10 % each to validation and test, so the split is code
and never drawn; split.json lists what it gives, and a test compares.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from tools.emoji.icons import Concept, Drawing

LIST = Path(__file__).with_suffix(".json")
VALIDATION_FAMILY, TEST_FAMILY = "mozilla", "twitter"
# Of a hundred drawings of train concepts, those kept back for validation and for test.
HELD_OUT_DRAWINGS = 4
PARTS = ("train", "validation", "test")
CELLS = (
    "train",
    *(
        f"{part}/{concept}_concept-{style}_style"
        for part in ("validation", "test")
        for concept in ("seen", "unseen")
        for style in ("seen", "unseen")
    ),
)

_PERSON = re.compile(
    r"\b(men|women|people|persons?|man|woman|old man|old woman|older person|mrs\.|mx|santa"
    r"|boy|girl|child|adult)(?!')\b"
)
# One thing under two names, one drawing for two things.
_KIN = {
    "merman": "merperson",
    "mermaid": "merperson",
    "prince": "princess",
    "flag bouvet island": "flag norway",
    "flag svalbard and jan mayen": "flag norway",
    "flag clipperton island": "flag france",
    "flag st martin": "flag france",
    "flag diego garcia": "flag british indian ocean territory",
    "flag heard and mcdonald islands": "flag australia",
    "flag us outlying islands": "flag united states",
    "flag chad": "flag romania",
    "flag monaco": "flag indonesia",
    "dvd": "optical disk",
    "flag ceuta and melilla": "flag spain",
}


def kin(label: str) -> str:
    """What a label shares with its variants. Flags are told apart by what stands after the colon.

    >>> kin("woman walking: facing right"), kin("flag: Peru"), kin("kiss: man, man"), kin("bald")
    ('walking', 'flag peru', 'kiss', 'bald')
    """
    text = label.lower().replace("’", "'").replace("&", "and")
    head, _, rest = text.partition(": ")
    if head in ("flag", "keycap"):
        name = re.sub(r"[.,]", "", f"{head} {rest}")
        return _KIN.get(name, name)
    stripped = re.sub(r"\s+", " ", _PERSON.sub("", head)).strip()
    return _KIN.get(stripped, stripped or "person")


def part_of(label: str) -> str:
    """ "train", "validation" or "test"."""
    bucket = _bucket(kin(label), 10)
    return "train" if bucket < 8 else PARTS[bucket - 7]


def cell_of(drawing: Drawing) -> str | None:
    """The folder of a drawing; None where it is held out from the other part (test concepts by Mozilla)."""
    part = part_of(drawing.concept.label)
    unseen_style = {VALIDATION_FAMILY: "validation", TEST_FAMILY: "test"}.get(drawing.icon_set.family)
    if unseen_style is not None:
        if part == "train":
            return f"{unseen_style}/seen_concept-unseen_style"
        return f"{part}/unseen_concept-unseen_style" if part == unseen_style else None
    if part != "train":
        return f"{part}/unseen_concept-seen_style"
    # Kin go together: a set often draws "person running" and "man running" alike.
    bucket = _bucket(f"{drawing.icon_set.name}/{kin(drawing.concept.label)}", 100)
    if bucket < 2 * HELD_OUT_DRAWINGS:
        return f"{PARTS[1 + bucket // HELD_OUT_DRAWINGS]}/seen_concept-seen_style"
    return "train"


def split_list(concepts: list[Concept]) -> dict[str, list[str]]:
    """part -> sorted labels."""
    labels = sorted({concept.label for concept in concepts})
    return {part: [label for label in labels if part_of(label) == part] for part in PARTS}


def read_list() -> dict[str, list[str]]:
    return json.loads(LIST.read_text(encoding="utf-8"))


def write_list(concepts: list[Concept]) -> None:
    text = json.dumps(split_list(concepts), ensure_ascii=False, indent=0)
    LIST.write_text(text + "\n", encoding="utf-8")


def _bucket(text: str, n: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % n
