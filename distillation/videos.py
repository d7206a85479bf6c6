"""Video files on their way into a codec and out of one; PyAV, an extra, is imported when it is first used."""

from __future__ import annotations

import importlib
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distillation.errors import DistillationError, MissingPartError

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")

_UNKNOWN_RATE = 25.0


class VideoError(DistillationError, ValueError):
    """A video cannot be read, is too short, or cannot be written."""


def find_videos(folder: str | Path) -> dict[str, Path]:
    """Return ``{path below the folder: file}`` of a folder's videos, searched through, sorted; hidden files are none.

    Raises:
        VideoError: there is none.
    """
    root = Path(folder)
    found = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    files = sorted(path for path in found if not path.name.startswith("."))
    if not files:
        raise VideoError(f"{root} holds no video; looked for {', '.join(SUFFIXES)}")
    return {file.relative_to(root).as_posix(): file for file in files}


def read_clip(path: Path, num_frames: int, height: int, width: int, *, fps: float | None = None) -> Tensor:
    """Return the first frames of a video at the size a teacher takes; one frame at a time is held at its own size.

    A frame is turned as the file says (phones store upright videos on their side), scaled (bilinear with antialiasing)
    until it covers ``height`` x ``width``, and cropped at the centre.

    Args:
        path: a file of any format FFmpeg knows.
        num_frames: T.
        height: pixels.
        width: pixels.
        fps: frames per second to take, repeating or leaving out frames; None takes each frame of the file.

    Returns:
        float32 [T, 3, height, width] in [0, 1].

    Raises:
        VideoError: the file is no video, breaks off, or has too few frames.
        MissingPartError: PyAV is not installed.
    """
    av = require_av()
    kept: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video stream")
            rate = float(container.streams.video[0].average_rate or _UNKNOWN_RATE)
            step = 1.0 if fps is None else rate / fps
            for index, frame in enumerate(container.decode(video=0)):
                repeats = 0
                while len(kept) + repeats < num_frames and round((len(kept) + repeats) * step) == index:
                    repeats += 1
                if repeats:
                    kept += [_fitted(frame, height, width)] * repeats
                if len(kept) == num_frames:
                    break
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{path} cannot be read as a video: {error}") from error
    if len(kept) < num_frames:
        taken = "" if fps is None else f" at {fps:g} a second"
        raise VideoError(f"{path} gives {len(kept)} frames{taken}, and {num_frames} are needed; cut longer clips")
    return torch.stack(kept)


def write_mp4(path: str | Path, video: Tensor, *, fps: float = 16) -> None:
    """Write a clip as H.264 (yuv420p) in MP4; the file is whole or absent.

    Args:
        path: the file; its folder is made.
        video: [T, 3, H, W] in [0, 1]; values outside are clipped. Height and width are even.
        fps: frames per second, above 0.

    Raises:
        VideoError: the shape is another, a side is odd, a value is not finite, or ``fps`` is not positive and finite.
        MissingPartError: PyAV is not installed.
    """
    if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape or video.shape[2] % 2 or video.shape[3] % 2:
        raise VideoError(f"a clip is [T, 3, H, W] with even sides; got shape {list(video.shape)}")
    if not bool(torch.isfinite(video).all()):
        raise VideoError(f"the clip for {path} holds NaN or infinity and cannot be encoded")
    if not 0 < fps < math.inf:
        raise VideoError(f"fps must be positive and finite; got {fps}")
    av = require_av()
    pixels = (video.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        stream.options = {"crf": "17"}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial, file)


def require_av() -> Any:  # noqa: ANN401 - the module
    """Return the module ``av``.

    Raises:
        MissingPartError: it is not installed.
    """
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise MissingPartError("videos need PyAV: pip install 'latent-rewards[report]'") from error


def _fitted(frame: Any, height: int, width: int) -> Tensor:  # noqa: ANN401 - av.VideoFrame
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float() / 255
    pixels = pixels.rot90(round(frame.rotation / 90), (1, 2))  # both count anticlockwise
    factor = max(height / pixels.shape[1], width / pixels.shape[2])
    size = max(height, round(pixels.shape[1] * factor)), max(width, round(pixels.shape[2] * factor))
    if size != tuple(pixels.shape[1:]):
        pixels = functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[:, top : top + height, left : left + width]
