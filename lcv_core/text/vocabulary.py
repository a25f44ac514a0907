"""A small tokenizer for the models this project makes: a Unigram vocabulary of video prompts, written out in code."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path

from lcv_core.text.prompt import DEFAULT_NEGATIVE_PROMPT

_SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")  # ids 0 to 3, as in umT5

# Scores are log-probabilities: a whole word beats its parts, a part beats letters.
_WORD, _CAPITALISED, _PART, _CHARACTER = -8.0, -9.0, -11.0, -13.0

_WORDS = """
a an the this that these those it its he she they them his her their we you your i my our one who which what where when
while as than then there here so such same other another each every some any many much few more most less least all both
no not only just also too very quite almost nearly still again once twice always never often sometimes now later soon
and or but if because until before after during since in on at of to from by with without within into onto out off over
under above below between behind beside along across around through toward towards against near next past up down
away back forward forwards backward backwards inside outside together apart is are was were be been being has have had
do does did can could will would may must should get gets make makes made let lets go goes going come comes see seen
two three four five six seven eight nine ten first second third last half single double several pair group row
red green blue yellow orange purple violet pink brown black white gray grey cyan magenta teal navy turquoise gold golden
silver beige crimson scarlet olive lime indigo maroon ivory colour colours color colors coloured colored colourful
colorful dark light bright pale deep vivid pastel neon monochrome gradient rainbow shade tint hue transparent opaque
circle circles square squares triangle triangles rectangle rectangles ring rings star stars cross line lines dot dots
ball balls disc disk cube cubes sphere spheres cone cylinder pyramid hexagon pentagon diamond ellipse oval spiral grid
checkerboard stripe stripes striped pattern patterns shape shapes block blocks bar bars wave waves curve arrow heart
big bigger small smaller large larger tiny huge little tall short long wide narrow thin thick round flat sharp smooth
rough soft hard solid hollow heavy empty full high low left right top bottom middle center centre corner edge side sides
upper lower horizontal horizontally vertical vertically diagonal diagonally clockwise counterclockwise
move moves moving moved motion slide slides sliding drift drifts drifting float floats floating fall falls falling drop
drops dropping rise rises rising bounce bounces bouncing roll rolls rolling spin spins spinning rotate rotates rotating
rotation turn turns turning orbit orbits orbiting circling swing swings swinging grow grows growing shrink shrinks
shrinking stretch stretches pulse pulses pulsing blink blinks blinking fade fades fading appear appears appearing
disappear disappears change changes changing shake shakes zoom zooms zooming pan pans panning tilt tilts tilting follow
follows following track tracking walk walks walking run runs running jump jumps jumping fly flies flying swim swims
swimming dance dances dancing stand stands standing sit sits sitting stop stops stopping start starts stay stays
staying rest rests enter enters leave leaves crosses crossing pass passes passing hit hits collide collides
travel travels travelling glide glides gliding flow flows flowing look looks looking hold holds holding play plays
playing open opens opening close closes closing pour pours pouring burn burns burning shine shines shining
slow slowly fast faster quick quickly gently rapidly steady steadily smoothly suddenly softly calm calmly speed pace
background foreground scene sky sun sunset sunrise moon night day morning evening cloud clouds cloudy rain snow wind
storm fog mist sea ocean river lake water beach sand shore mountain mountains hill hills valley desert forest tree trees
grass field meadow garden flower flowers leaf road street path bridge city town village building buildings house room
wall floor ceiling window door table chair kitchen park station island earth space planet sunlight shadow shadows
man woman boy girl child children person people crowd baby face hand hands head eye eyes hair smile smiling wearing
dressed shirt dress coat hat dog cat bird birds horse fish butterfly bear lion tiger elephant rabbit panda cow sheep
car cars truck bus train boat ship plane bicycle bike motorcycle robot rocket cup glass bottle book phone food
fruit apple lemon bread cake coffee tea fire smoke stone rock wood metal paper plastic ice
video clip film movie shot frame frames camera lens view angle closeup macro aerial drone handheld focus
blur blurry bokeh depth cinematic realistic photorealistic realism animation animated cartoon anime painting watercolor
sketch illustration drawing render style art photo photography image picture abstract simple minimal clean detailed
detail texture plain noise grain contrast exposure lighting lit glow glowing dramatic natural warm cold beautiful
quality resolution slow-motion timelapse loop looping seamless world time life young old new
checks checked checkered dotted leftwards rightwards upwards downwards getting
"""

_PARTS = """
ing ed er est ly es ness ment tion sion able ible ful less ous al ic ive ity ish ist ize ise ary ory ant ent ance ence
th he in an re on at en or ti st ar nd to nt is it as le ve co me de ri ro ra li la el al ma ch ea ou ai ee oo ow ew ay
sh wh ph ck ng qu tr pr br cr dr fr gr pl cl bl fl gl sl sp sc sk sm sn sw str thr un dis pre pro con com per sub
inter over under out up down 's 't 're 've 'll
"""


@functools.cache
def _pieces() -> tuple[tuple[str, float], ...]:
    """The Unigram vocabulary, (piece, score) by id: specials, bytes, words with their leading space, parts, letters."""
    words = dict.fromkeys([*_WORDS.split(), *re.findall(r"[a-z]+", DEFAULT_NEGATIVE_PROMPT.lower())])
    scores: dict[str, float] = dict.fromkeys(_SPECIAL, 0.0)
    scores |= {f"<0x{byte:02X}>": 0.0 for byte in range(256)}
    scores |= {f"▁{word}": _WORD for word in words}
    scores |= {f"▁{word.capitalize()}": _CAPITALISED for word in words if f"▁{word.capitalize()}" not in scores}
    scores |= dict.fromkeys(_PARTS.split(), _PART)
    scores |= dict.fromkeys(["▁", *map(chr, range(0x21, 0x7F))], _CHARACTER)
    return tuple(scores.items())


def padded_vocab_size() -> int:
    """Rows of the embedding: the pieces, rounded up to 128 as umT5's 256300 are to 256384."""
    return (len(_pieces()) + 127) // 128 * 128


def write_tokenizer(folder: str | Path) -> None:
    """Write tokenizer.json and its two companions: a small Unigram model of video prompts with byte fallback.

    It behaves like umT5's: NFKC, a metaspace before every word, `</s>` at the end, pad 0, eos 1, bos 2, unk 3. Text
    outside its words falls back to letters, text outside ASCII to UTF-8 bytes, so nothing becomes unk.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(Unigram([*_pieces()], unk_id=_SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", _SPECIAL.index("</s>"))]
    )
    tokenizer.add_special_tokens([*_SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "padding_side": "right"} | special,
    )
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
