"""Images and stacks of frames: reading, checking, resizing, PNG files that carry the settings they were made with.

Frames are channels-last RGB tensors: uint8 [F, H, W, 3], or float [F, H, W, 3] in [0, 1].
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from lcv_core.errors import InputError, NumericalError
from lcv_core.files import (
    SETTINGS_KEY,
    prepare_target,
    replacing,
    require_file,
    settings_from_json,
    settings_to_json,
    temporary_path,
    write_error,
)
from lcv_core.names import Fit, check_name

_PNG_NAME = "frame_{:05d}.png"
_CHUNK_VALUES = 1 << 24  # float values converted at a time: 64 MiB of scratch memory whatever the clip


def read_image(path: str | Path) -> Tensor:
    """The picture in a file, uint8 [H, W, 3], upright (EXIF orientation applied), transparency laid over white.

    The content decides, not the extension. 16-bit, integer and float greyscale are scaled to 8 bits, not clipped; of
    an animation the first frame is read. InputError when the file is missing, damaged, too large or not an image.
    """
    path = require_file(path, "an image")
    try:
        with Image.open(path) as image:
            return _rgb_tensor(image)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path} has too many pixels to be opened safely; scale it down first") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{path} is not an image that can be read; save it as PNG or JPEG") from None
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on a damaged file
        raise InputError(f"{path} is damaged or cut off ({error}); save or download it again as PNG or JPEG") from None


def _rgb_tensor(image: Image.Image) -> Tensor:
    """Any PIL image as uint8 [H, W, 3]."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        grey = torch.from_numpy(_eight_bit(np.asarray(image), image.mode))
        return grey[..., None].expand(-1, -1, 3).contiguous()
    if image.has_transparency_data:
        return _over_white(torch.from_numpy(np.array(image.convert("RGBA"))))
    return torch.from_numpy(np.array(image.convert("RGB")))


def _eight_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Greyscale of more than 8 bits [H, W] -> uint8. The smallest usual range that holds the values is theirs."""
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError("the image holds NaN or infinite values; export it again as 8-bit PNG")
    ranges = (1.0, 255.0, 65535.0) if mode == "F" else (65535.0, 2.0**31)
    top = float(values.max())
    white = next((limit for limit in ranges if top <= limit), None)
    if white is None:
        raise InputError(f"the float image reaches {top:g}, expected values in [0, 1]; export it as 8-bit PNG")
    return np.clip(np.floor(values * (255.0 / white) + 0.5), 0, 255).astype(np.uint8)


def _over_white(frames: Tensor) -> Tensor:
    """RGBA [..., 4] -> RGB [..., 3] of the same dtype, composited over white."""
    rgb, alpha = frames[..., :3], frames[..., 3:]
    if frames.dtype == torch.uint8:
        mixed = rgb.int() * alpha.int() + 255 * (255 - alpha.int())
        return ((mixed + 127) // 255).to(torch.uint8)
    return rgb * alpha + (1 - alpha)


def as_frames(data: Any) -> Tensor:
    """What an API user may pass as pictures -> frames [F, H, W, 3] on the CPU, uint8 or float32 in [0, 1].

    data: a PIL image; a numpy array or tensor [H, W], [H, W, C] or [F, H, W, C] with C = 1, 3 or 4 (alpha is laid over
        white), uint8 or floating; or a list of such pictures of one size.
    Frames that already have the form are returned as they are. InputError for another rank, dtype or value range.
    """
    if isinstance(data, Image.Image):
        return _rgb_tensor(data)[None]
    if isinstance(data, (list, tuple)):
        return _join([as_frames(item) for item in data])
    frames = _to_tensor(data).cpu()
    shape = list(frames.shape)
    if frames.ndim == 2:
        frames = frames[..., None]
    if frames.ndim not in (3, 4) or frames.shape[-1] not in (1, 3, 4):
        hint = "; move the channels last" if len(shape) > 2 and shape[-3] in (1, 3, 4) else ""
        raise InputError(f"expected frames [F, H, W, 3] or one picture [H, W, 3], got shape {shape}{hint}")
    if frames.ndim == 3:
        frames = frames[None]
    if 0 in shape:
        raise InputError(f"expected at least one frame with at least one pixel, got shape {shape}")
    if frames.dtype != torch.uint8:
        frames = _unit_range(frames.float())
    if frames.shape[-1] == 4:
        frames = _over_white(frames)
    return frames.repeat(1, 1, 1, 3) if frames.shape[-1] == 1 else frames


def _to_tensor(data: Any) -> Tensor:
    """A numpy array or tensor as a tensor, uint8 or floating."""
    if isinstance(data, np.ndarray) and (data.dtype.kind == "f" or data.dtype == np.uint8):
        data = data.astype(np.float32, copy=False) if data.dtype.kind == "f" else data
        data = torch.from_numpy(np.require(data, requirements=["C", "W"]))  # torch takes no negative strides
    if not isinstance(data, Tensor) or not (data.dtype == torch.uint8 or data.dtype.is_floating_point):
        what = f"{type(data).__name__} of {data.dtype}" if hasattr(data, "dtype") else type(data).__name__
        raise InputError(f"expected pictures as PIL images, or as uint8 or float arrays in [0, 1]; got {what}")
    return data.detach() if data.requires_grad else data


def _unit_range(frames: Tensor) -> Tensor:
    """Float frames clamped to [0, 1]; InputError when they are further than rounding outside it, or NaN."""
    low, high = (float(v) for v in torch.aminmax(frames))
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # false for NaN too
        hint = "; divide by 255" if high > 2 else "; use (x + 1) / 2" if low >= -1.001 and high <= 1.001 else ""
        raise InputError(f"float frames must lie in [0, 1], got values from {low:g} to {high:g}{hint}")
    return frames if low >= 0 and high <= 1 else frames.clamp(0, 1)


def _join(parts: Sequence[Tensor]) -> Tensor:
    if not parts:
        raise InputError("expected at least one picture, got an empty list")
    if len({(part.shape[1:], part.dtype) for part in parts}) > 1:
        kinds = ", ".join(sorted({f"{p.shape[2]}x{p.shape[1]} {str(p.dtype)[6:]}" for p in parts}))
        raise InputError(f"all pictures of a list must have one size and type, got {kinds}; resize them first")
    return torch.cat(list(parts))


def resize_frames(frames: Tensor | np.ndarray, height: int, width: int, *, fit: Fit = "stretch") -> Tensor:
    """Frames [F, H, W, 3] -> [F, height, width, 3] of the same dtype, Lanczos as in Pillow.

    uint8 frames go through Pillow's 8-bit RGB resize, as in the official model; float frames channel by channel in
    mode "F", clamped to [0, 1]. Frames of that size already are returned unchanged.
    fit: "stretch" ignores the aspect ratio; "crop" fills the size and cuts what sticks out, centred; "pad" fits inside
        and adds black bars, centred.
    """
    check_name("fit", fit, Fit)
    if height < 1 or width < 1:
        raise InputError(f"the size to resize to must be positive, got {width}x{height}")
    tensor = _to_tensor(frames)
    checked = as_frames(tensor)
    h, w = checked.shape[1:3]
    if (h, w) == (height, width):
        return tensor if tensor.shape == checked.shape else checked.to(tensor)
    inner_h, inner_w, box = height, width, (0.0, 0.0, float(w), float(h))
    if fit == "crop":  # take the part of the source that fills the target, so that nothing outside it is computed
        scale = max(height / h, width / w)
        cut_w, cut_h = min(w, width / scale), min(h, height / scale)
        box = ((w - cut_w) / 2, (h - cut_h) / 2, (w + cut_w) / 2, (h + cut_h) / 2)
    elif fit == "pad":
        scale = min(height / h, width / w)
        inner_h, inner_w = max(1, round(h * scale)), max(1, round(w * scale))
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    out = torch.zeros(len(checked), height, width, 3, dtype=checked.dtype)
    for source, target in zip(checked, out):
        target[top : top + inner_h, left : left + inner_w] = _lanczos(source, inner_h, inner_w, box)
    return out.to(tensor)


def _lanczos(frame: Tensor, height: int, width: int, box: tuple[float, float, float, float]) -> Tensor:
    """The part `box` (left, top, right, bottom) of a frame [H, W, 3] as [height, width, 3]."""
    size, array = (width, height), frame.contiguous().numpy()
    if frame.dtype == torch.uint8:
        return torch.from_numpy(np.array(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS, box)))
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(array[..., c])).resize(size, Image.Resampling.LANCZOS, box))
        for c in range(3)
    ]
    return torch.from_numpy(np.stack(planes, axis=-1)).clamp_(0, 1)  # Lanczos overshoots at edges


def turn_picture(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A picture [H, W, 3] as a display matrix (a, b, c, d) turns and mirrors it: [H, W, 3] or [W, H, 3], a view.

    The pixel at column x, row y moves to column a x + c y, row b x + d y, up to a shift; each number is -1, 0 or 1.
    """
    a, b, c, d = matrix
    if b:
        picture = picture.swapaxes(0, 1)
    return picture[:: b or d, :: c or a]


def to_uint8(frames: Tensor | np.ndarray) -> Tensor:
    """Float values in [0, 1], any shape -> uint8, rounded to the nearest and clamped; uint8 passes unchanged.

    Converted in chunks along the first axis, so that the scratch memory does not grow with the clip.
    Raises NumericalError for NaN.
    """
    frames = _to_tensor(frames)
    if frames.dtype == torch.uint8:
        return frames
    out = torch.empty(frames.shape, dtype=torch.uint8, device=frames.device)
    step = max(1, _CHUNK_VALUES // max(1, frames[:1].numel()))
    for source, target in zip(frames.split(step), out.split(step)):
        values = source.float()
        if values.isnan().any():
            raise NumericalError("the frames to convert to 8 bits hold NaN")
        target.copy_((values * 255 + 0.5).floor_().clamp_(0, 255))
    return out


def frames_to_uint8(frames: Tensor | np.ndarray) -> Iterator[Tensor]:
    """The frames of [F, H, W, 3] or one [H, W, 3], one by one as contiguous uint8 [H, W, 3] on the CPU."""
    tensor = _to_tensor(frames)
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim != 4 or tensor.shape[-1] != 3 or 0 in tensor.shape[1:]:
        raise InputError(f"expected frames [F, H, W, 3] or [H, W, 3], got shape {list(frames.shape)}")
    for frame in tensor:
        yield to_uint8(frame).cpu().contiguous()


def write_png(path: str | Path, frame: Tensor | np.ndarray, metadata: dict[str, Any] | None = None) -> None:
    """One frame [H, W, 3] (uint8, or float in [0, 1]) as a PNG; `metadata` goes into it as JSON (iTXt, key "lcv").

    The file appears under its name complete or not at all. Raises InputError when it cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise InputError(f"{path} must end in .png")
    frames = list(frames_to_uint8(frame))
    if len(frames) != 1:
        raise InputError(f"{path} holds one frame, got {len(frames)}; write them as a PNG sequence or a video")
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_itxt(SETTINGS_KEY, settings_to_json(metadata))
    path = prepare_target(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; choose the name of a file")
    with replacing(path) as temporary:
        Image.fromarray(frames[0].numpy()).save(temporary, format="PNG", pnginfo=info)


def read_png_metadata(path: str | Path) -> dict[str, Any] | None:
    """The settings `write_png` stored, None for an image without them; InputError when it cannot be read."""
    path = require_file(path, "a PNG")
    try:
        with Image.open(path) as image:
            text = image.info.get(SETTINGS_KEY) if image.format == "PNG" else None
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on a damaged file
        raise InputError(f"{path} cannot be read as an image ({error}); write or download it again") from None
    return None if text is None else settings_from_json(text, path)


class PngSequenceWriter:
    """Frames as `frame_00000.png`, `frame_00001.png`, ... in a folder; the interface of `VideoWriter`.

    The files are collected in a hidden folder beside the target and moved into place by `close`, together with the
    removal of surplus frames of an earlier, longer run. `metadata` goes into frame 0.
    """

    def __init__(self, folder: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
        self.path = prepare_target(folder)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file, expected a folder for the PNG sequence")
        self.num_frames = 0
        self._metadata = metadata
        self._temporary = temporary_path(self.path)
        self._closed = False
        if metadata is not None:
            settings_to_json(metadata)  # fail before the work, not at its end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, frames: Tensor | np.ndarray) -> None:
        """Append frames [F, H, W, 3] or one [H, W, 3], uint8 or float in [0, 1]."""
        if self._closed:
            raise InputError(f"{self.path} is finished; open a new writer to write more frames")
        for frame in frames_to_uint8(frames):
            metadata = self._metadata if self.num_frames == 0 else None
            write_png(self._temporary / _PNG_NAME.format(self.num_frames), frame, metadata)
            self.num_frames += 1

    def close(self) -> None:
        """Move the finished frames into place. Raises InputError when there are none."""
        if self._closed:
            return
        try:
            if self.num_frames == 0:
                raise InputError(f"no frames were written to {self.path}")
            if not self.path.exists():
                # At once, so that a killed run leaves the whole sequence or none of it.
                self._temporary.replace(self.path)
                return
            for file in sorted(self._temporary.iterdir()):
                file.replace(self.path / file.name)
            for file in self.path.glob("frame_*.png"):
                number = file.stem.removeprefix("frame_")
                if number.isdecimal() and int(number) >= self.num_frames:
                    file.unlink()
        except OSError as error:
            raise write_error(self.path, error) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what was written; frames of an earlier run under the same name stay."""
        self._closed = True
        shutil.rmtree(self._temporary, ignore_errors=True)


def write_png_sequence(
    folder: str | Path, frames: Iterable[Tensor | np.ndarray], metadata: dict[str, Any] | None = None
) -> None:
    """Frames [F, H, W, 3], or an iterable of frames or chunks of frames, as numbered PNG files in a folder."""
    with PngSequenceWriter(folder, metadata=metadata) as writer:
        for chunk in frames:
            writer.write(chunk)


def rewrite_sequence_metadata(folder: str | Path, metadata: dict[str, Any]) -> None:
    """Other settings into a finished PNG sequence; the pictures stay."""
    first = Path(folder) / _PNG_NAME.format(0)
    write_png(first, read_image(first), metadata)


def read_sequence_metadata(folder: str | Path) -> dict[str, Any] | None:
    """The settings stored in the first frame of a PNG sequence; None when the folder holds no such sequence."""
    first = Path(folder) / _PNG_NAME.format(0)
    return read_png_metadata(first) if first.is_file() else None
