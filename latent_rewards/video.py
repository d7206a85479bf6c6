"""Video files and their prompts: frames of any format FFmpeg knows, and H.264 clips that every browser plays.

PyAV (the ``metrics`` and ``report`` extras) is imported when first used.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from latent_rewards.contracts import ConfigError, DataError

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")
_FRAMES = re.compile(r"(first|uniform):([1-9][0-9]*)")


@dataclass(frozen=True)
class Clip:
    """Frames ``[T, 3, H, W]`` float32 in [0, 1], and how many of them make a second."""

    frames: Tensor
    fps: float


def check_frames(frames: str) -> None:
    """Raise ConfigError unless ``frames`` is "all", "first:N" or "uniform:N"."""
    if frames != "all" and not (isinstance(frames, str) and _FRAMES.fullmatch(frames)):
        raise ConfigError(f"frames must be 'all', 'first:N' or 'uniform:N' with N from 1; got {frames!r}")


def most_frames(frames: str) -> int | None:
    """Return the N of "first:N" and "uniform:N", None for "all"."""
    check_frames(frames)
    return None if frames == "all" else int(frames.partition(":")[2])


def frame_indices(frames: str, count: int) -> list[int]:
    """Return which of ``count`` frames "all", "first:N" or "uniform:N" keeps, in order; see :func:`read_video`.

    Raises:
        ConfigError: ``frames`` is something else.
    """
    kept = min(most_frames(frames) or count, count)
    if frames.startswith("uniform"):
        return [round(index) for index in torch.linspace(0, count - 1, kept).tolist()] if count else []
    return list(range(kept))


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return the height and width of a frame whose shorter side becomes ``short_side`` pixels."""
    factor = short_side / min(height, width)
    return max(1, math.floor(height * factor + 0.5)), max(1, math.floor(width * factor + 0.5))


def find_videos(videos: str | Path | Sequence[str | Path]) -> dict[str, Path]:
    """Return ``{name: file}`` of a folder's videos, sorted, or of files as they are given.

    Hidden files of a folder, whose names begin with a dot, are none of its videos: macOS puts such twins beside files.

    Raises:
        DataError: there is none, or a file is missing or named twice.
    """
    if isinstance(videos, str | Path):
        folder = Path(videos)
        if folder.is_file():
            return {folder.name: folder}
        found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        files = sorted(path for path in found if not path.name.startswith("."))
        if not files:
            raise DataError(f"{folder} holds no video; looked for {', '.join(SUFFIXES)}")
        return {str(file.relative_to(folder)): file for file in files}
    named = {str(file): Path(file) for file in videos}
    if not named:
        raise DataError("no videos: the list is empty; give at least one file")
    if len(named) < len(videos):
        raise DataError(f"{len(videos) - len(named)} of the {len(videos)} videos are named twice; give each once")
    if missing := [name for name, file in named.items() if not file.is_file()]:
        raise DataError(f"{len(missing)} of the {len(named)} videos are no files, such as {missing[0]}")
    return named


def read_lines(path: str) -> list[str]:
    """Return the lines of a file that are not blank.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()  # some editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts file {path} cannot be read: {error}") from error
    return [line for line in lines if line.strip()]


def read_prompts(path: str | None) -> dict[str, str]:
    """Return ``{video: prompt}`` of a file whose lines are ``video<TAB>prompt``.

    Raises:
        DataError: the file is missing or a line has no tab.
    """
    if path is None:
        return {}
    pairs = [line.split("\t", 1) for line in read_lines(path)]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2:
            raise DataError(f"{path}, line {number}: expected video<TAB>prompt; got {pair[0]!r}")
    return {video.strip(): prompt.strip() for video, prompt in pairs}


def check_named(prompts: Mapping[str, str], files: Mapping[str, Path]) -> None:
    """Warn of prompts that name none of the videos.

    Raises:
        DataError: not one of them does.
    """
    if not (unknown := [name for name in prompts if name not in files]):
        return
    said = f"{len(unknown)} of {len(prompts)} prompts name no video, such as {unknown[0]!r}; a video here is named "
    said += f"{next(iter(files))!r}"
    if len(unknown) == len(prompts):
        raise DataError(said)
    warnings.warn(said, UserWarning, stacklevel=2)


def prompt_of(file: Path, name: str, prompts: dict[str, str]) -> str | None:
    """Return the prompt of a video: from the prompts file, else from the .txt beside it, else None.

    Raises:
        DataError: the .txt cannot be read.
    """
    beside = file.with_suffix(".txt")
    if name in prompts:
        return prompts[name]
    try:
        return beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt {beside} cannot be read: {error}") from error


def read_video(path: Path | str, *, frames: str = "all", short_side: int | None = None) -> Clip:
    """Read a video; only the frames that are kept, at the size they are kept, are in memory.

    Frames are upright, as players show them: turned by quarters and mirrored as the file says (its display matrix).

    Args:
        path: a file.
        frames: "all"; "first:N", the first N at most; or "uniform:N", N at most at equal distances, the first and last
            among them. The clip's frame rate is that of the frames kept.
        short_side: pixels to shrink the shorter side to (area averaging); None, or a smaller frame, keeps the size.

    Raises:
        DataError: the file is no video, has no frame, or breaks off before the first one.
        ConfigError: ``frames`` or ``short_side`` is not what it may be.
    """
    check_frames(frames)
    if short_side is not None and short_side < 1:
        raise ConfigError(f"short_side must be at least 1 pixel; got {short_side}")
    av = _av()
    path = Path(path)
    try:
        rate, wanted = _wanted(path, frames)
        kept = [_tensor(frame, short_side) for frame in _decoded(path, wanted)]
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path} cannot be read as a video: {error}") from error
    if not kept:
        raise DataError(f"{path} holds no video frame")
    if frames.startswith("uniform") and wanted is not None and len(wanted) > 1:
        rate *= (len(wanted) - 1) / (max(wanted) - min(wanted))
    return Clip(torch.stack(kept), rate)


def _av() -> Any:  # noqa: ANN401 - a module imported on use
    # Imported here, because the metrics' package imports this module.
    from latent_rewards.metrics.metric import require

    return require("av")


def _wanted(path: Path, frames: str) -> tuple[float, set[int] | None]:
    """Return the file's frame rate and the indices to keep, None for all."""
    with _av().open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{path} holds no video stream")
        rate = float(container.streams.video[0].average_rate or 0) or 25.0
    most = most_frames(frames)
    if most is None:
        return rate, None
    # What a header says of the number of frames is often missing and sometimes wrong: count them where it matters.
    count = sum(1 for _ in _decoded(path)) if frames.startswith("uniform") else most
    return rate, set(frame_indices(frames, count))


def _decoded(path: Path, wanted: set[int] | None = None) -> Iterator[Any]:
    """Yield the (wanted) frames of the first video stream; a file that breaks off ends there."""
    av = _av()
    last = max(wanted, default=-1) if wanted is not None else math.inf
    index = -1
    with av.open(str(path)) as container:
        try:
            for index, frame in enumerate(container.decode(video=0)):
                if wanted is None or index in wanted:
                    yield frame
                if index >= last:
                    return
        except av.error.FFmpegError:
            if index < 0:
                raise


def _tensor(frame: Any, short_side: int | None) -> Tensor:  # noqa: ANN401 - av.VideoFrame
    pixels = _upright(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1), frame).float() / 255
    height, width = pixels.shape[-2:]
    if short_side is None or min(height, width) <= short_side:
        return pixels
    size = scaled_size(height, width, short_side)
    return functional.interpolate(pixels[None], size, mode="area")[0].clamp(0, 1)


def _upright(pixels: Tensor, frame: Any) -> Tensor:  # noqa: ANN401 - av.VideoFrame
    """Return ``[3, H, W]`` as it is to be shown: column p of row q at column a p + c q of row b p + d q."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # something else beside the frame is of a kind that this PyAV has no name for
        return pixels.rot90(round(getattr(frame, "rotation", 0) / 90), (1, 2))
    if matrix is None:
        return pixels
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    across, down = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, across, down = pixels.transpose(1, 2), c, b
    return pixels.flip([axis for axis, sign in ((2, across), (1, down)) if sign < 0])


def encode_mp4(video: Tensor, fps: float = 8, scale: int = 1, *, lossless: bool = False) -> bytes:
    """Return a clip as H.264 (yuv420p) in MP4, which every browser plays.

    Args:
        video: ``[T, 3, H, W]`` in [0, 1]; values outside are clipped.
        fps: frames per second.
        scale: whole-number enlargement without smoothing; odd sizes are padded by repeating the border.
        lossless: keep every pixel as its 8-bit RGB value, at its own size; FFmpeg reads that, few browsers do.

    Raises:
        DataError: the shape is another, a value is not finite, ``fps`` is not positive and finite, or ``scale`` is no
            whole number from 1.
    """
    if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape:
        raise DataError(f"a clip is [T, 3, H, W]; got shape {tuple(video.shape)}")
    if not bool(torch.isfinite(video).all()):
        raise DataError("the clip holds NaN or infinity and cannot be encoded")
    if not 0 < fps < math.inf or scale < 1 or scale != int(scale):
        raise DataError(f"fps must be positive and finite, scale a whole number from 1; got fps={fps}, scale={scale}")
    av = _av()
    frames = video.detach().float().cpu().clamp(0, 1).repeat_interleave(int(scale), 2).repeat_interleave(int(scale), 3)
    height, width = frames.shape[2:]
    if not lossless:
        frames = functional.pad(frames, (0, width % 2, 0, height % 2), mode="replicate")
    pixels = (frames * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        encoder, layout, quality = ("libx264rgb", "rgb24", "0") if lossless else ("libx264", "yuv420p", "17")
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = pixels.shape[2], pixels.shape[1], layout
        stream.options = {"crf": quality, "preset": "medium", "threads": "1"}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
