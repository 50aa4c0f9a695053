"""Words for scenes, and scenes from words.

`describe` says a scene in one of many ways, short tags to several sentences; `read` understands every sentence that
`describe` can make, and what people write in the same vocabulary. `read(describe(scene))` is what was said.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from training.world import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing

_SHAPE_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"),),
    "ring": (("ring", "rings"), ("hoop", "hoops")),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs")),
    "diamond": (("diamond", "diamonds"), ("rhombus", "rhombuses")),
    "heart": (("heart", "hearts"),),
}
_COLOUR_WORDS = {colour: (colour,) for colour in COLOURS} | {
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
}
_SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("", "", "", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
}
_TEXTURE_WORDS = {"solid": ("",), "striped": ("striped", "stripy"), "dotted": ("dotted", "spotted")}
_TEXTURE_TAILS = {"striped": "with stripes", "dotted": "with dots"}
_COUNT_WORDS = {2: ("two",), 3: ("three",), 4: ("four",)}
_PLACE_WORDS = {
    "top": ("at the top", "at the top", "along the top edge", "near the top"),
    "bottom": ("at the bottom", "at the bottom", "along the bottom edge", "near the bottom"),
    "left": ("on the left", "on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right", "on the right side", "at the right"),
    "centre": ("in the centre", "in the middle", "at the centre", "in the center"),
} | {
    f"{row} {side}": (
        f"in the {row} {side} corner",
        f"at the {row} {side}",
        f"in the {row} {side}",
        f"in the {'upper' if row == 'top' else 'lower'} {side}",
    )
    for row in ("top", "bottom")
    for side in ("left", "right")
}
_ADJECTIVES = {
    "white": ("white", "plain white"),
    "black": ("black", "plain black"),
    "grey": ("grey", "gray", "plain grey"),
    "beige": ("beige", "plain beige"),
    "gradient": ("gradient", "grey gradient"),
    "checkerboard": ("checkerboard", "checkered"),
    "meadow": ("meadow",),
    "night": ("night sky", "starry night sky"),
}
_SCENERY = {
    "meadow": ("in a meadow", "over a meadow", "over a meadow under a pale sky"),
    "night": ("in the night sky", "under a night sky", "under a starry night sky"),
    "checkerboard": ("on a checkerboard",),
}
_OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an image of ", "a simple picture with ", "a scene with ")
_LONG_OPENINGS = (
    "This is a simple drawing {back}.",
    "A simple picture {back}.",
    "The image shows {number} {back}.",
    "A carefully composed illustration {back}, with clean edges and flat paint.",
)
_LONG_ENDINGS = (
    "",
    "",
    " Nothing else is in the picture.",
    " The style is flat and simple.",
    " There is nothing else.",
)
_NUMBERS = {1: "one kind of shape", 2: "two kinds of shapes", 3: "three kinds of shapes"}


def describe(scene: Scene, rng: random.Random, *, complete: bool = False) -> str:
    """A caption. With `complete` it names every place and the background; without, it may leave some open."""
    background = scene.background if complete or rng.random() < 0.85 else None
    placed = complete or rng.random() < 0.88
    things = [thing if placed else replace(thing, place=None) for thing in scene.things]
    style = rng.choices(("list", "places first", "tags", "long", "background first"), (5, 3, 2, 3, 2))[0]
    if style in ("places first",) and not placed:
        style = "list"
    if style == "background first" and background is None:
        style = "list"
    if style == "tags":
        parts = [_tag(thing, rng) for thing in things]
        if background:
            parts.append(f"{rng.choice(_ADJECTIVES[background])} background")
        return ", ".join(parts)
    if style == "long":
        return _long(things, background, placed, rng)
    if style == "places first":
        verb = rng.choice(("there is ", "there is ", ""))
        parts = [
            f"{rng.choice(_PLACE_WORDS[str(thing.place)])} "
            f"{verb.replace('is', 'are') if thing.count > 1 else verb}{_noun(thing, rng)}"
            for thing in things
        ]
        text = _joined(parts, rng)
        return text + (f", {_behind(background, rng)}" if background else "")
    parts = [_thing(thing, rng) for thing in things]
    text = _joined(parts, rng)
    if style == "background first" and background:
        if rng.random() < 0.5:
            return f"a {rng.choice(_ADJECTIVES[background])} background with {text}"
        return f"{_behind(background, rng)}: {text}"
    comma = rng.choice((", ", " ")) if background else ""
    return f"{rng.choice(_OPENINGS)}{text}{comma}{_behind(background, rng) if background else ''}"


def read(prompt: str) -> Scene:
    """The scene that `prompt` names: open places are None, an unnamed background is None.

    Sizes and textures that aren't named are medium and solid, which is what the model draws then.
    A prompt that names no thing gives a scene without any.
    """
    text = re.sub(r"\s+", " ", prompt.lower())
    background, text = _read_background(text)
    found: list[tuple[str, Thing | str]] = []
    for match in _PHRASE.finditer(text):
        if match["shape"]:
            thing = _read_thing(match)
            if thing:
                found.append(("thing", thing))
        else:
            found.append(("place", _read_place(match)))
    things: list[Thing] = []
    places_first = bool(found) and found[0][0] == "place"
    waiting: str | None = None
    for _, value in found:
        if isinstance(value, Thing):
            things.append(replace(value, place=waiting) if places_first else value)
            waiting = None
        elif places_first:
            waiting = value
        elif things and things[-1].place is None:
            things[-1] = replace(things[-1], place=value)
    return Scene(tuple(things), background)


def _noun(thing: Thing, rng: random.Random, *, article: bool = True) -> str:
    single, plural = rng.choice(_SHAPE_WORDS[thing.shape])
    texture, tail = rng.choice(_TEXTURE_WORDS[thing.texture]), ""
    if texture and rng.random() < 0.25:
        texture, tail = "", _TEXTURE_TAILS[thing.texture]
    words = [rng.choice(_SIZE_WORDS[thing.size]), texture, rng.choice(_COLOUR_WORDS[thing.colour])]
    words.append(plural if thing.count > 1 else single)
    if tail:
        words.append(tail)
    phrase = " ".join(word for word in words if word)
    if thing.count > 1:
        return f"{rng.choice(_COUNT_WORDS[thing.count])} {phrase}"
    if not article:
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _thing(thing: Thing, rng: random.Random) -> str:
    noun = _noun(thing, rng)
    if thing.place is None:
        return noun
    line = ""
    if thing.count > 1:
        line = rng.choice(("", "in a column ", "lined up ") if thing.place in ("left", "right") else ("", "in a row "))
    return f"{noun} {line}{rng.choice(_PLACE_WORDS[thing.place])}"


def _tag(thing: Thing, rng: random.Random) -> str:
    noun = _noun(thing, rng, article=False)
    return noun if thing.place is None else f"{noun} {thing.place}"


def _long(things: list[Thing], background: str | None, placed: bool, rng: random.Random) -> str:
    back = _behind(background, rng) if background else "of shapes"
    number = _NUMBERS[len(things)]
    opening = rng.choice(_LONG_OPENINGS[:3] if placed else _LONG_OPENINGS).format(back=back, number=number)
    opening = opening.replace("shapes of shapes", "shapes").replace("shape of shapes", "shape")
    lines = []
    for thing in things:
        verb = "are" if thing.count > 1 else "is"
        if thing.place is None:
            lines.append(f"There {verb} {_noun(thing, rng)}.")
        elif placed:
            where = rng.choice(_PLACE_WORDS[thing.place])
            lines.append(f"{where[0].upper()}{where[1:]} there {verb} {_noun(thing, rng)}.")
    return " ".join([opening, *lines]) + rng.choice(_LONG_ENDINGS)


def _behind(background: str, rng: random.Random) -> str:
    if background in _SCENERY and rng.random() < 0.6:
        return rng.choice(_SCENERY[background])
    return f"{rng.choice(('on', 'on', 'against', 'over'))} a {rng.choice(_ADJECTIVES[background])} background"


def _joined(parts: list[str], rng: random.Random) -> str:
    if len(parts) == 1:
        return parts[0]
    between = rng.choice((", ", ", ", "; "))
    return between.join(parts[:-1]) + rng.choice((" and ", ", and ", between)) + parts[-1]


def _alternatives(words: list[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(set(words), key=len, reverse=True))


_SHAPE_OF = {word: shape for shape in SHAPES for pair in _SHAPE_WORDS[shape] for word in pair}
_COLOUR_OF = {word: colour for colour, words in _COLOUR_WORDS.items() for word in words}
_SIZE_OF = {word: size for size, words in _SIZE_WORDS.items() for word in words if word} | {"medium": "medium"}
_TEXTURE_OF = {word: texture for texture, words in _TEXTURE_WORDS.items() for word in words if word}
_COUNT_OF = {word: count for count, words in _COUNT_WORDS.items() for word in words} | {"2": 2, "3": 3, "4": 4}
_ADJECTIVE = _alternatives([*_COLOUR_OF, *_SIZE_OF, *_TEXTURE_OF, "solid", "plain"])
_PHRASE = re.compile(
    rf"(?:\b(?P<count>{_alternatives(list(_COUNT_OF))})\s+)?"
    rf"(?P<adjectives>(?:\b(?:{_ADJECTIVE})[\s,]+(?:and\s+)?)*)"
    rf"\b(?P<shape>{_alternatives(list(_SHAPE_OF))})\b(?:\s+with\s+(?P<tail>stripes|dots))?"
    r"|\b(?P<row>top|upper|bottom|lower)(?:[\s-]+(?P<side>left|right|centre|center|middle))?\b"
    r"|\b(?P<lone>left|right|centre|center|middle)\b"
)
_BACKGROUND = re.compile(
    r"(?P<scenery>meadow(?: under a pale sky)?(?: background)?|(?:starry )?night sky(?: background)?"
    r"|checkerboard(?: background)?)"
    rf"|(?:plain )?(?P<plain>{_alternatives([word for words in _ADJECTIVES.values() for word in words])}) background"
    rf"|background is (?:a )?(?:plain )?(?P<said>{_alternatives([*BACKGROUNDS, 'gray'])})"
)
_BACKGROUND_OF = {word: background for background, words in _ADJECTIVES.items() for word in words}
_BACKGROUND_OF |= {background: background for background in BACKGROUNDS}


def _read_background(text: str) -> tuple[str | None, str]:
    match = _BACKGROUND.search(text)
    if not match:
        return None, text
    rest = text[: match.start()] + text[match.end() :]
    if match["scenery"]:
        names = {"m": "meadow", "s": "night", "n": "night", "c": "checkerboard"}
        return names[match["scenery"][0]], rest
    return _BACKGROUND_OF[match["plain"] or match["said"]], rest


def _read_thing(match: re.Match[str]) -> Thing | None:
    adjectives = re.findall(_ADJECTIVE, match["adjectives"] or "")
    colours = [_COLOUR_OF[word] for word in adjectives if word in _COLOUR_OF]
    if not colours:
        return None
    sizes = [_SIZE_OF[word] for word in adjectives if word in _SIZE_OF]
    textures = [_TEXTURE_OF[word] for word in adjectives if word in _TEXTURE_OF]
    if match["tail"]:
        textures.append({"stripes": "striped", "dots": "dotted"}[match["tail"]])
    return Thing(
        _SHAPE_OF[match["shape"]],
        colours[-1],
        sizes[0] if sizes else "medium",
        textures[0] if textures else "solid",
        _COUNT_OF.get(match["count"] or "", 1),
    )


def _read_place(match: re.Match[str]) -> str:
    if match["lone"]:
        return match["lone"] if match["lone"] in ("left", "right") else "centre"
    row = {"upper": "top", "lower": "bottom"}.get(match["row"], match["row"])
    return f"{row} {match['side']}" if match["side"] in ("left", "right") else row
