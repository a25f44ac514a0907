"""Video files: times, colours, rotation, writing, joining, and what goes wrong with files."""

import errno
import json
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lcv_core import image_io, video_io
from lcv_core.errors import InputError
from lcv_core.image_io import write_png, write_png_sequence
from lcv_core.video_io import (
    VideoWriter,
    check_writable,
    concat_videos,
    iter_video,
    probe_video,
    read_metadata,
    read_video,
    write_video,
)
from lcv_core.video_io.times import exact_rate, resample, screen_times

BITS = 8


def coded(index: int, *, height: int = 32, width: int = 64) -> torch.Tensor:
    """A frame whose eight vertical bars are the bits of its index."""
    bars = torch.tensor([(index >> b) & 1 for b in range(BITS)], dtype=torch.uint8) * 255
    return bars.repeat_interleave(width // BITS)[None, :, None].expand(height, width, 3).contiguous()


def index_of(frame: torch.Tensor) -> int:
    bars = frame.float().mean(dim=(0, 2)).reshape(BITS, -1).mean(dim=1)
    return sum(1 << b for b in range(BITS) if bars[b] > 127)


def encode(
    path: Path, frames, times, *, tick: Fraction, codec="libx264", options=None, fmt=None, setup=None, rate=None
) -> Path:
    """Frames with timestamps `times`, counted in ticks of `tick` seconds, by PyAV alone."""
    with av.open(str(path), "w", format=fmt) as out:
        stream = out.add_stream(codec, rate=rate or 1 / tick, options=options or {"crf": "10"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = tick
        if setup:
            setup(stream)
        for frame, time in zip(frames, times):
            picture = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
            picture.pts, picture.time_base = time, tick
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """120 numbered frames at 30 per second, keyframes every 12 frames."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    frames = [coded(i) for i in range(120)]
    options = {"crf": "10", "g": "12"}
    return encode(path, frames, range(120), tick=Fraction(1, 30), options=options)


def smooth(height: int = 64, width: int = 96, num_frames: int = 4) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    t = torch.arange(num_frames)[:, None, None]
    waves = [torch.sin(x / 30 + t / 5) + 0 * y, torch.cos(y / 25 + x / 70) + 0 * t, torch.sin((x + y) / 40 - t / 9)]
    return torch.stack(waves, dim=-1) * 0.45 + 0.5


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


# Times


@pytest.mark.parametrize("source", ["24", "25", "29.97", "30", "50", "60", "15"])
@pytest.mark.parametrize("target", [15.0, 24.0, 30.0])
def test_resampling_shows_the_frame_on_the_screen(tmp_path, source, target):
    rate = exact_rate(float(source))
    path = encode(tmp_path / "a.mp4", [coded(i) for i in range(40)], range(40), tick=1 / rate)
    got = [index_of(frame) for frame in iter_video(path, frame_rate=target)]
    early = Fraction(1, 1000)  # the documented slack for rounded timestamps
    expected, i = [], 0
    while (shown := (Fraction(i) / Fraction(target) + early) * rate) < 40:
        expected.append(int(shown))
        i += 1
    assert got == expected
    assert len(got) == pytest.approx(40 / float(rate) * target, abs=1)


def test_whole_ratios_are_exact(clip, tmp_path):
    assert [index_of(f) for f in iter_video(clip, frame_rate=15)] == list(range(0, 120, 2))
    slow = encode(tmp_path / "slow.mp4", [coded(i) for i in range(10)], range(10), tick=Fraction(1, 15))
    assert [index_of(f) for f in iter_video(slow, frame_rate=30)] == [i // 2 for i in range(20)]
    assert [index_of(f) for f in iter_video(clip)] == list(range(120))


def test_matroska_milliseconds_do_not_cause_judder(tmp_path):
    path = encode(tmp_path / "a.mkv", [coded(i) for i in range(40)], range(40), tick=Fraction(1, 30))
    assert [index_of(f) for f in iter_video(path, frame_rate=15)] == list(range(0, 40, 2))


def test_variable_frame_rate_keeps_its_pace(tmp_path):
    ticks = [0, 20, 40, 400, 420, 1000, 1500]  # milliseconds
    path = encode(tmp_path / "vfr.mp4", [coded(i) for i in range(7)], ticks, tick=Fraction(1, 1000), rate=30)
    got = [index_of(f) for f in iter_video(path, frame_rate=10)]
    assert got[:15] == [max(k for k, t in enumerate(ticks) if t <= 100 * i + 1) for i in range(15)]
    assert got[15:] == [6] * len(got[15:])
    assert [index_of(f) for f in iter_video(path)] == list(range(7))


def test_start_agrees_with_decoding_from_the_beginning(clip):
    everything = [index_of(f) for f in iter_video(clip)]
    for start in (0.5, 1.99, 2.0, 2.35, 3.9):
        from_start = [index_of(f) for f in iter_video(clip, start=start)]
        assert from_start == everything[int(start * 30 + 0.031) :]
        resampled = [index_of(f) for f in iter_video(clip, start=start, frame_rate=15)]
        assert resampled == [int((start + i / 15) * 30 + 0.031) for i in range(len(resampled))]
    with pytest.raises(InputError, match=r"ends before start = 4\.5 s"):
        next(iter_video(clip, start=4.5))


def test_an_offset_on_the_clock_is_not_a_pause(tmp_path):
    path = encode(tmp_path / "a.ts", [coded(i) for i in range(20)], range(300, 320), tick=Fraction(1, 30), fmt="mpegts")
    with av.open(str(path)) as container:
        assert container.streams.video[0].start_time  # or this test proves nothing
    assert [index_of(f) for f in iter_video(path, frame_rate=15)] == list(range(0, 20, 2))


def test_missing_and_broken_timestamps():
    second = Fraction(1)
    rate = Fraction(10)
    stamps = [5 * second, None, Fraction(52, 10), Fraction(1, 10), Fraction(2, 10), 500 * second, 501 * second]
    shown = list(screen_times([(s, None, i) for i, s in enumerate(stamps)], origin=5 * second, rate=rate))
    assert [float(begin) for begin, _, _ in shown] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.5])
    assert [end for _, end, _ in shown[:-1]] == [begin for begin, _, _ in shown[1:]]
    assert shown[-1][1] - shown[-1][0] == Fraction(1, 10)
    picked = list(resample(iter(shown), rate=Fraction(10), start=Fraction(0), slack=Fraction(1, 1000)))
    assert picked == [0, 1, 2, 3, 4] + [5] * 10 + [6]


def test_raw_h264_without_timestamps(tmp_path):
    path = encode(tmp_path / "a.h264", [coded(i) for i in range(12)], range(12), tick=Fraction(1, 25), fmt="h264",
                  setup=lambda s: setattr(s.codec_context, "max_b_frames", 0))  # fmt: skip
    assert [index_of(f) for f in iter_video(path)] == list(range(12))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (29.97, "30000/1001"),
        (23.976, "24000/1001"),
        (15.0, "15"),
        (12.5, "25/2"),
        (59.94, "60000/1001"),
        (999.0, "999"),
    ],
)
def test_exact_rate(given, meant):
    assert exact_rate(given) == Fraction(meant)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), 1e6])
def test_impossible_rates(clip, rate, tmp_path):
    with pytest.raises(InputError, match="frame_rate must be"):
        next(iter_video(clip, frame_rate=rate))
    with pytest.raises(InputError, match="frame_rate must be"):
        VideoWriter(tmp_path / "a.mp4", frame_rate=rate)


# Reading


def test_read_first_last_all(clip):
    def indices(**options):
        return [index_of(f) for f in read_video(clip, **options)]

    assert indices(num_frames=5) == [0, 1, 2, 3, 4]
    assert indices(num_frames=5, which="last") == [115, 116, 117, 118, 119]
    assert indices(num_frames=13, which="last", frame_rate=15) == list(range(94, 120, 2))
    assert indices(which="all", frame_rate=10) == list(range(0, 120, 3))
    assert indices(num_frames=3, start=1.0, frame_rate=15) == [30, 32, 34]
    with pytest.raises(InputError, match="num_frames goes with"):
        indices(which="all", num_frames=3)


def test_last_frames_hold_no_more_than_asked(clip, monkeypatch):
    converted = []
    convert = video_io.read._to_rgb
    monkeypatch.setattr(video_io.read, "_to_rgb", lambda *a: converted.append(1) or convert(*a))
    assert len(read_video(clip, num_frames=7, which="last")) == 7
    assert len(converted) == 7  # the other 113 frames were never turned into pictures


def test_read_with_size(clip):
    got = read_video(clip, num_frames=3, size=(16, 128))
    assert got.shape == (3, 16, 128, 3) and got.dtype == torch.uint8
    assert [index_of(f) for f in got] == [0, 1, 2]
    padded = read_video(clip, num_frames=1, size=(64, 64), fit="pad")
    assert padded[0, :15].max() == 0 and padded[0, -15:].max() == 0


def test_too_few_frames_says_how_many(clip):
    with pytest.raises(InputError, match="has only 60 frames at 15 frames per second, 93 are needed"):
        read_video(clip, frame_rate=15, num_frames=93)
    with pytest.raises(InputError, match="has only 15 frames at 15 frames per second from 3 s on"):
        read_video(clip, frame_rate=15, num_frames=16, start=3.0, which="last")


def test_probe(clip, tmp_path):
    info = probe_video(clip)
    assert (info.width, info.height, info.frame_rate, info.num_frames) == (64, 32, 30.0, 120)
    assert info.duration == pytest.approx(4.0)
    mkv = encode(tmp_path / "a.mkv", [coded(i) for i in range(15)], range(15), tick=Fraction(1, 30))
    assert probe_video(mkv).num_frames == 15


def corners() -> torch.Tensor:
    """Red top left, green top right, blue bottom left, on grey: [32, 64, 3]."""
    frame = torch.full((32, 64, 3), 60, dtype=torch.uint8)
    for (y, x), channel in (((0, 0), 0), ((0, 1), 1), ((1, 0), 2)):
        frame[y * 16 : y * 16 + 16, x * 32 : x * 32 + 32] = torch.eye(3, dtype=torch.uint8)[channel] * 200
    return frame


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("hflip", [False, True])
def test_display_matrix(tmp_path, degrees, hflip):
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a display matrix")
    upright = corners()
    path = encode(tmp_path / "r.mp4", [upright] * 3, range(3), tick=Fraction(1, 30),
                  setup=lambda s: s.set_display_rotation(degrees, hflip=hflip))  # fmt: skip
    expected = torch.rot90(upright, degrees // 90, dims=(0, 1))  # counterclockwise, as the degrees
    if hflip:
        expected = expected.flip(1)
    got = read_video(path, num_frames=1)[0]
    info = probe_video(path)
    assert (info.height, info.width) == tuple(expected.shape[:2]) == tuple(got.shape[:2])
    inside = torch.zeros(32, 64, dtype=torch.bool)
    inside[4:12, 4:28] = inside[20:28, 36:60] = inside[4:12, 36:60] = inside[20:28, 4:28] = (
        True  # chroma bleeds at edges
    )
    inside = torch.rot90(inside, degrees // 90)
    assert (got[inside].int() - expected[inside].int()).abs().max() < 10


def test_rotation_falls_back_to_the_angle():
    class Frame:
        rotation = 90

        @property
        def side_data(self):
            raise ValueError("99 is not a valid Type")

    matrix = video_io.read._display_matrix(Frame())  # type: ignore[arg-type]
    turned = image_io.turn_picture(corners().numpy(), matrix)
    assert np.array_equal(turned, np.rot90(corners().numpy()))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "untagged", "untagged HD"])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p10le"])
def test_colour_matrix_and_range(tmp_path, matrix, full, pixels):
    """YUV values computed here from the definition must come back as the RGB they were made from."""
    rgb = np.array([200, 30, 90])
    kr, kb = (0.2126, 0.0722) if matrix in ("bt709", "untagged HD") else (0.299, 0.114)
    height, width = (720, 1280) if matrix == "untagged HD" else (64, 64)
    r, g, b = rgb / 255
    luma = kr * r + (1 - kr - kb) * g + kb * b
    chroma = (b - luma) / (2 * (1 - kb)), (r - luma) / (2 * (1 - kr))
    depth = 10 if pixels.endswith("10le") else 8
    unit, top = 1 << (depth - 8), (1 << depth) - 1
    if full:
        values = [luma * top] + [c * top + (1 << (depth - 1)) for c in chroma]
    else:
        values = [(16 + 219 * luma) * unit] + [(128 + 224 * c) * unit for c in chroma]
    frame = av.VideoFrame(width, height, pixels)
    for plane, value in zip(frame.planes, values):
        kind = np.uint8 if depth == 8 else np.uint16
        plane.update(np.full(plane.buffer_size // np.dtype(kind).itemsize, round(value), kind).tobytes())
    path = tmp_path / "c.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = pixels
        if not matrix.startswith("untagged"):
            stream.codec_context.colorspace = frame.colorspace = {"bt709": 1, "smpte170m": 6}[matrix]
        stream.codec_context.color_range = frame.color_range = 2 if full else 1
        frame.pts = 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    got = read_video(path)[0].reshape(-1, 3).int()
    assert (got - torch.tensor(rgb)).abs().max() <= 2


def test_odd_sizes_and_animated_gif(tmp_path):
    pictures = [Image.new("RGB", (33, 17), (40 * i, 0, 200 - 40 * i)) for i in range(5)]
    path = tmp_path / "a.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[70, 60, 70, 200, 100])
    got = read_video(path, which="all")
    assert got.shape == (5, 17, 33, 3)
    assert got[:, 8, 16, 0].tolist() == [0, 40, 80, 120, 160]
    # 15 per second: shown at 0, 70, 130, 200, 400 ms
    assert [int(f[8, 16, 0]) // 40 for f in iter_video(path, frame_rate=15)] == [0, 1, 2, 3, 3, 3, 4, 4]


# Writing


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p"])
def test_round_trip(tmp_path, suffix, pixel_format):
    frames = smooth()
    path = tmp_path / f"a{suffix}"
    write_video(path, frames, frame_rate=15, crf=10, pixel_format=pixel_format)
    got = read_video(path)
    assert got.shape == frames.shape
    assert psnr(got, frames * 255) > 40
    assert (got.float() - frames * 255).mean().abs() < 0.5  # no shift of brightness
    info = probe_video(path)
    assert info.frame_rate == pytest.approx(15.0) and info.num_frames == 4
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert isinstance(frame, av.VideoFrame)
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    if suffix != ".mkv":
        data = path.read_bytes()
        assert 0 < data.find(b"moov") < data.find(b"mdat")  # starts to play before it is all there


def test_equal_frames_give_equal_bytes_however_they_are_chunked(tmp_path):
    frames = (smooth(272, 480, num_frames=12) * 255).to(torch.uint8)
    for suffix in (".mp4", ".mkv"):
        one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
        write_video(one, frames, frame_rate=15, metadata={"seed": 1})
        for _ in range(4):  # x264 has differed on some runs only
            write_video(two, [frames[:5], frames[5], frames[6:].numpy()], frame_rate=15, metadata={"seed": 1})
            assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("rate", [29.97, 23.976, 12.5])
def test_frame_rates_survive(tmp_path, rate):
    write_video(tmp_path / "a.mp4", smooth(num_frames=9), frame_rate=rate)
    assert probe_video(tmp_path / "a.mp4").frame_rate == pytest.approx(float(exact_rate(rate)), rel=1e-9)


def test_odd_sizes_are_padded_or_kept(tmp_path):
    frames = smooth(height=33, width=47)
    write_video(tmp_path / "a.mp4", frames, frame_rate=15, crf=8)
    got = read_video(tmp_path / "a.mp4")
    assert got.shape == (4, 34, 48, 3)
    assert psnr(got[:, :33, :47], frames * 255) > 38
    assert psnr(got[:, 33, :47], frames[:, 32] * 255) > 33  # the last row again, not black
    write_video(tmp_path / "b.mp4", frames, frame_rate=15, pixel_format="yuv444p")
    assert read_video(tmp_path / "b.mp4").shape == frames.shape


SETTINGS = {
    "prompt": 'Ein Fuchs, "скажи" 狐狸在雪地里 🦊\n\u0000 \\',
    "seed": 2**63,
    "list": [1.5, None, True],
    "long": "狐x" * 40_000,
}


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_settings_survive(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_video(path, smooth(), frame_rate=15, metadata=SETTINGS)
    assert read_metadata(path) == SETTINGS
    with av.open(str(path)) as container:
        tags = {k.lower(): v for k, v in container.metadata.items()}
    assert json.loads(tags["comment"]) == SETTINGS


def test_settings_elsewhere(tmp_path, clip):
    frames = smooth()
    write_png(tmp_path / "a.png", frames[0], SETTINGS)
    write_png_sequence(tmp_path / "seq", frames, SETTINGS)
    write_video(tmp_path / "plain.mp4", frames, frame_rate=15)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.jpg")
    assert read_metadata(tmp_path / "a.png") == SETTINGS
    assert read_metadata(tmp_path / "seq") == SETTINGS
    for path in (clip, tmp_path / "plain.mp4", tmp_path / "plain.jpg", tmp_path):
        assert read_metadata(path) is None
    with pytest.raises(InputError, match="cannot be written as JSON"):
        VideoWriter(tmp_path / "b.mp4", frame_rate=15, metadata={"path": tmp_path})
    half = {"prompt": "half a pair \ud83e"}
    write_video(tmp_path / "half.mp4", frames, frame_rate=15, metadata=half)
    assert read_metadata(tmp_path / "half.mp4") == half


def test_the_name_appears_only_when_the_file_is_complete(tmp_path):
    path = tmp_path / "out" / "a.mp4"
    with VideoWriter(path, frame_rate=15) as writer:
        writer.write(smooth())
        assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]
    before = path.read_bytes()
    with pytest.raises(RuntimeError), VideoWriter(path, frame_rate=15) as writer:
        writer.write(smooth() * 0)
        raise RuntimeError
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"] and path.read_bytes() == before
    writer.abort()
    writer.close()
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="is finished"):
        writer.write(smooth())


def test_writing_refuses(tmp_path):
    with pytest.raises(InputError, match="no frames were written"), VideoWriter(tmp_path / "a.mp4", frame_rate=15):
        pass
    with (
        pytest.raises(InputError, match="has frames of 96x64, got one of 32x16"),
        VideoWriter(tmp_path / "a.mp4", frame_rate=15) as writer,
    ):
        writer.write(smooth())
        writer.write(smooth(16, 32))
    with pytest.raises(InputError, match=r"expected frames \[F, H, W, 3\]"):
        write_video(tmp_path / "a.mp4", [torch.zeros(3, 16, 16)], frame_rate=15)
    assert list(tmp_path.iterdir()) == []
    for name in ("a.avi", "a.webm", "a", "a.png"):
        with pytest.raises(InputError, match=r"\.mp4, \.mov or \.mkv"):
            VideoWriter(tmp_path / name, frame_rate=15)
    with pytest.raises(InputError, match="crf must be"):
        VideoWriter(tmp_path / "a.mp4", frame_rate=15, crf=60)


@contextmanager
def room_for(size: int):
    """No file may grow beyond `size` bytes: what a full disk looks like to a writer."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def noise(num_frames: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (num_frames, 64, 96, 3), dtype=np.uint8))


@pytest.mark.parametrize("task", ["write", "close", "concat", "png"])
def test_a_full_disk(tmp_path, task):
    done = tmp_path / "done.mp4"
    write_video(done, noise(60), frame_rate=15)
    before = done.read_bytes()
    target = tmp_path / ("a.png" if task == "png" else "a.mp4")
    message = rf"no room left on the disk for .*{target.name}; what was finished before it is kept"
    with pytest.raises(InputError, match=message):
        if task == "png":
            with room_for(4000):
                write_png(target, noise(1)[0])
        elif task == "concat":
            with room_for(len(before) * 3 // 2):
                concat_videos([done, done], target)
        else:
            with room_for(60_000):
                writer = VideoWriter(target, frame_rate=15)
                writer.write(noise(200 if task == "write" else 20))  # 20 frames wait inside the encoder until `close`
                assert task == "close"
                writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["done.mp4"]
    assert done.read_bytes() == before


@pytest.mark.parametrize("where", ["write", "close"])
def test_no_space_is_named(tmp_path, monkeypatch, where):
    class Full:
        def mux(self, packets):
            raise av.error.OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    writer = VideoWriter(tmp_path / "a.mp4", frame_rate=15)
    writer.write(smooth())
    writer._container.close()  # type: ignore[union-attr]
    monkeypatch.setattr(writer, "_container", Full())
    with pytest.raises(InputError, match="no room left on the disk"):
        writer.write(smooth(num_frames=60)) if where == "write" else writer.close()
    assert list(tmp_path.iterdir()) == []


def test_check_writable(tmp_path):
    for name in ("new/deep/a.mp4", "a.MOV", "b.mkv", "one.png", "new/frames"):
        assert check_writable(tmp_path / name) == tmp_path / name
    assert (tmp_path / "new" / "deep").is_dir()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    for name, reason in (
        ("folder.mp4", "is a folder"), ("a.webm", "unknown extension .webm; use .mp4"),
        ("file", "file without extension"), ("file/a.mp4", "part of its path is a file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            check_writable(tmp_path / name)
    if Path("/proc/self").exists():
        with pytest.raises(InputError, match="cannot be written"):
            check_writable("/proc/self/a.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.mp4", "new"]


# Joining


@pytest.mark.parametrize("rate", [15, 29.97])
def test_concat_is_exact(tmp_path, rate):
    frames = smooth(num_frames=50)
    parts = [tmp_path / f"{k}.mp4" for k in range(4)]
    for k, part in enumerate(frames.split([17, 1, 30, 2])):
        write_video(parts[k], part, frame_rate=rate, metadata={"part": k})
    with av.open(str(parts[0])) as container:
        order = [p.pts for p in container.demux(video=0) if p.size]
        assert order != sorted(order)  # B-frames: without them the test would prove little about times
    out = tmp_path / "out.mp4"
    concat_videos(parts, out, metadata={"whole": True})
    assert torch.equal(read_video(out), torch.cat([read_video(p) for p in parts]))
    assert psnr(read_video(out), frames * 255) > 40
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        times = sorted(p.pts * p.time_base for p in container.demux(stream) if p.size)
        assert times == [i / exact_rate(rate) for i in range(50)]
        container.seek(0)
        shown = [f.pts * f.time_base for f in container.decode(stream)]
        assert shown == times  # each picture has its own time, not only the set of times is right
        assert stream.average_rate == exact_rate(rate) and stream.frames == 50
    assert read_metadata(out) == {"whole": True}
    first = out.read_bytes()
    concat_videos(parts, out, metadata={"whole": True})
    assert out.read_bytes() == first
    assert 0 < first.find(b"moov") < first.find(b"mdat")
    concat_videos([out, parts[0]], parts[0])  # a part may be the target
    assert psnr(read_video(parts[0]), torch.cat([frames, frames[:17]]) * 255) > 40
    assert not list(tmp_path.glob(".*"))


def test_concat_refuses(tmp_path):
    frames = smooth(num_frames=20)
    good, other = tmp_path / "good.mp4", tmp_path / "other.mp4"
    write_video(good, frames, frame_rate=15)
    out = tmp_path / "out.mp4"
    for options, reason in (
        ({"frame_rate": 30}, "frame rate"), ({"frame_rate": 15, "pixel_format": "yuv444p"}, "pixel format"),
        ({"frame_rate": 15, "crf": 30}, "encoder settings"),
    ):  # fmt: skip
        write_video(other, frames, **options)
        with pytest.raises(InputError, match=f"other.mp4 differs from .*good.mp4 in .*{reason}"):
            concat_videos([good, other], out)
    write_video(other, frames[:, :32], frame_rate=15)
    with pytest.raises(InputError, match="in height"):
        concat_videos([good, other], out)
    other.write_bytes(good.read_bytes()[:-400])
    with pytest.raises(InputError, match="cut off"):
        concat_videos([good, other], out)
    with pytest.raises(InputError, match="at least one part"):
        concat_videos([], out)
    with pytest.raises(InputError, match="does not exist"):
        concat_videos([good, tmp_path / "gone.mp4"], out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.mp4", "other.mp4"]


# Bad files


def test_files_that_are_no_videos(tmp_path):
    empty, noise, text, sound = (tmp_path / n for n in ("empty.mp4", "noise.mp4", "text.txt", "sound.wav"))
    empty.touch()
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    text.write_text("hello\n" * 500)
    with av.open(str(sound), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    for path, reason in (
        (tmp_path / "gone.mp4", "does not exist"), (tmp_path, "is a folder"), (empty, "0 bytes"),
        (noise, "not a video"), (text, "is a text file"), (sound, "no video stream"),
    ):  # fmt: skip
        for read in (probe_video, read_video):
            with pytest.raises(InputError, match=reason) as caught:
                read(path)
            assert str(path) in str(caught.value)
    for path in (noise, empty, tmp_path / "gone.mp4"):
        with pytest.raises(InputError):
            read_metadata(path)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.97])
def test_a_cut_off_video(tmp_path, part):
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8))
    write_video(whole, noise, frame_rate=15)
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * part)])
    with pytest.raises(InputError, match=r"cut off|no frame that can be decoded"):
        read_video(cut, which="all")
    if part == 0.5:
        assert torch.equal(read_video(cut, num_frames=5), read_video(whole, num_frames=5))  # what is there can be used


def test_a_cover_picture_is_no_video(tmp_path):
    disposition = getattr(av.stream, "Disposition", None)
    if disposition is None or not hasattr(av.stream.Stream, "disposition"):
        pytest.skip("this PyAV knows no dispositions")
    path = tmp_path / "cover.mp4"

    def cover(stream):
        stream.pix_fmt = "yuvj420p"
        stream.disposition = disposition.attached_pic

    encode(path, [coded(0)], [0], tick=Fraction(1, 30), codec="mjpeg", setup=cover)
    with pytest.raises(InputError, match="no video stream"):
        probe_video(path)
