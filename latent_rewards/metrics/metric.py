"""The contract of a metric: pixel videos in, one number per video out.

A metric may be any Python. What surrounds it is fixed: videos are float32 ``[B, T, C, H, W]`` in [0, 1] and the answer
is real numbers ``[B]``. Both sides are checked on every call, because a shape that broadcasts or a range that drifts
would otherwise surface as a silently wrong reward. A metric's fingerprint is a hash of what its values depend on: its
name, version, options and weights.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latent_rewards.contracts import (
    ConfigError,
    DataError,
    MetricError,
    MetricOutputError,
    Prompt,
    check_prompts,
    prompt_text,
    unknown_name,
)

ROUNDING = 1e-6
"""How far, relative to the bound, float32 rounding may push a value beyond its range before it is an error."""

PLACES = frozenset({"weights", "frames_per_batch", "device", "batch_size"})
"""Options that say where something is or how much of it is done at once: they change no value, so no fingerprint."""

CHEATS = ("still", "grey", "noise")
"""Clips that nobody wants; :func:`~latent_rewards.metrics.checks.cheating_clips` makes them."""

EXTRAS = {"av": "metrics", "cv2": "metrics", "skimage": "metrics"}
"""Optional module -> the extra of this distribution that brings it."""


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """What a metric says of itself.

    Attributes:
        name: what it is created by.
        version: changed by its author whenever its values change.
        value_range: ``(low, high)``, inclusive, either may be infinite; ``None`` is unknown.
        higher_is_better: the direction of improvement.
        needs_prompt: whether it is given the prompts; one that does not need them never receives them.
        deterministic: the same videos give the same values.
        differentiable: ``score`` carries a gradient to the videos (a call of the metric itself never does).
        minimum_frames: the fewest frames ``T`` it can score.
        needs_fps: its values depend on the frame rate, which it takes as the option ``fps``.
        batch_invariant: a video's value does not depend on the others in its batch.
        may_be_nan: it may answer NaN, "does not apply to this video".
        description: one sentence.
        licence: of the code and weights behind it.
        requires: modules it imports that may be missing.
        install: a command that brings them; made of :data:`EXTRAS` where none is given.
        weights: names of the weight files it wants.
        cheats: which of :data:`CHEATS` score at least as well as the real clips they stand for: it must not be the only
            reward.
    """

    name: str
    version: str = "0"
    value_range: tuple[float, float] | None = None
    higher_is_better: bool = True
    needs_prompt: bool = False
    deterministic: bool = True
    differentiable: bool = False
    minimum_frames: int = 1
    needs_fps: bool = False
    batch_invariant: bool = True
    may_be_nan: bool = False
    description: str = ""
    licence: str = ""
    requires: tuple[str, ...] = ()
    install: str = ""
    weights: tuple[str, ...] = ()
    cheats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ConfigError when a field is outside what it may be."""
        if not isinstance(self.name, str) or not self.name.strip():
            raise ConfigError(f"a metric needs a name; got {self.name!r}")
        if not isinstance(self.version, str) or not self.version.strip():
            raise ConfigError(f"metric {self.name!r}: version must be a non-empty text; got {self.version!r}")
        if not isinstance(self.minimum_frames, int) or self.minimum_frames < 1:
            raise ConfigError(f"metric {self.name!r}: minimum_frames must be at least 1; got {self.minimum_frames!r}")
        if self.value_range is not None:
            low, high = (float(bound) for bound in self.value_range)
            if not low < high:
                raise ConfigError(f"metric {self.name!r}: value_range must be (low, high); got {self.value_range!r}")
            object.__setattr__(self, "value_range", (low, high))
        for label in ("requires", "weights", "cheats"):
            listed = getattr(self, label)
            if isinstance(listed, str) or not all(isinstance(entry, str) and entry for entry in listed):
                raise ConfigError(f"metric {self.name!r}: {label} must be a tuple of names; got {listed!r}")
            object.__setattr__(self, label, tuple(listed))
        if unknown := set(self.cheats) - set(CHEATS):
            raise ConfigError(unknown_name(f"cheating clip of metric {self.name!r}:", min(unknown), CHEATS))
        extras = {EXTRAS[module] for module in self.requires if module in EXTRAS}
        if extras and not self.install:
            object.__setattr__(self, "install", install_command(extras))


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric(MetricInfo):
    """A metric ready to be called.

    Attributes:
        score: the function behind it, ``(videos)`` or ``(videos, *, prompts)`` -> B numbers; unchecked.
        options: everything it was configured with, defaults included.
        origin: the module that registers or defines it; what a child process imports to make it again.
        recreatable: its name and options make it again once ``origin`` is imported; not so for what
            :func:`~latent_rewards.metrics.http_metric` and its like return: nothing is registered under that name.
    """

    score: Callable[..., Any] = field(repr=False)
    options: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    recreatable: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError when an option has no stable text, without which there is no fingerprint."""
        super().__post_init__()
        self._options_text()

    def __call__(self, videos: Tensor, prompts: Sequence[Prompt] | None = None) -> Tensor:
        """Score videos.

        Args:
            videos: float32 ``[B, T, C, H, W]`` in [0, 1], C of 1 or 3.
            prompts: B prompts; ignored by a metric that does not need them.

        Returns:
            float32 ``[B]``, detached, on the videos' device.

        Raises:
            DataError: the videos or prompts cannot be scored as they are.
            MetricError: the metric raised (chained from what it raised), or wrote into the videos.
            MetricOutputError: what it returned breaks the contract.
        """
        self._check_videos(videos)
        texts = self._check_prompts(prompts, len(videos)) if self.needs_prompt else None
        with torch.no_grad():
            given = videos.detach().contiguous()
            before = _contents(given)
            values = self._check_values(self._run(given, texts), len(videos))
            if _contents(given) != before:
                raise MetricError(f"metric {self.name!r} changes the videos it is given; it must work on a copy")
            return values.to(videos.device)

    def _run(self, videos: Tensor, texts: list[str] | None) -> Any:  # noqa: ANN401 - what user code returns
        try:
            return self.score(videos) if texts is None else self.score(videos, prompts=texts)
        except MetricError:
            raise
        except Exception as error:
            raise MetricError(
                f"metric {self.name!r} raised {type(error).__name__} on {len(videos)} video(s): {error}"
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """``name@version#hash``; two configurations of one metric differ, and so do two sets of weights.

        Where weights lie and where they are computed with (:data:`PLACES`) is not part of it.
        """
        text = f"{self.name}\n{self.version}\n{self._options_text(without=PLACES)}\n{hash_of_weights(self.score)}"
        return f"{self.name}@{self.version}#{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def info(self) -> dict[str, Any]:
        """The fields of :class:`MetricInfo`, JSON-able, without options."""
        return {entry.name: getattr(self, entry.name) for entry in fields(MetricInfo)}

    def _options_text(self, without: frozenset[str] = frozenset()) -> str:
        def encode(value: object) -> object:
            try:
                return _stable(value)
            except TypeError as error:
                raise ConfigError(f"metric {self.name!r}: {error}") from error

        options = {name: value for name, value in self.options.items() if name not in without}
        return json.dumps(options, sort_keys=True, default=encode)

    def _check_videos(self, videos: Tensor) -> None:
        if not isinstance(videos, Tensor):
            raise DataError(f"metric {self.name!r} takes a tensor [B, T, C, H, W]; got {type(videos).__name__}")
        shape = tuple(videos.shape)
        if videos.ndim != 5 or not all(shape):
            raise DataError(f"metric {self.name!r} takes videos [B, T, C, H, W], none of them empty; got shape {shape}")
        if shape[2] not in (1, 3):
            hint = "; [B, C, T, H, W] must be permuted" if shape[1] in (1, 3) else ""
            raise DataError(f"metric {self.name!r} takes [B, T, C, H, W] with C of 1 or 3; got shape {shape}{hint}")
        if videos.dtype != torch.float32:
            raise DataError(f"metric {self.name!r} takes float32 videos in [0, 1]; got {videos.dtype}")
        if shape[1] < self.minimum_frames:
            raise DataError(f"metric {self.name!r} needs at least {self.minimum_frames} frames; got {shape[1]}")
        low, high = (float(bound) for bound in videos.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise DataError(f"metric {self.name!r} takes finite values in [0, 1]; got {low:g} to {high:g}; clamp them")

    def _check_prompts(self, prompts: Sequence[Prompt] | None, count: int) -> list[str]:
        if prompts is None:
            raise DataError(f"metric {self.name!r} needs the prompts: call it as metric(videos, prompts)")
        texts = [prompt_text(prompt) for prompt in check_prompts(prompts)]
        if len(texts) != count:
            raise DataError(f"metric {self.name!r} got {len(texts)} prompts for {count} videos; give one for each")
        return texts

    def _check_values(self, returned: object, count: int) -> Tensor:
        values = as_values(returned, self.name, count)
        if torch.isinf(values).any():
            raise MetricOutputError(f"metric {self.name!r} returned infinity for samples {_where(values.isinf())}")
        missing = values.isnan()
        if missing.any() and not self.may_be_nan:
            raise MetricOutputError(
                f"metric {self.name!r} returned NaN for samples {_where(missing)}; "
                "register it with may_be_nan=True if NaN means 'does not apply'"
            )
        if self.value_range is None:
            return values
        low, high = self.value_range
        outside = (values < low - _slack(low)) | (values > high + _slack(high))
        if outside.any():
            worst = ", ".join(f"{value:g}" for value in values[outside][:4].tolist())
            raise MetricOutputError(
                f"metric {self.name!r} promises values in [{low:g}, {high:g}] and returned {worst} "
                f"for samples {_where(outside)}"
            )
        return values.clamp(low, high)


def install_command(extras: Iterable[str]) -> str:
    """Return the command that installs this distribution with ``extras``."""
    return f"pip install 'latent-rewards[{','.join(sorted(extras))}]'"


def require(module: str, *, extra: str = "metrics") -> ModuleType:
    """Import an optional library when a metric first uses it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed here: {install_command([extra])} ({error})") from error


def as_values(returned: object, name: str, count: int) -> Tensor:
    """Return what a score returned as float32 ``[count]``, detached.

    Raises:
        MetricOutputError: it is not ``count`` real numbers; nothing is broadcast or squeezed.
    """
    expected = f"expected {count} real numbers as a tensor, array or list of shape ({count},)"
    if not isinstance(returned, Tensor | np.ndarray | list | tuple):
        got = "nothing (None)" if returned is None else f"a {type(returned).__name__}"
        raise MetricOutputError(f"metric {name!r} returned {got}; {expected}")
    try:
        if isinstance(returned, Tensor):
            values = returned.detach()
        else:
            listed = returned if isinstance(returned, np.ndarray) else [_number(value) for value in returned]
            values = torch.from_numpy(np.array(listed, order="C"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise MetricOutputError(f"metric {name!r} returned something that is not numbers; {expected}") from error
    if tuple(values.shape) != (count,):
        raise MetricOutputError(f"metric {name!r} returned shape {tuple(values.shape)}; {expected}")
    if values.is_complex():
        raise MetricOutputError(f"metric {name!r} returned complex numbers ({values.dtype}); {expected}")
    return values.to(torch.float32)


def _contents(videos: Tensor) -> list[int]:
    """Return numbers that change with what is written into videos, by torch or past it; float32, contiguous."""
    bits, sums = videos.view(torch.int32), []
    for axis in (1, 3, 4):  # each place along time, height and width counts differently: a mirrored clip is another
        along = bits.sum(dim=[dim for dim in range(bits.ndim) if dim != axis], dtype=torch.int64)
        sums.append((along * torch.arange(1, len(along) + 1, device=along.device)).sum())
    return [0 if videos.is_inference() else videos._version, *torch.stack(sums).tolist()]


def _number(value: object) -> object:
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else value.detach().cpu().numpy()
    return value


def _where(mask: Tensor) -> str:
    indices = mask.nonzero()[:, 0].tolist()
    return f"{indices[:8]}" + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")


def _slack(bound: float) -> float:
    return 0.0 if math.isinf(bound) else ROUNDING * max(1.0, abs(bound))


def _stable(value: object) -> object:
    """Return something JSON can write that is equal for equal configurations; TypeError when there is no such thing."""
    own = getattr(value, "fingerprint", None) or getattr(value, "weights_hash", None)
    if isinstance(own, str):
        return own
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, nn.Module):
        return _module_hash(value)
    if isinstance(value, Tensor):
        return _bytes_hash(value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return _bytes_hash(torch.from_numpy(np.ascontiguousarray(value)))
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    raise TypeError(
        f"an option of type {type(value).__name__} has no stable text for the fingerprint; give the object an "
        "attribute `fingerprint` (a text that changes when it does), or pass a path or name instead"
    )


def _bytes_hash(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw).hexdigest()


def _module_hash(module: nn.Module) -> str:
    state = {name: _bytes_hash(value) for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def hash_of_weights(score: object) -> str:
    """Return what a score declares as ``weights_hash``, else the hash of the torch modules it is or holds."""
    target = getattr(score, "func", score)
    declared = getattr(target, "weights_hash", "")
    if isinstance(declared, str) and declared:
        return declared
    if isinstance(target, nn.Module):
        return _module_hash(target)
    return "".join(
        _module_hash(held) for held in getattr(target, "__dict__", {}).values() if isinstance(held, nn.Module)
    )
