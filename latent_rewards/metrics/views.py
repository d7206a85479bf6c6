"""What a metric is shown of a video: options that every metric takes, whatever its own.

    create_metric("quality.blur", frames="uniform:8", resize=(128, 128), batch_size=4, device="cuda")

``frames`` and ``resize`` change what is scored, and so the fingerprint. ``batch_size`` and ``device`` change how much
is scored at once and where, and no value. A metric with an option of one of these names keeps it for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from latent_rewards.contracts import ConfigError
from latent_rewards.metrics.metric import MetricInfo, as_values, hash_of_weights
from latent_rewards.video import frame_indices, most_frames, scaled_size

VIEW_OPTIONS = ("frames", "resize", "batch_size", "device")


@dataclass(frozen=True)
class View:
    """Which frames, at what size, how many videos at once, and where.

    Attributes:
        frames: "all"; "first:N", the first N at most; "uniform:N", N at most at equal distances, the first and last
            among them.
        resize: ``(height, width)``, or what the shorter side becomes; bilinear with antialiasing. None: as it is.
        batch_size: videos per call of the score, which bounds its memory; None: all of them.
        device: where the videos are moved; None: left where they are.
    """

    frames: str = "all"
    resize: int | Sequence[int] | None = None
    batch_size: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError when an option is outside what it may be."""
        most_frames(self.frames)
        sides = [self.resize] if isinstance(self.resize, int) else self.resize
        if sides is not None and not (_are_counts(sides) and (isinstance(self.resize, int) or len(sides) == 2)):
            raise ConfigError(f"resize must be (height, width) or a shorter side, pixels from 1; got {self.resize!r}")
        if self.batch_size is not None and not _are_counts([self.batch_size]):
            raise ConfigError(f"batch_size must be a whole number from 1; got {self.batch_size!r}")
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError, TypeError) as error:
                raise ConfigError(f"device {self.device!r} is not one that torch finds here: {error}") from error

    def options(self) -> dict[str, Any]:
        """Return what differs from showing everything, as JSON holds it."""
        resize = self.resize if self.resize is None or isinstance(self.resize, int) else list(self.resize)
        given = {"frames": self.frames, "resize": resize, "batch_size": self.batch_size, "device": self.device}
        return {name: value for name, value in given.items() if value not in (None, "all")}

    def check(self, info: MetricInfo, own_options: dict[str, Any]) -> None:
        """Raise ConfigError when a metric cannot be shown so little, or would not notice that it was.

        Args:
            info: of the metric.
            own_options: the metric's options as they were given, without defaults.
        """
        most = most_frames(self.frames)
        if most is not None and most < info.minimum_frames:
            raise ConfigError(
                f"metric {info.name!r} needs at least {info.minimum_frames} frames; frames={self.frames!r} keeps {most}"
            )
        if self.frames.startswith("uniform") and info.needs_fps and "fps" not in own_options:
            raise ConfigError(
                f"metric {info.name!r} depends on the frame rate, which frames={self.frames!r} changes: give fps, the "
                "rate of the frames that are kept, or use 'first:N'"
            )
        if self.batch_size is not None and not info.batch_invariant:
            raise ConfigError(
                f"metric {info.name!r} scores a batch as a whole, so batch_size={self.batch_size} would change its "
                "values; leave it out"
            )

    def of(self, videos: Tensor) -> Tensor:
        """``[B, T, C, H, W]`` -> what is shown of it, in the same layout."""
        if self.frames != "all":
            videos = videos[:, frame_indices(self.frames, videos.shape[1])]
        if self.resize is not None:
            height, width = videos.shape[-2:]
            size = scaled_size(height, width, self.resize) if isinstance(self.resize, int) else tuple(self.resize)
            flat = functional.interpolate(videos.flatten(0, 1), size, mode="bilinear", antialias=True)
            videos = flat.clamp(0, 1).unflatten(0, videos.shape[:2])
        return videos if self.device is None else videos.to(self.device)


@dataclass(frozen=True)
class ViewedScore:
    """The score of a metric behind a :class:`View`; called as the score is."""

    score: Callable[..., Any]
    view: View
    name: str

    @property
    def weights_hash(self) -> str:
        """That of the score."""
        return hash_of_weights(self.score)

    def __call__(self, videos: Tensor, **prompts: Sequence[str]) -> Any:  # noqa: ANN401 - what user code returns
        """``[B, T, C, H, W]`` -> B numbers."""
        size = self.view.batch_size or len(videos)
        if len(videos) <= size:
            return self.score(self.view.of(videos), **prompts)
        parts = []
        for start in range(0, len(videos), size):
            chunk = slice(start, start + size)
            shown = self.view.of(videos[chunk])
            returned = self.score(shown, **{name: texts[chunk] for name, texts in prompts.items()})
            values = as_values(returned, self.name, len(shown))
            parts.append(returned if isinstance(returned, Tensor) else values)  # a tensor may carry a gradient
        return torch.cat(parts)


def _are_counts(numbers: Sequence[Any]) -> bool:
    listed = isinstance(numbers, list | tuple)
    return listed and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)
