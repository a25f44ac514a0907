"""Frames, latents and tokens; the aspect buckets; sizes for other scales."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lcv_core import shapes
from lcv_core.errors import InputError
from lcv_core.shapes import BUCKETS, bucket, size_for_area

sides = st.integers(16, 4096)


@given(st.integers(0, 5000))
def test_frames_and_latents_are_inverse(k: int) -> None:
    frames = 4 * k + 1
    assert shapes.num_latents(frames) == k + 1
    assert shapes.num_pixel_frames(shapes.num_latents(frames)) == frames
    assert shapes.floor_frames(frames) == frames


@given(st.integers(-10, 5000))
def test_frames_off_the_grid(frames: int) -> None:
    low = shapes.floor_frames(frames)
    assert low % 4 == 1 and (low <= frames < low + 4 or frames < 1)
    if frames % 4 == 1 and frames > 0:
        shapes.check_frames(frames)
        return
    for check in (shapes.num_latents, shapes.check_frames):
        with pytest.raises(InputError, match=r"must be 4k\+1"):
            check(frames)


def test_error_sentences() -> None:
    def message(call: object, *args: object, **options: object) -> str:
        with pytest.raises(InputError) as error:
            call(*args, **options)  # type: ignore[operator]
        return str(error.value)

    assert message(shapes.check_frames, 92) == "num_frames must be 4k+1, got 92; try 89 or 93"
    assert message(shapes.check_frames, 2, name="n") == "n must be 4k+1, got 2; try 1 or 5"
    assert message(shapes.check_frames, 0) == "num_frames must be 4k+1 and at least 1, got 0; try 1 or 5"
    assert message(shapes.check_size, 480, 850) == "width must be a multiple of 16, got 850; try 848 or 864"
    assert message(shapes.check_size, 0, 16) == "height must be a multiple of 16, got 0; try 16 or 32"
    assert "multiple of 64" in message(shapes.check_size, 720, 1280, multiple=64)
    assert "num_cond_frames must be at least 1" in message(shapes.check_cond_frames, 0, 93, 93)
    assert "num_cond_frames must be 4k+1, got 12" in message(shapes.check_cond_frames, 12, 93, 93)
    assert "at least 97 frames" in message(shapes.check_cond_frames, 93, 93, 200)
    assert "use num_cond_frames=9" in message(shapes.check_cond_frames, 13, 93, 11)
    assert "give a longer clip" in message(shapes.check_cond_frames, 13, 93, 0)
    assert "multiple of the patch 2" in message(shapes.token_grid, (1, 5, 6), (1, 2, 2))


def test_the_sizes_of_the_specification() -> None:
    assert shapes.latent_shape(93, 480, 832) == (16, 24, 60, 104)
    assert math.prod(shapes.token_grid((24, 60, 104), (1, 2, 2))) == 37_440
    assert math.prod(shapes.token_grid((48, 88, 160), (1, 2, 2))) == 168_960
    assert math.prod(shapes.token_grid((52, 88, 160), (1, 2, 2))) == 183_040
    shapes.check_cond_frames(13, 93, 13)


# How many buckets each table has, and some entries copied from the specification independently of the module.
COUNTS = {("480p", 16): 26, ("480p", 64): 15, ("480p", 128): 11, ("480p", 256): 9,
          ("720p", 16): 31, ("720p", 64): 21, ("720p", 128): 17, ("720p", 256): 5}  # fmt: skip
ENTRIES = {
    ("480p", 16): {0.26: (320, 1216), 0.58: (480, 832), 0.86: (576, 672), 1.17: (672, 576), 1.73: (832, 480),
                   2.75: (1056, 384), 3.09: (1088, 352), 4.00: (1280, 320)},
    ("480p", 64): {0.50: (448, 896), 1.00: (640, 640), 1.86: (832, 448), 2.83: (1088, 384), 3.60: (1152, 320)},
    ("480p", 128): {0.25: (256, 1024), 0.57: (512, 896), 1.75: (896, 512), 4.00: (1024, 256)},
    ("480p", 256): {0.33: (256, 768), 1.00: (512, 512), 3.00: (768, 256)},
    ("720p", 16): {0.25: (480, 1920), 0.40: (608, 1504), 0.54: (704, 1312), 1.00: (960, 960), 1.31: (1088, 832),
                   1.35: (1120, 832), 2.47: (1504, 608), 3.12: (1696, 544), 3.93: (1888, 480)},
    ("720p", 64): {0.22: (448, 2048), 0.55: (704, 1280), 0.76: (832, 1088), 1.58: (1216, 768), 1.82: (1280, 704),
                   2.89: (1664, 576), 3.75: (1920, 512)},
    ("720p", 128): {0.20: (384, 1920), 0.60: (768, 1280), 1.29: (1152, 896), 5.00: (1920, 384)},
    ("720p", 256): {0.33: (512, 1536), 0.60: (768, 1280), 1.00: (1024, 1024), 1.67: (1280, 768), 3.00: (1536, 512)},
}  # fmt: skip


@pytest.mark.parametrize("key", COUNTS, ids=str)
def test_tables(key: tuple[str, int]) -> None:
    table = BUCKETS[key]
    assert len(table) == COUNTS[key]
    assert ENTRIES[key].items() <= dict(table).items()
    nominals = [nominal for nominal, _ in table]
    assert nominals == sorted(set(nominals))
    for nominal, (h, w) in table:
        grain = min(key[1], 32)  # of the tables for 16 every size is a multiple of 32 too
        assert h % max(grain, key[1] if key[1] > 16 else 32) == 0 and w % max(grain, key[1] if key[1] > 16 else 32) == 0
        assert abs(h / w - nominal) <= 0.0101  # a nominal is the aspect to two digits
    if key[1] == 16:
        assert BUCKETS[key[0], 32] is table


@given(sides, sides, st.sampled_from(sorted(BUCKETS)))
@example(512, 512, ("480p", 16))
def test_bucket_is_the_first_nearest(h: int, w: int, key: tuple[str, int]) -> None:
    best, size = math.inf, None
    for nominal, candidate in BUCKETS[key]:
        if abs(nominal - h / w) < best:
            best, size = abs(nominal - h / w), candidate
    assert bucket(key[0], h, w, multiple=key[1]) == size  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("resolution", "h", "w", "multiple", "expected"),
    [
        ("480p", 1080, 1920, 16, (480, 832)),
        ("720p", 1080, 1920, 16, (704, 1312)),
        ("720p", 1080, 1920, 64, (704, 1280)),
        ("720p", 480, 832, 64, (704, 1280)),
        ("720p", 832, 480, 64, (1280, 704)),
        ("480p", 700, 700, 16, (608, 640)),  # 0.95 and 1.05 are equally far: the first wins
        ("480p", 832, 480, 16, (832, 480)),
    ],
)
def test_measured_examples(resolution: str, h: int, w: int, multiple: int, expected: tuple[int, int]) -> None:
    assert bucket(resolution, h, w, multiple=multiple) == expected  # type: ignore[arg-type]


def test_no_such_table() -> None:
    with pytest.raises(InputError, match="no aspect buckets for 480p with multiple 48; there are: 480p with multiple"):
        bucket("480p", 480, 832, multiple=48)


@given(st.integers(96**2, 1024**2), sides, sides, st.sampled_from([16, 64]))
def test_size_for_area(area: int, h: int, w: int, multiple: int) -> None:
    assume(1 / 3 <= h / w <= 3)
    assume(area >= (6 * multiple) ** 2)  # below that the grid is too coarse: 256x256 as 2:5 has 192x512 or 128x320
    height, width = size_for_area(area, h, w, multiple=multiple)
    assert height % multiple == 0 and width % multiple == 0
    assert abs(height * width / area - 1) <= 0.35
    assert abs(math.log((height / width) / (h / w))) <= 0.15


@given(st.integers(128**2, 1024**2), sides, sides)
def test_size_for_area_turned(area: int, h: int, w: int) -> None:
    """A turned picture gets the turned size, or one as good where two sizes tie."""
    assume(1 / 3 <= h / w <= 3)
    height, width = size_for_area(area, h, w)
    turned = size_for_area(area, w, h)
    assert abs(turned[1] - height) <= 16 and abs(turned[0] - width) <= 16 * max(h / w, w / h)


def test_size_for_area_finds_exact_sizes() -> None:
    assert size_for_area(96 * 160, 96, 160) == (96, 160)
    assert size_for_area(480 * 832, 480, 832) == (480, 832)
    assert size_for_area(4 * 96 * 160, 96, 160, multiple=64) == (192, 320)
