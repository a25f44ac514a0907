"""Images: every mode and damage, what the API takes as frames, resizing, PNG with settings."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lcv_core.errors import InputError, NumericalError
from lcv_core.image_io import (
    PngSequenceWriter,
    as_frames,
    read_image,
    read_png_metadata,
    resize_frames,
    to_uint8,
    write_png,
    write_png_sequence,
)


def photo(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options) -> torch.Tensor:
    image.save(tmp_path / name, **options)
    return read_image(tmp_path / name)


# Reading


def test_plain_and_misnamed(tmp_path):
    got = saved(tmp_path, Image.fromarray(photo()))
    assert got.dtype == torch.uint8 and np.array_equal(got.numpy(), photo())
    Image.fromarray(photo()).save(tmp_path / "jpeg.png", format="JPEG")
    assert read_image(tmp_path / "jpeg.png").shape == (20, 30, 3)


@pytest.mark.parametrize("alpha", [0, 85, 255])
def test_transparency_is_laid_over_white(tmp_path, alpha):
    expected = round((100 * alpha + 255 * (255 - alpha)) / 255)
    rgba = Image.new("RGBA", (4, 4), (100, 100, 100, alpha))
    assert (saved(tmp_path, rgba) == expected).all()
    assert (saved(tmp_path, Image.new("LA", (4, 4), (100, alpha))) == expected).all()


def test_palette_transparency(tmp_path):
    picture = Image.new("P", (4, 2), 1)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((0, 0), 0)
    got = saved(tmp_path, picture, transparency=0)
    assert got[0, 0].tolist() == [255, 255, 255] and got[1, 3].tolist() == [40, 50, 60]
    assert saved(tmp_path, picture)[0, 0].tolist() == [10, 20, 30]
    keyed = saved(tmp_path, Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert (keyed == 255).all()


def test_few_and_many_bits(tmp_path):
    bits = Image.new("1", (4, 2))
    bits.putpixel((1, 0), 1)
    assert saved(tmp_path, bits)[0, :2].tolist() == [[0, 0, 0], [255, 255, 255]]
    grey = np.array([[0, 128, 257 * 100, 32768, 65535]], dtype=np.uint16)
    expected = [0, 0, 100, 128, 255]  # rounded, not clipped
    assert saved(tmp_path, Image.fromarray(grey))[0, :, 0].tolist() == expected
    assert saved(tmp_path, Image.fromarray(grey.astype(np.int32)), "a.tif")[0, :, 1].tolist() == expected
    wide = saved(tmp_path, Image.fromarray(np.array([[0, 2**30]], dtype=np.int32)), "b.tif")
    assert wide[0, :, 2].tolist() == [0, 128]
    assert saved(tmp_path, Image.new("L", (3, 3), 77))[1, 1].tolist() == [77, 77, 77]


def test_float_greyscale(tmp_path):
    for white in (1.0, 255.0, 65535.0):
        values = np.array([[0, 0.25, 0.5, 1]], dtype=np.float32) * white
        got = saved(tmp_path, Image.fromarray(values), "f.tif")
        assert got[0, :, 0].tolist() == [0, 64, 128, 255]
    with pytest.raises(InputError, match="NaN"):
        saved(tmp_path, Image.fromarray(np.array([[np.nan, 1]], dtype=np.float32)), "n.tif")
    with pytest.raises(InputError, match=r"expected values in \[0, 1\]"):
        saved(tmp_path, Image.fromarray(np.array([[0, 1e9]], dtype=np.float32)), "h.tif")


def test_cmyk(tmp_path):
    got = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "c.jpg", quality=95)
    assert got[8, 8, 0] > 240 and got[8, 8, 1:].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = photo(6, 10)
    undo = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
            5: upright.swapaxes(0, 1), 6: np.rot90(upright, 1), 7: np.rot90(upright, 2).swapaxes(0, 1),
            8: np.rot90(upright, -1)}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation]))
    assert np.array_equal(saved(tmp_path, stored, exif=exif).numpy(), upright)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), (50 * i, 0, 0)) for i in range(1, 4)]
    for name in ("a.gif", "a.png", "a.webp"):
        got = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        assert abs(int(got[4, 4, 0]) - 50) < 4


def png_header(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, body))
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_files_that_are_no_pictures(tmp_path):
    names = ("cut.png", "cut.jpg", "empty.png", "text.png", "bomb.png", "broken.png")
    cut_png, cut_jpg, empty, text, bomb, broken = (tmp_path / name for name in names)
    Image.fromarray(photo(200, 200)).save(cut_png)
    Image.fromarray(photo(200, 200)).save(cut_jpg)
    broken.write_bytes(cut_png.read_bytes()[:60] + b"\xff" * 300 + cut_png.read_bytes()[360:])
    for path in (cut_png, cut_jpg):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    empty.touch()
    text.write_text("not a picture")
    bomb.write_bytes(png_header(60000, 60000))
    for path, reason in (
        (cut_png, "cut off"), (cut_jpg, "cut off"), (broken, "damaged"), (empty, "0 bytes"), (text, "is not an image"),
        (bomb, "too many pixels"), (tmp_path, "is a folder"), (tmp_path / "gone.png", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason) as caught:
            read_image(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    position=st.integers(0, 10_000),
    junk=st.binary(min_size=1, max_size=40),
    kind=st.sampled_from(["PNG", "JPEG", "GIF"]),
)
def test_damage_anywhere_is_an_input_error_or_a_picture(tmp_path_factory, position, junk, kind):
    path = tmp_path_factory.mktemp("fuzz") / "a"
    Image.fromarray(photo(24, 24)).save(path, format=kind)
    data = bytearray(path.read_bytes())
    start = position % len(data)
    data[start : start + len(junk)] = junk
    path.write_bytes(data)
    try:
        assert read_image(path).shape[2] == 3
    except InputError as error:
        assert str(path) in str(error)


# What the API takes


def test_as_frames_accepts():
    picture = photo()
    expected = torch.from_numpy(picture)[None]
    for data in (
        picture,
        torch.from_numpy(picture),
        Image.fromarray(picture),
        [Image.fromarray(picture)],
        picture[None],
    ):
        assert torch.equal(as_frames(data), expected)
    both = as_frames([Image.fromarray(picture), picture[::-1]])
    assert torch.equal(both, torch.stack([expected[0], expected[0].flip(0)]))
    frames = torch.rand(2, 4, 5, 3)
    assert as_frames(frames) is frames
    for dtype in (torch.float64, torch.bfloat16):
        got = as_frames(frames.to(dtype))
        assert got.dtype == torch.float32 and torch.equal(got, frames.to(dtype).float())
    assert as_frames(np.float64(0.5) * np.ones((4, 5))).shape == (1, 4, 5, 3)
    assert as_frames(torch.full((2, 4, 5, 1), 9, dtype=torch.uint8)).tolist() == np.full((2, 4, 5, 3), 9).tolist()
    rgba = torch.tensor([0.2, 0.4, 0.6, 0.5]).expand(4, 5, 4)
    assert torch.allclose(as_frames(rgba)[0, 0, 0], torch.tensor([0.6, 0.7, 0.8]))
    assert as_frames(torch.full((2, 2, 3), 1.0005)).max() == 1  # rounding is forgiven


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (torch.zeros(5), r"\[F, H, W, 3\].*got shape \[5\]"),
        (torch.zeros(1, 1, 4, 4, 3), r"got shape \[1, 1, 4, 4, 3\]"),
        (torch.zeros(3, 16, 16), r"got shape \[3, 16, 16\]; move the channels last"),
        (torch.zeros(9, 3, 16, 16), "move the channels last"),
        (torch.zeros(4, 4, 2), r"got shape \[4, 4, 2\]"),
        (torch.zeros(0, 4, 4, 3), "at least one frame"),
        (torch.full((4, 4, 3), 200.0), r"\[0, 1\], got values from 200 to 200; divide by 255"),
        (torch.tensor([-1.0, 0, 1]).expand(2, 2, 3), r"from -1 to 1; use \(x \+ 1\) / 2"),
        (torch.full((4, 4, 3), float("nan")), "nan"),
        (torch.full((4, 4, 3), 1.002), "must lie in"),
        (torch.zeros(4, 4, 3, dtype=torch.int64), "Tensor of torch.int64"),
        (np.zeros((4, 4, 3), np.uint16), "ndarray of uint16"),
        ("picture.png", "got str"),
        ([], "empty list"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "one size and type, got 4x4 uint8, 5x4 uint8"),
    ],
)
def test_as_frames_refuses(data, reason):
    with pytest.raises(InputError, match=reason):
        as_frames(data)


# Resizing


@pytest.mark.parametrize("size", [(480, 832), (7, 5), (41, 60), (20, 31)])
def test_uint8_resize_is_pillows(size):
    picture = photo(41, 60)
    got = resize_frames(torch.from_numpy(picture)[None], *size)
    expected = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    assert np.array_equal(got[0].numpy(), np.asarray(expected))


def test_float_resize():
    frames = torch.rand(2, 41, 60, 3, generator=torch.Generator().manual_seed(0)).round()  # edges that overshoot
    got = resize_frames(frames, 33, 90)
    assert got.dtype == torch.float32 and got.min() == 0 and got.max() == 1
    for c in range(3):
        plane = Image.fromarray(frames[1, ..., c].contiguous().numpy())
        expected = np.asarray(plane.resize((90, 33), Image.Resampling.LANCZOS))
        assert np.array_equal(got[1, ..., c].numpy(), expected.clip(0, 1))
    assert resize_frames(frames.double(), 8, 8).dtype == torch.float64
    assert resize_frames(frames.half(), 8, 8).dtype == torch.float16


def test_the_same_size_is_the_same_tensor():
    for frames in (torch.rand(2, 8, 9, 3), torch.from_numpy(photo())[None]):
        for fit in ("stretch", "crop", "pad"):
            assert resize_frames(frames, *frames.shape[1:3], fit=fit) is frames


def test_crop_fills_and_cuts_the_middle():
    picture = photo(40, 60)
    got = resize_frames(picture[None], 80, 80, fit="crop")[0].numpy()  # twice the size, 20 columns cut on each side
    big = np.asarray(Image.fromarray(picture).resize((120, 80), Image.Resampling.LANCZOS))
    assert np.array_equal(got, big[:, 20:100])
    tall = resize_frames(picture[None], 80, 40, fit="crop")[0].numpy()
    assert np.array_equal(tall, big[:, 40:80])
    assert resize_frames(np.zeros((1, 1, 5000, 3), np.uint8), 64, 64, fit="crop").shape == (1, 64, 64, 3)


def test_pad_fits_and_adds_bars():
    picture = photo(40, 60) // 2 + 100
    got = resize_frames(picture[None], 100, 120, fit="pad")[0].numpy()
    assert (got[:10] == 0).all() and (got[-10:] == 0).all()
    expected = Image.fromarray(picture).resize((120, 80), Image.Resampling.LANCZOS)
    assert np.array_equal(got[10:90], np.asarray(expected))
    side = resize_frames(torch.ones(1, 40, 60, 3), 40, 100, fit="pad")[0]
    assert (side[:, 20:80] == 1).all() and side[:, :20].max() == 0 == side[:, 80:].max()


def test_resize_refuses():
    with pytest.raises(InputError, match="must be positive, got 0x8"):
        resize_frames(torch.rand(1, 4, 4, 3), 8, 0)
    with pytest.raises(InputError, match='fit must be "stretch"'):
        resize_frames(torch.rand(1, 4, 4, 3), 8, 8, fit="cover")  # type: ignore[arg-type]


def test_to_uint8():
    every = torch.arange(256).float() / 255
    assert to_uint8(every).tolist() == list(range(256))
    assert to_uint8(torch.tensor([-0.5, 0.4999 / 255, 0.5001 / 255, 0.99, 1.7])).tolist() == [0, 0, 1, 252, 255]
    eight = torch.from_numpy(photo())
    assert to_uint8(eight) is eight
    with pytest.raises(NumericalError):
        to_uint8(torch.tensor([0.5, float("nan")]))


def test_to_uint8_in_chunks_is_the_same(monkeypatch):
    frames = torch.rand(7, 5, 6, 3)
    whole = to_uint8(frames)
    monkeypatch.setattr("lcv_core.image_io._CHUNK_VALUES", 2 * 5 * 6 * 3)
    assert torch.equal(to_uint8(frames), whole)
    assert torch.equal(to_uint8(frames.bfloat16()), (frames.bfloat16().float() * 255 + 0.5).to(torch.uint8))


# Writing


def test_png_round_trip(tmp_path):
    picture = torch.from_numpy(photo())
    path = tmp_path / "new" / "a.png"
    data = {"prompt": "狐狸 🦊", "seed": 7, "long": "x狐" * 400_000}
    write_png(path, picture, data)
    assert torch.equal(read_image(path), picture)
    assert read_png_metadata(path) == data
    write_png(path, picture.float() / 255)
    assert torch.equal(read_image(path), picture)
    assert read_png_metadata(path) is None
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_png_errors(tmp_path):
    picture = torch.from_numpy(photo())
    (tmp_path / "folder.png").mkdir()
    for target, reason in (("a.jpg", "must end in .png"), ("folder.png", "is a folder")):
        with pytest.raises(InputError, match=reason):
            write_png(tmp_path / target, picture)
    with pytest.raises(InputError, match="holds one frame, got 2"):
        write_png(tmp_path / "a.png", torch.stack([picture, picture]))
    with pytest.raises(InputError, match="cannot be read as an image"):
        (tmp_path / "text.png").write_text("x")
        read_png_metadata(tmp_path / "text.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif")
    assert read_png_metadata(tmp_path / "a.gif") is None
    assert not list(tmp_path.glob(".*"))


def test_png_sequence(tmp_path):
    frames = torch.stack([torch.from_numpy(photo(seed=i)) for i in range(5)])
    folder = tmp_path / "out" / "seq"
    write_png_sequence(folder, [frames[:2], frames[2], frames[3:]], {"seed": 3})
    names = [f"frame_{i:05d}.png" for i in range(5)]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert torch.equal(torch.stack([read_image(folder / name) for name in names]), frames)
    assert read_png_metadata(folder / names[0]) == {"seed": 3}
    assert read_png_metadata(folder / names[1]) is None
    (folder / "notes.txt").write_text("mine")
    write_png_sequence(folder, frames[3:])  # a shorter run leaves no frames of the longer one
    assert sorted(p.name for p in folder.iterdir()) == [*names[:2], "notes.txt"]
    assert torch.equal(read_image(folder / names[0]), frames[3])
    assert [p.name for p in folder.parent.iterdir()] == ["seq"]


def test_png_sequence_aborts(tmp_path):
    frames = torch.from_numpy(photo())[None]
    folder = tmp_path / "seq"
    write_png_sequence(folder, frames)
    with pytest.raises(RuntimeError), PngSequenceWriter(folder) as writer:
        writer.write(frames // 2)
        raise RuntimeError
    assert torch.equal(read_image(folder / "frame_00000.png"), frames[0])
    assert [p.name for p in tmp_path.iterdir()] == ["seq"]
    with pytest.raises(InputError, match="is finished"):
        writer.write(frames)
    with pytest.raises(InputError, match="no frames were written"):
        write_png_sequence(tmp_path / "none", [])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="expected a folder"):
        PngSequenceWriter(tmp_path / "file")
