"""The README's moving picture, from what `make demo` made: python docs/miniature/pictures.py [outputs/demo]."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lcv_core.video_io import probe_video, read_video

TARGET = Path(__file__).with_name("demo.gif")
PANELS = {"1-text": "lcv t2v", "2-continued": "lcv continue", "3-refined": "lcv refine"}
SIZE, TITLE, GAP = (384, 256), 28, 8  # pixels
RATE = 25.0  # frames/s: GIF counts hundredths of a second
PAUSE = 800  # ms on the last frame


def clip(path: Path) -> tuple[list[Image.Image], float]:
    """Frames enlarged as they are, pixel by pixel, and their rate."""
    rate = probe_video(path).frame_rate
    assert rate is not None
    frames = [Image.fromarray(frame.numpy()) for frame in read_video(path)]
    return [frame.resize(SIZE, Image.Resampling.NEAREST) for frame in frames], float(rate)


def picture(frames: list[Image.Image]) -> Image.Image:
    """The panels of one moment, each with its command above it."""
    width = len(frames) * (SIZE[0] + GAP) - GAP
    canvas = Image.new("RGB", (width, TITLE + SIZE[1]), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(16)
    for column, (frame, title) in enumerate(zip(frames, PANELS.values(), strict=True)):
        left = column * (SIZE[0] + GAP)
        canvas.paste(frame, (left, TITLE))
        draw.text((left, 4), title, fill="black", font=font)
    return canvas


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo")
    clips = [clip(folder / f"{name}.mp4") for name in PANELS]
    seconds = max(len(frames) / rate for frames, rate in clips)
    moments = [index / RATE for index in range(round(seconds * RATE))]
    pictures = [
        picture([frames[min(int(moment * rate), len(frames) - 1)] for frames, rate in clips]) for moment in moments
    ]
    shades = [shown.quantize(64, dither=Image.Dither.NONE) for shown in pictures]
    durations = [round(1000 / RATE)] * (len(shades) - 1) + [PAUSE]
    shades[0].save(TARGET, save_all=True, append_images=shades[1:], duration=durations, loop=0, optimize=True)


if __name__ == "__main__":
    main()
