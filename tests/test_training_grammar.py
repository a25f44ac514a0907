"""Scenes and captions: what may be said about a scene, what is kept from training, and that the tokenizer knows it."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from lcv_core.errors import InputError
from lcv_core.text.vocabulary import write_tokenizer
from lcv_core.training.data.grammar import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    OBJECTS,
    SIZES,
    TEXTURES,
    Scene,
    caption,
    captions,
    choose_held_back,
    draw_scene,
    held_back_combinations,
    is_held_back,
    parse,
)

RED_BALL = Scene("ball", "red", "small", "moves left", "black")


def scenes_with_every_value() -> list[Scene]:
    """A few scenes in which each value of each attribute occurs."""
    values = [itertools.cycle(ATTRIBUTES[name]) for name in ATTRIBUTES]
    return [Scene(*row) for row in itertools.islice(zip(*values), max(map(len, ATTRIBUTES.values())))]


def test_the_issues_values():
    assert OBJECTS == ("ball", "square", "triangle", "star", "ring")
    assert COLOURS == ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "white")
    assert SIZES == ("small", "large")
    assert len(MOTIONS) == 10
    assert BACKGROUNDS == ("black", "grey", "dark blue", "dark green", "brown")
    assert TEXTURES == ("none", "stripes", "dots", "checks")


def test_what_a_user_types_is_a_caption():
    said = captions(RED_BALL)
    for sentence in (
        "a red ball moves left on a black background",
        "the red ball moves left",
        "a small red ball moves left on a black background",
        "a red sphere slides to the left",
        "a small plain red ball is moving left on a black background",
        "red ball, drifting leftwards, black background",
        "on a black background, a little red ball moves to the left",
    ):
        assert sentence in said
    striped = captions(dataclasses.replace(RED_BALL, texture="stripes", colour="orange", background="grey"))
    assert "an orange ball with stripes moves left on a gray background" in striped
    assert "a striped orange ball moves left" in striped
    assert len({*said}) == len(said) > 200


@pytest.mark.parametrize("scene", scenes_with_every_value(), ids=lambda scene: scene.motion)
def test_captions_say_what_is_true_and_can_be_read_back(scene: Scene):
    named: Counter[str] = Counter()
    said = captions(scene)
    for sentence in said:
        read = parse(sentence)
        assert read == {name: scene.attributes[name] for name in read}, sentence
        assert {"object", "colour", "motion"} <= read.keys(), sentence
        named.update(read.keys())
    for name in ("size", "background", "texture"):
        assert 0 < named[name] < len(said)  # named in some, left out in others


def test_every_word_is_one_token(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    words = {word for scene in scenes_with_every_value() for sentence in captions(scene) for word in sentence.split()}
    assert len(words) > 100
    for word in sorted(words):
        expected = ["▁" + word.rstrip(","), *([","] if word.endswith(",") else []), "</s>"]
        assert tokenizer.encode(word).tokens == expected


def test_a_drawn_caption_is_one_of_them_and_leaves_out_what_it_may():
    generator = torch.Generator().manual_seed(0)
    said = [caption(scene, generator) for scene in [RED_BALL] * 400]
    assert {*said} <= {*captions(RED_BALL)}
    assert len({*said}) > 100
    named = Counter(name for sentence in said for name in parse(sentence))
    for name, share in (("size", 0.5), ("background", 0.8), ("texture", 0.15)):
        assert abs(named[name] / 400 - share) < 0.08
    dotted = dataclasses.replace(RED_BALL, texture="dots")
    assert abs(sum("texture" in parse(caption(dotted, generator)) for _ in range(400)) / 400 - 0.85) < 0.06


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (
            "A big Violet ring, bouncing up and down, navy background",
            {"object": "ring", "colour": "purple", "size": "large", "motion": "bounces", "background": "dark blue"},
        ),
        ("the blue star gets smaller", {"object": "star", "colour": "blue", "motion": "shrinks"}),
        ("a checkered square on a dark green background", {
            "object": "square", "background": "dark green", "texture": "checks",
        }),
        ("a cat walks on the wet grass", {}),
    ],
)  # fmt: skip
def test_parse(prompt: str, named: dict[str, str]):
    assert parse(prompt) == named


def test_held_back_is_a_tenth_and_balanced():
    rows = held_back_combinations()
    assert len(rows) == 40 == len(OBJECTS) * len(COLOURS) * len(MOTIONS) // 10
    assert rows == {*choose_held_back()}
    assert Counter(thing for thing, _, _ in rows) == dict.fromkeys(OBJECTS, 8)
    assert Counter(colour for _, colour, _ in rows) == dict.fromkeys(COLOURS, 5)
    assert Counter(motion for _, _, motion in rows) == dict.fromkeys(MOTIONS, 4)
    for pair in ((0, 1), (0, 2), (1, 2)):  # no two values lose each other more than once
        assert max(Counter(tuple(row[i] for i in pair) for row in rows).values()) == 1


def test_drawing_keeps_to_its_side():
    generator = torch.Generator().manual_seed(0)
    assert not any(is_held_back(draw_scene(generator)) for _ in range(300))
    assert all(is_held_back(draw_scene(generator, held_back="only")) for _ in range(100))
    both = Counter(is_held_back(draw_scene(generator, held_back="any")) for _ in range(600))
    assert 30 < both[True] < 100  # 60 expected
    drawn = [draw_scene(generator) for _ in range(600)]
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in drawn} == {*values}
    assert all(draw_scene(generator, motion="spins", held_back="only").motion == "spins" for _ in range(20))


def test_the_same_seed_draws_the_same_scene():
    a, b = (draw_scene(torch.Generator().manual_seed(3)) for _ in range(2))
    assert a == b
    assert a != draw_scene(torch.Generator().manual_seed(4))


def test_impossible_scenes_are_refused():
    with pytest.raises(InputError, match=r"colour must be one of red.*got 'mauve'"):
        Scene("ball", "mauve", "small", "moves left", "black")
    with pytest.raises(InputError, match="motion must be one of"):
        draw_scene(torch.Generator(), motion="flies")
    thing, colour, motion = choose_held_back()[0]
    with pytest.raises(InputError, match="no combination"):
        draw_scene(torch.Generator(), object=thing, colour=colour, motion=motion)
    with pytest.raises(InputError, match="held_back must be"):
        draw_scene(torch.Generator(), held_back="some")  # type: ignore[arg-type]
