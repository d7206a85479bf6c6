"""Video files + codec + metrics -> RewardDataset.

The pixels of the files are scored, not what the codec makes of them; the codec's latents are what a proxy learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from latent_rewards.collect import begin_part, run_with
from latent_rewards.collection import Collection, Outcome
from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.dataset import RewardDataset
from latent_rewards.oracle import MetricOracle, PendingScores
from latent_rewards.video import Clip, check_frames, check_named, find_videos, prompt_of, read_prompts, read_video


def collect_videos(
    videos: str | Path | Sequence[str | Path],
    oracle: MetricOracle,
    *,
    prompts: Mapping[str, str] | str | Path | None = None,
    output_dir: str | Path | None = None,
    frames: str = "all",
    short_side: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> RewardDataset:
    """Encode existing videos with the oracle's codec and score their pixels with its metrics.

    Resumable, shared by ranks and helped by workers like :func:`latent_rewards.collect_rewards`. All videos must have
    the number of frames and the size of the first one that can be used; a file that has not, or that cannot be read,
    is left out and listed in ``dataset.failures``, however many they are.

    Args:
        videos: a folder, searched for videos at any depth, or files. A video's name is its path below the folder, or
            the path as given.
        oracle: codec and metrics. A metric that depends on the frame rate must have been made with the files'.
        prompts: ``{name: prompt}``, or a file of lines ``name<TAB>prompt``; a video that is not in it has the prompt of
            the .txt beside it, else an empty one. Names of no video are warned of.
        output_dir: folder to collect into, or None to keep everything in memory.
        frames: "all", "first:N" or "uniform:N"; see :func:`latent_rewards.video.read_video`.
        short_side: pixels to shrink the shorter side to before encoding and scoring; None keeps the size.
        batch_size: videos per batch, in memory at once, and per stored part.
        progress: draw a progress bar.

    Raises:
        ConfigError: a number is out of range, or ``output_dir`` holds a collection with other settings.
        DataError: there is no video, none can be used, or the prompts cannot be read or name none of the videos.
        MetricError: every video failed, or the first 16 that could be used.
        RankError: another process of the launch failed.
        CheckpointError: a stored part is damaged.
    """
    check_frames(frames)
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; got {batch_size}")
    files = find_videos(videos)
    names, texts = list(files), _prompts_of(files, prompts)
    shape = _first_shape(files, oracle, frames, short_side)
    unusable: set[int] = set()

    def begin(indices: list[int]) -> Callable[[], Outcome]:
        kept: list[int] = []
        pixels: list[Tensor] = []
        latents: list[Tensor] = []
        failures: dict[int, str] = {}
        for index in indices:
            try:
                unusable.add(index)  # until it is known to be like the others
                clip = read_video(files[names[index]], frames=frames, short_side=short_side)
                _check_shape(clip, shape)
                unusable.remove(index)
                _check_scorable(clip, texts[index], oracle)
                latents.append(_encode(oracle, clip))
            except Exception as error:  # a codec is user code and may raise anything
                failures[index] = f"{names[index]}: {type(error).__name__}: {error}"
            else:
                pixels.append(clip.frames)
                kept.append(index)
        if not kept:
            return lambda: (None, failures)
        stacked, chosen = torch.stack(pixels), [texts[index] for index in kept]

        def submit(rows: slice) -> PendingScores:
            return oracle.submit_videos(stacked[rows], chosen[rows])

        return begin_part(oracle, torch.cat(latents), chosen, kept, submit, failures)

    settings = {
        "videos": [[name, file.stat().st_size] for name, file in files.items()],
        "prompts": texts,
        "frames": frames,
        "short_side": short_side,
        "video_shape": list(shape),
        "batch_size": batch_size,
        "metrics": oracle.fingerprints,
        "latent_space": oracle.latent_space,
    }
    root = Path(output_dir) if output_dir is not None else None
    collection = Collection(len(names), batch_size, settings, root=root, progress=progress, unusable=unusable)
    return run_with(oracle, begin, collection)


def _prompts_of(files: Mapping[str, Path], prompts: Mapping[str, str] | str | Path | None) -> list[str]:
    stated = dict(prompts) if isinstance(prompts, Mapping) else read_prompts(None if prompts is None else str(prompts))
    check_named(stated, files)
    return [prompt_of(file, name, stated) or "" for name, file in files.items()]


def _first_shape(
    files: Mapping[str, Path], oracle: MetricOracle, frames: str, short_side: int | None
) -> tuple[int, ...]:
    """Return ``[T, 3, H, W]`` of the first video that can be read and encoded."""
    errors = []
    for name, file in files.items():
        try:
            clip = read_video(file, frames=frames, short_side=short_side)
            _encode(oracle, clip)
        except ConfigError:
            raise
        except Exception as error:  # a codec is user code and may raise anything
            errors.append(f"{name}: {error}")
        else:
            return tuple(clip.frames.shape)
    raise DataError(f"none of the {len(errors)} videos can be read and encoded; {errors[0]}")


@torch.no_grad()
def _encode(oracle: MetricOracle, clip: Clip) -> Tensor:
    return oracle.codec.encode(clip.frames[None]).detach()


def _check_shape(clip: Clip, shape: tuple[int, ...]) -> None:
    """Raise DataError when a clip is unlike the others."""
    if tuple(clip.frames.shape) != shape:
        frames, _, height, width = clip.frames.shape
        raise DataError(
            f"it has {frames} frames of {height} x {width}, the first video {shape[0]} of {shape[2]} x {shape[3]}; cut "
            "or scale the videos, or collect them apart"
        )


def _check_scorable(clip: Clip, text: str, oracle: MetricOracle) -> None:
    """Raise DataError when a metric cannot score a clip."""
    for metric in oracle.metrics.values():
        if getattr(metric, "needs_prompt", False) and not text:
            raise DataError(
                f"metric {metric.name!r} needs a prompt: put it beside the video as a .txt file, or pass one"
            )
        rate = getattr(metric, "options", {}).get("fps") if getattr(metric, "needs_fps", False) else None
        if rate is not None and abs(float(rate) - clip.fps) > 0.01 * clip.fps:
            raise DataError(
                f"it has {clip.fps:g} frames a second, and metric {metric.name!r} was made for {float(rate):g}; make "
                f"it with fps={clip.fps:g}"
            )
