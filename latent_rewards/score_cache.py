"""Scores on disk, so that no video is scored twice by the same metric.

One small JSON file per metric and video, named by the sha256 of what the score depends on: the metric's fingerprint,
the video's shape, dtype and bytes, and the prompt if the metric takes prompts. A file is written beside its place and
renamed into it, so writers may be many and may be killed. An entry carries its own checksum; one that is damaged is
ignored with a warning and written again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, Prompt, prompt_text


class ScoreCache:
    """A folder of scores.

    Args:
        folder: made if it is missing; any number of processes may use it at once.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache_dir {self.folder} cannot be used: {error}") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ConfigError(f"cache_dir {self.folder} cannot be written; give another folder")

    def keys(self, metric: Any, videos: Sequence[str], prompts: Sequence[Prompt]) -> list[str] | None:  # noqa: ANN401
        """Return one key per video, or None for a metric whose scores must not be kept.

        Those are metrics that are not deterministic, that score a video by its batch, or that do not say so; and
        objects of which only the class has a name, for their state is not in their fingerprint.

        Args:
            metric: what scores.
            videos: digests of :func:`tensor_digests`.
            prompts: one per video.
        """
        if not (getattr(metric, "deterministic", False) and getattr(metric, "batch_invariant", False)):
            return None
        if not getattr(metric, "origin", ""):
            return None
        texts = [prompt_text(prompt) for prompt in prompts] if metric.needs_prompt else [None] * len(videos)
        return [_sha256([metric.fingerprint, *pair]) for pair in zip(videos, texts, strict=True)]

    def read(self, keys: Sequence[str]) -> Tensor | None:
        """Return the scores ``float32 [B]`` of the keys, or None unless all of them are there.

        All or none: a metric's last digits may depend on how many videos it is given, and a batch of which a part was
        scored before must give what the whole batch gives.
        """
        values = []
        for key in keys:
            value = self._read(key)
            if value is None:
                return None
            values.append(value)
        return torch.tensor(values, dtype=torch.float32)

    def write(self, keys: Sequence[str], values: Tensor) -> None:
        """Keep scores ``[B]``; a disk that refuses them costs a warning, not the scores."""
        for key, value in zip(keys, values.tolist(), strict=True):
            path = self._path(key)
            content = json.dumps(_entry(key, value))
            partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
            try:
                path.parent.mkdir(exist_ok=True)
                partial.write_text(content, encoding="utf-8")
                os.replace(partial, path)
            except OSError as error:
                warnings.warn(f"the score cache {self.folder} cannot be written: {error}", stacklevel=2)
                return

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.json"

    def _read(self, key: str) -> float | None:
        path = self._path(key)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            value = math.nan if content["value"] is None else float(content["value"])
            whole = content == _entry(key, value)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            whole, value = False, math.nan
        if not whole:
            warnings.warn(f"{path} is damaged: the score is computed again and the file replaced", stacklevel=2)
            return None
        return value


def _sha256(content: Any) -> str:  # noqa: ANN401 - anything JSON can write
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _entry(key: str, value: float) -> dict[str, Any]:
    content = {"key": key, "value": None if math.isnan(value) else value}
    return {**content, "sha256": _sha256(content)}
