"""Clips, a registry that forgets what a test registered, and the inputs of golden files as arithmetic.

``hashed`` and its two users are part of the golden files' provenance: originals were run on the same numbers.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from latent_rewards.metrics import list_metrics, registry
from latent_rewards.metrics.checks import cheating_clips, moving_textures


@pytest.fixture(autouse=True)
def _restore_registry() -> Iterator[None]:
    list_metrics()
    before = dict(registry._DEFINITIONS)
    yield
    registry._DEFINITIONS.clear()
    registry._DEFINITIONS.update(before)


@pytest.fixture(scope="session")
def textures() -> Tensor:
    return moving_textures(3, num_frames=9, seed=3)


@pytest.fixture(scope="session")
def cheats(textures: Tensor) -> dict[str, Tensor]:
    return cheating_clips(textures, seed=1)


@pytest.fixture
def videos() -> Tensor:
    return torch.rand(4, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def hashed(count: int, salt: str) -> np.ndarray:
    """uint64 numbers below 2^32, which depend on nothing but the arguments."""
    place = np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(zlib.crc32(salt.encode()))
    mixed = place % np.uint64(2**32)
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> np.uint64(16))) * np.uint64(0x45D9F3B)) % np.uint64(2**32)
    return mixed ^ (mixed >> np.uint64(16))


@pytest.fixture(scope="session")
def formula_weights() -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """For a state dict, other values of the same shapes: a network that tells inputs apart."""

    def weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, old in state.items():
            values = torch.from_numpy(hashed(old.numel(), name) / 2.0**32 - 0.5).reshape(old.shape)
            if old.ndim == 0:
                values = torch.tensor(3.0)
            elif old.ndim > 1:
                values = values * 3.5 / math.sqrt(old[0].numel())
            else:
                gain = ("norm" in name or "ln_" in name) and name.endswith("weight")
                values = 0.2 * values + float(gain)
            made[name] = values.float()
        return made

    return weights


@pytest.fixture(scope="session")
def formula_frames() -> Callable[[int, int, int], Tensor]:
    """``(count, height, width)`` -> uint8 ``[count, 3, height, width]``: edges, slopes and noise."""

    def frames(count: int, height: int, width: int) -> Tensor:
        y, x, k = np.mgrid[:height, :width, : 3 * count].astype(np.int64)
        noise = hashed(y.size, f"{height}x{width}").astype(np.int64).reshape(y.shape)
        values = (x * (3 + k % 5) + y * (7 - k % 4) + x * y * (k % 3) // 40 + noise % 64) % 256
        return torch.from_numpy(values.astype(np.uint8)).unflatten(2, (count, 3)).permute(2, 3, 0, 1).contiguous()

    return frames
