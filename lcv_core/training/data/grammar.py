"""Procedural scenes and the sentences that describe them: one object, one motion, one background.

A scene is its attributes (what a caption can name) and numbers that no caption names: where it starts, how fast it is.
A caption may leave out size, background or texture, which are then anything. `parse` reads a prompt back.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import torch

from lcv_core.errors import InputError
from lcv_core.names import check_name

HeldBack = Literal["exclude", "only", "any"]

OBJECTS = ("ball", "square", "triangle", "star", "ring")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "white")
SIZES = ("small", "large")
MOTIONS = (
    "moves left", "moves right", "moves up", "moves down", "stays still", "bounces", "spins", "grows", "shrinks",
    "circles",
)  # fmt: skip
BACKGROUNDS = ("black", "grey", "dark blue", "dark green", "brown")
TEXTURES = ("none", "stripes", "dots", "checks")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "colour": COLOURS,
    "size": SIZES,
    "motion": MOTIONS,
    "background": BACKGROUNDS,
    "texture": TEXTURES,
}

_TEXTURE_SHARES = (0.4, 0.2, 0.2, 0.2)

_HELD_BACK_SEED = 5


@dataclass(frozen=True)
class Scene:
    """Attributes, and what no caption names. Lengths are in frame heights, times in seconds.

    u, v: where the object starts, as fractions in [0, 1] of the room it has. speed: heights/s of a straight motion.
    rate: turns/s of "spins" and "circles". phase: [0, 1) of a motion that repeats. turn: +1 clockwise, -1 the other
    way. reach: the height of a bounce, the radius of a circle. scale: of the size's radius. light, dark: what is added
    to the 8-bit colours of object and background.
    """

    object: str
    colour: str
    size: str
    motion: str
    background: str
    texture: str = "none"
    u: float = 0.5
    v: float = 0.5
    speed: float = 0.35
    rate: float = 0.6
    phase: float = 0.0
    turn: int = 1
    reach: float = 0.5
    scale: float = 1.0
    light: float = 0.0
    dark: float = 0.0

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise InputError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}")

    @property
    def attributes(self) -> dict[str, str]:
        """What a caption can name, by attribute."""
        return {name: getattr(self, name) for name in ATTRIBUTES}


def draw_scene(generator: torch.Generator, *, held_back: HeldBack = "exclude", **fixed: str) -> Scene:
    """A random scene; its attributes are uniform, but for texture (none 40%).

    held_back: leave out the combinations that are kept from training, draw only those, or any. fixed: attributes that
    are given. InputError if no combination is left.
    """
    check_name("held_back", held_back, HeldBack)
    choices = []
    for name in ("object", "colour", "motion"):
        value = fixed.get(name)
        if value is not None and value not in ATTRIBUTES[name]:
            raise InputError(f"{name} must be one of {', '.join(ATTRIBUTES[name])}; got {value!r}")
        choices.append(ATTRIBUTES[name] if value is None else (value,))
    combinations = _combinations(held_back, *choices)
    if not combinations:
        raise InputError(f"no combination of {fixed} is left with held_back={held_back!r}")
    # A fixed number of draws in a fixed order, whatever they are used for.
    r = torch.rand(15, generator=generator, dtype=torch.float64).tolist()
    thing, colour, motion = combinations[int(r[0] * len(combinations))]
    texture = next(t for t, end in zip(TEXTURES, itertools.accumulate(_TEXTURE_SHARES)) if r[3] < end or end > 0.999)
    attributes = {
        "object": thing,
        "colour": colour,
        "motion": motion,
        "size": SIZES[int(r[1] * len(SIZES))],
        "background": BACKGROUNDS[int(r[2] * len(BACKGROUNDS))],
        "texture": texture,
    }

    def between(low: float, high: float, x: float) -> float:
        return low + (high - low) * x

    return Scene(
        **(attributes | fixed),
        u=r[4],
        v=r[5],
        speed=between(0.28, 0.45, r[6]),
        rate=between(0.5, 0.75, r[7]),
        phase=r[8],
        turn=1 if r[9] < 0.5 else -1,
        reach=r[10],
        scale=between(0.97, 1.03, r[11]),
        light=between(-5.0, 5.0, r[12]),
        dark=between(-4.0, 4.0, r[13]),
    )


@functools.cache
def _combinations(
    held_back: HeldBack, objects: tuple[str, ...], colours: tuple[str, ...], motions: tuple[str, ...]
) -> tuple[tuple[str, str, str], ...]:
    kept_out = held_back_combinations()
    every = itertools.product(objects, colours, motions)
    return tuple(c for c in every if held_back == "any" or (c in kept_out) == (held_back == "only"))


# Held back from training


def choose_held_back(seed: int = _HELD_BACK_SEED) -> list[tuple[str, str, str]]:
    """The rule behind `held_back.txt`: each (object, colour) pair is kept from training with exactly one motion.

    With objects, colours and motions shuffled, object o and colour c lose motion (c + 2 o) mod 10: a Latin rectangle,
    so a motion is held back 4 times, never twice with the same object or the same colour. In training every pair of
    object and colour keeps 9 motions, every motion 36 of the 40 pairs.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(values: tuple[str, ...]) -> list[str]:
        return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]

    objects, colours, motions = shuffled(OBJECTS), shuffled(COLOURS), shuffled(MOTIONS)
    chosen = {
        (thing, colour, motions[(c + 2 * o) % len(motions)])
        for o, thing in enumerate(objects)
        for c, colour in enumerate(colours)
    }
    return [c for c in itertools.product(OBJECTS, COLOURS, MOTIONS) if c in chosen]


@functools.cache
def held_back_combinations() -> frozenset[tuple[str, str, str]]:
    """(object, colour, motion) of `held_back.txt`."""
    text = resources.files("lcv_core.training.data").joinpath("held_back.txt").read_text(encoding="utf-8")
    rows = [line.split(", ") for line in text.splitlines() if line and not line.startswith("#")]
    return frozenset((thing, colour, motion) for thing, colour, motion in rows)


def is_held_back(scene: Scene) -> bool:
    return (scene.object, scene.colour, scene.motion) in held_back_combinations()


# Captions

# What a user would type comes first; it is drawn half of the time.
_OBJECT_NOUNS = {
    "ball": ("ball", "sphere", "disc"),
    "square": ("square", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring",),
}
_COLOUR_WORDS = {"purple": ("purple", "violet"), "cyan": ("cyan", "turquoise")}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_BACKGROUND_WORDS = {"grey": ("grey", "gray"), "dark blue": ("dark blue", "navy")}
_TEXTURE_NOUNS = {
    "stripes": ("stripes", "a stripe pattern"),
    "dots": ("dots", "a pattern of dots"),
    "checks": ("checks", "a checkerboard pattern"),
}
_TEXTURE_WORDS = {"none": "plain", "stripes": "striped", "dots": "dotted", "checks": "checked"}

# (she) moves, (a ball) moving
_MOTION_PHRASES = {
    "moves left": (
        ("moves left", "moving left"),
        ("moves to the left", "moving to the left"),
        ("slides to the left", "sliding to the left"),
        ("drifts leftwards", "drifting leftwards"),
        ("travels left", "travelling left"),
    ),
    "moves right": (
        ("moves right", "moving right"),
        ("moves to the right", "moving to the right"),
        ("slides to the right", "sliding to the right"),
        ("drifts rightwards", "drifting rightwards"),
        ("travels right", "travelling right"),
    ),
    "moves up": (
        ("moves up", "moving up"),
        ("rises", "rising"),
        ("floats up", "floating up"),
        ("drifts upwards", "drifting upwards"),
        ("moves to the top", "moving to the top"),
    ),
    "moves down": (
        ("moves down", "moving down"),
        ("falls", "falling"),
        ("slides down", "sliding down"),
        ("drifts downwards", "drifting downwards"),
        ("drops down", "dropping down"),
    ),
    "stays still": (
        ("stays still", "staying still"),
        ("does not move", "not moving"),
        ("stands still", "standing still"),
        ("stays where it is", "staying where it is"),
    ),
    "bounces": (
        ("bounces", "bouncing"),
        ("bounces up and down", "bouncing up and down"),
        ("jumps up and down", "jumping up and down"),
    ),
    "spins": (
        ("spins", "spinning"),
        ("rotates", "rotating"),
        ("spins around", "spinning around"),
        ("turns around", "turning around"),
    ),
    "grows": (
        ("grows", "growing"),
        ("gets bigger", "getting bigger"),
        ("grows larger", "growing larger"),
    ),
    "shrinks": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
    ),
    "circles": (
        ("circles", "circling"),
        ("moves in a circle", "moving in a circle"),
        ("moves around in circles", "moving around in circles"),
        ("orbits", "orbiting"),
    ),
}  # fmt: skip

# Sentences: {thing} is the object without its article, {moves} and {moving} its motion, {back} the background.
_SENTENCES_WITH_BACKGROUND = (
    "{a} {thing} {moves} on a {back} background",
    "the {thing} {moves} on a {back} background",
    "{a} {thing} is {moving} on a {back} background",
    "{a} {thing} {moving} on a {back} background",
    "{a} {thing} {moves} against a {back} background",
    "{a} {thing} {moves} over a {back} background",
    "{a} {thing} {moves}, {back} background",
    "{thing}, {moving}, {back} background",
    "on a {back} background, {a} {thing} {moves}",
    "a video of {a} {thing} {moving} on a {back} background",
)
_SENTENCES = (
    "{a} {thing} {moves}",
    "the {thing} {moves}",
    "{a} {thing} is {moving}",
    "the {thing} is {moving}",
    "{a} {thing} {moving}",
    "{thing}, {moving}",
    "a video of {a} {thing} {moving}",
)

_NAMED_SHARES = {"size": 0.5, "background": 0.8, "texture": 0.85}
_FIRST_SHARE = 0.5


def captions(scene: Scene) -> list[str]:
    """Every sentence for a scene, each once: some thousands."""
    found: dict[str, None] = {}
    for thing in _things(scene):
        for moves, moving in _MOTION_PHRASES[scene.motion]:
            words = {"a": _article(thing), "thing": thing, "moves": moves, "moving": moving}
            for sentence in _SENTENCES:
                found[sentence.format(**words)] = None
            for back in _words(_BACKGROUND_WORDS, scene.background):
                for sentence in _SENTENCES_WITH_BACKGROUND:
                    found[sentence.format(**words, back=back)] = None
    return [*found]


def caption(scene: Scene, generator: torch.Generator) -> str:
    """One of `captions(scene)`, the plainest words most often. It names the size in half of the cases, the background
    in 80%, the texture in 85% (its absence in 15%)."""
    r = iter(torch.rand(10, generator=generator, dtype=torch.float64).tolist())

    def pick(options: Sequence[Any]) -> Any:
        x = next(r)
        if x < _FIRST_SHARE or len(options) == 1:
            return options[0]
        return options[1 + int((x - _FIRST_SHARE) / (1 - _FIRST_SHARE) * (len(options) - 1))]

    size = [pick(_words(_SIZE_WORDS, scene.size))] if next(r) < _NAMED_SHARES["size"] else []
    colour = pick(_words(_COLOUR_WORDS, scene.colour))
    noun = pick(_OBJECT_NOUNS[scene.object])
    share = _NAMED_SHARES["texture"]
    before, after = (
        pick(_textures(scene.texture)) if next(r) < (1 - share if scene.texture == "none" else share) else ((), ())
    )
    thing = " ".join([*size, *before, colour, noun, *after])
    moves, moving = pick(_MOTION_PHRASES[scene.motion])
    words = {"a": _article(thing), "thing": thing, "moves": moves, "moving": moving}
    if next(r) >= _NAMED_SHARES["background"]:
        return pick(_SENTENCES).format(**words)
    back = pick(_words(_BACKGROUND_WORDS, scene.background))
    return pick(_SENTENCES_WITH_BACKGROUND).format(**words, back=back)


def _words(synonyms: dict[str, tuple[str, ...]], value: str) -> tuple[str, ...]:
    return synonyms.get(value, (value,))


def _textures(texture: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Words (before the colour, after the noun) that name a texture."""
    nouns = _TEXTURE_NOUNS.get(texture, ())
    return [*(((), ("with", noun)) for noun in nouns), ((_TEXTURE_WORDS[texture],), ())]


def _things(scene: Scene) -> Iterator[str]:
    """The object in every wording, without its article: "small red ball with stripes"."""
    sizes = [[], *([word] for word in _words(_SIZE_WORDS, scene.size))]
    textures = [((), ()), *_textures(scene.texture)]
    for size, (before, after), colour, noun in itertools.product(
        sizes, textures, _words(_COLOUR_WORDS, scene.colour), _OBJECT_NOUNS[scene.object]
    ):
        yield " ".join([*size, *before, colour, noun, *after])


def _article(thing: str) -> str:
    return "an" if thing[0] in "aeiou" else "a"


# Reading a prompt

_OBJECT_OF = {noun: thing for thing, nouns in _OBJECT_NOUNS.items() for noun in nouns}
_COLOUR_OF = {word: colour for colour in COLOURS for word in _words(_COLOUR_WORDS, colour)}
_SIZE_OF = {word: size for size, words in _SIZE_WORDS.items() for word in words}
_BACKGROUND_OF = {word: back for back in BACKGROUNDS for word in _words(_BACKGROUND_WORDS, back)}
_TEXTURE_OF = {
    "plain": "none", "stripes": "stripes", "striped": "stripes", "stripe": "stripes", "dots": "dots", "dotted": "dots",
    "checks": "checks", "checked": "checks", "checkered": "checks", "checkerboard": "checks",
}  # fmt: skip
_MOTION_WORDS = (
    # The first that matches decides: "bounces up and down" is no "moves up".
    ("bounces", r"bounc\w*|jump\w* up and down"),
    ("circles", r"circl\w*|orbit\w*"),
    ("spins", r"spin\w*|rotat\w*|turn\w* around"),
    ("grows", r"grow\w*|get\w* (bigger|larger)"),
    ("shrinks", r"shrink\w*|get\w* smaller"),
    ("stays still", r"still|not mov\w+|where it is|rest\w*"),
    ("moves left", r"left|leftwards"),
    ("moves right", r"right|rightwards"),
    ("moves up", r"up|upwards|ris(es|ing)|to the top"),
    ("moves down", r"down|downwards|fall\w*|drop\w*"),
)


def parse(prompt: str) -> dict[str, str]:
    """The attributes that a prompt of this grammar names, by attribute; words it does not know are passed over."""
    text = " ".join(re.findall(r"[a-z]+", prompt.lower()))
    named: dict[str, str] = {}
    for words, back in sorted(_BACKGROUND_OF.items(), key=lambda item: -len(item[0])):
        found, count = re.subn(rf"\b{words} background\b", "background", text)
        if count:
            text = found
            named["background"] = back
            break
    for attribute, meanings in (
        ("object", _OBJECT_OF), ("colour", _COLOUR_OF), ("size", _SIZE_OF), ("texture", _TEXTURE_OF),
    ):  # fmt: skip
        for word in text.split():
            if word in meanings:
                named[attribute] = meanings[word]
                break
    for motion, pattern in _MOTION_WORDS:
        if re.search(rf"\b({pattern})\b", text):
            named["motion"] = motion
            break
    return {name: named[name] for name in ATTRIBUTES if name in named}
