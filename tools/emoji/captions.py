"""Sentences about a picture, from what its concept is called and from what is seen in it.

`captions` writes six true sentences of some 8 to 15 words. Each is one of the frames below, filled with
phrases drawn by a hash of (set, concept, number), so that a word of a sentence is seldom clear from the
rest of it: colours, places, shapes and the name must be read off the picture. A sentence says no fact twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TypeVar

from tools.emoji.facts import Facts
from tools.emoji.names import Description, with_article

T = TypeVar("T")

MIN_WORDS, MAX_WORDS = 8, 15

# How the sets look; said of all their drawings.
STYLES = {
    "noto": ("smooth", "flat cartoon", "softly shaded"),
    "noto-v1": ("cartoon", "soft cartoon", "rounded cartoon"),
    "fluent-flat": ("flat", "simple flat", "bold flat"),
    "fluent-high-contrast": ("black and white", "high contrast", "solid black"),
    "fluent-3d": ("glossy", "3d", "shiny 3d", "three dimensional"),
    "openmoji": ("black outlined", "outlined", "line drawn"),
    "emojione": ("flat", "clean flat", "soft flat"),
    "emojione-v1": ("cartoon", "flat cartoon", "simple"),
    "emojione-monotone": ("single colour", "plain black", "stencil"),
    "fxemoji": ("flat", "simple flat", "flat cartoon"),
    "twemoji": ("flat", "simple flat", "clean flat"),
}
MEDIA = ("picture", "drawing", "icon", "emoji", "image", "illustration")
# A name that takes no further adjective.
_FIXED_NAME = re.compile(r"(two|mrs|mx|santa|mount|letters|number) ")


class Choices:
    """Picks that depend on the key alone, not on the version of Python's random."""

    def __init__(self, key: str) -> None:
        self.key, self.count = key, 0

    def below(self, n: int) -> int:
        self.count += 1
        digest = hashlib.blake2b(f"{self.key}/{self.count}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % n

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(len(rest))]


def captions(thing: Description, facts: Facts, style: str, key: str) -> list[str]:
    """Different sentences about one picture. `style` is the name of its set, `key` decides the wording."""
    choices = Choices(key)
    frames = [_named, _named, _stated, _of, _unnamed]
    has_keywords = len(thing.keywords) > 2
    frames.append(_defined if thing.gloss else _keyworded if has_keywords else _of)
    if has_keywords and thing.gloss and choices.below(2):
        frames[1] = _keyworded
    found: dict[str, None] = {}
    for number, frame in enumerate(choices.shuffled(frames)):
        found.setdefault(frame(thing, facts, style, Choices(f"{key}/{number}")))
    return list(found)


# --- frames -------------------------------------------------------------------------------------------


def _named(thing: Description, facts: Facts, style: str, choices: Choices) -> str:
    """ "a small brown horse slanting up to the right, with white at the bottom" """
    adjectives, used = _adjectives(thing, facts, style, choices, 2)
    return _extend(_with_adjectives(thing, adjectives), _details(thing, facts, style, choices, used), choices)


def _of(thing: Description, facts: Facts, style: str, choices: Choices) -> str:
    """ "a glossy icon of a horse, mostly brown with some black, taller than wide" """
    adjectives, used = _adjectives(None, facts, style, choices, 1 + choices.below(2))
    medium = with_article(" ".join([*adjectives, choices.pick(MEDIA)]))
    start = f"{medium} {choices.pick(['of', 'of', 'showing'])} {thing.name}"
    return _extend(start, _details(thing, facts, style, choices, used), choices)


def _stated(thing: Description, facts: Facts, style: str, choices: Choices) -> str:
    """ "the horse is brown and black, taller than wide" """
    subject = thing.noun if _FIXED_NAME.match(thing.noun) else f"the {thing.noun}"
    start = f"{subject} {'are' if thing.is_plural else 'is'} {_colours(facts, choices)}"
    return _extend(start, _details(thing, facts, style, choices, {"colour", "count"}), choices)


def _unnamed(thing: Description, facts: Facts, style: str, choices: Choices) -> str:
    """ "one of the mammals, mostly brown with some white, in flat cartoon style, wider than tall" """
    if choices.below(2):
        adjectives, used = _adjectives(None, facts, style, choices, 1 + choices.below(2))
        start = f"{with_article(' '.join([*adjectives, choices.pick(MEDIA)]))} from the {thing.kinds}"
    else:
        used = set()
        start = choices.pick(["one of the", "something from the", "it is among the"]) + " " + thing.kinds
    return _extend(start, _details(thing, facts, style, choices, used | {"kinds"}), choices)


def _defined(thing: Description, facts: Facts, style: str, choices: Choices) -> str:
    """ "a brown horse, solid-hoofed herbivorous quadruped domesticated since prehistoric times" """
    adjectives, _ = _adjectives(thing, facts, style, choices, 1)
    return f"{_with_adjectives(thing, adjectives)}{choices.pick([',', ':'])} {thing.gloss}"


def _keyworded(thing: Description, facts: Facts, style: str, choices: Choices) -> str:
    """ "a mostly brown horse to do with racing, farm and mammal, wider than tall" """
    adjectives, used = _adjectives(thing, facts, style, choices, 1)
    words = choices.shuffled(thing.keywords)[: 2 + choices.below(2)]
    link = choices.pick(["to do with", "linked to", "about"])
    start = f"{_with_adjectives(thing, adjectives)} {link} {_listed(words)}"
    return _extend(start, _details(thing, facts, style, choices, used | {"keywords"}), choices)


# --- how they are filled ------------------------------------------------------------------------------


def _extend(start: str, details: list[str], choices: Choices) -> str:
    """Adds details up to 8 words and, by chance, beyond, never past 15."""
    text = start
    for detail in details:
        num_words = len(text.split())
        if num_words >= MIN_WORDS and choices.below(3) == 0:
            break
        if num_words + len(detail.split()) <= MAX_WORDS:
            text = f"{text}, {detail}"
    return text


def _with_adjectives(thing: Description, adjectives: list[str]) -> str:
    phrase = " ".join([*adjectives, thing.noun])
    if not adjectives:
        return thing.name
    if thing.name == thing.noun:
        return phrase
    return f"the {phrase}" if thing.name.startswith("the ") else with_article(phrase)


def _adjectives(
    thing: Description | None, facts: Facts, style: str, choices: Choices, most: int
) -> tuple[list[str], set[str]]:
    """Up to `most` adjectives in English order (size, shape, colour, style), and which facts they use.

    They stand before the name of `thing`, or before "picture".
    """
    if thing is not None and _FIXED_NAME.match(thing.noun):
        return [], set()
    options = {"colour": _short_colour(facts), "style": choices.pick(STYLES[style])}
    if thing is not None and facts.colours[0][0] in thing.noun:
        del options["colour"]  # "a red red apple"
    if thing is not None and facts.size:
        options["size"] = facts.size
    # "a wide picture" would be said of the file.
    if thing is not None and facts.shape and facts.shape not in thing.noun:
        options["shape"] = facts.shape
    chosen = set(choices.shuffled([*options, *options.keys() & {"colour"}])[:most])
    if {"colour", "style"} <= chosen and "black" in options["style"]:
        chosen.discard("style")
    order = ("size", "shape", "colour", "style")
    return [options[kind] for kind in order if kind in chosen], chosen


def _short_colour(facts: Facts) -> str:
    """ "red", "mostly red" or "red and dark blue", as an adjective."""
    (first, share), *rest = facts.colours
    if share >= 0.85 or not rest:
        return first
    if share >= 0.6:
        return f"mostly {first}"
    return f"{first} and {rest[0][0]}"


def _colours(facts: Facts, choices: Choices) -> str:
    """ "mostly red with some white and a little black", "green, brown and yellow", "all black"."""
    (first, share), *rest = facts.colours
    if share >= 0.93 or not rest:
        return f"{choices.pick(['all', 'plain', 'only'])} {first}"
    if share >= 0.6:
        amounts = ["some" if part >= 0.12 else choices.pick(["a little", "a bit of"]) for _, part in rest]
        parts = [f"{amount} {name}" for amount, (name, _) in zip(amounts, rest, strict=True)]
        return f"{choices.pick(['mostly', 'mainly', 'largely'])} {first} with {_listed(parts[:2])}"
    return _listed([first, *(name for name, _ in rest[:3])])


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _details(thing: Description, facts: Facts, style: str, choices: Choices, used: set[str]) -> list[str]:
    """Phrases that may follow, of facts not used yet: what is seen, and in between what is told of it."""
    seen: list[str] = []
    # Either the colours or how many there are.
    said_colours = "colour" not in used and choices.below(4) > 0
    if said_colours:
        seen.append(choices.pick(["in {}", "{}", "painted {}"]).format(_colours(facts, choices)))
    seen.extend(_places(facts, choices))
    if facts.shape and "shape" not in used:
        words = {"wide": "wider than tall", "tall": "taller than wide"}
        seen.append(words.get(facts.shape, f"{facts.shape} in shape"))
    if facts.slant:
        verb = choices.pick(["slanting", "leaning", "pointing"]) if facts.slant == "up" else "sloping"
        seen.append(f"{verb} {facts.slant} to the right")
    if facts.parts and facts.parts > 1:
        number = ("two", "three", "four")[facts.parts - 2]
        seen.append(choices.pick([f"in {number} parts", f"made of {number} separate pieces"]))
    if facts.size and "size" not in used:
        words = {
            "small": ["small on the white", "drawn small"],
            "large": ["filling the picture", "drawn large"],
        }
        seen.append(choices.pick(words[facts.size]))
    main = facts.colours[0][0]
    num_colours = sum(share >= 0.08 for _, share in facts.colours)
    if num_colours > 1 and choices.below(2) and not said_colours and "count" not in used:
        seen.append(f"in {('two', 'three', 'four', 'many')[min(num_colours, 5) - 2]} colours")
    if facts.tone and choices.below(2) and main not in ("black", "white") and " " not in main:
        seen.append({"dark": "dark all over", "pale": "pale all over"}[facts.tone])
    if facts.symmetric:
        seen.append(choices.pick(["the same on both sides", "with matching sides", "symmetric"]))
    if facts.thin and not facts.slant:
        seen.append(choices.pick(["with thin lines", "drawn thin"]))
    told: list[str] = []
    if facts.outlined:
        told.append(choices.pick(["with a black outline", "with black edges"]))
    elif "style" not in used:
        style_phrase = choices.pick(["in {} style", "as {} art", "drawn in a {} way"])
        told.append(style_phrase.format(choices.pick(STYLES[style])))
    if "kinds" not in used:
        told.append(choices.pick(["one of the {}", "from the {}"]).format(thing.kinds))
    if len(thing.keywords) > 1 and "keywords" not in used and choices.below(2):
        link = choices.pick(["to do with", "linked to", "about"])
        told.append(f"{link} {_listed(choices.shuffled(thing.keywords)[:2])}")
    seen, told = choices.shuffled(seen), choices.shuffled(told)
    mixed: list[str] = []
    while seen or told:
        mixed.extend(seen[:2] + told[:1])
        seen, told = seen[2:], told[1:]
    return mixed


def _places(facts: Facts, choices: Choices) -> list[str]:
    """ "white at the top and red at the bottom"; nothing where one colour is nearly all there is."""
    main, share = facts.colours[0]
    if share >= 0.9:
        return []
    sides = (
        ((facts.top, "at the top"), (facts.bottom, "at the bottom")),
        ((facts.left, "on the left"), (facts.right, "on the right")),
        ((facts.centre, "in the middle"), (facts.around, "around it")),
    )
    found = []
    for pair in sides:
        said = [f"{colour} {where}" for colour, where in pair if colour]
        only = [colour for colour, _ in pair if colour]
        # That a mostly red thing is red at the top says little.
        if not said or (len(said) == 1 and (main.endswith(only[0]) or said[0].endswith("around it"))):
            continue
        order = choices.shuffled(said) if "around" not in said[-1] else said
        found.append(choices.pick(["with ", ""]) + " and ".join(order))
    return found
