"""Clips and a registry that forgets what a test registered."""

from collections.abc import Iterator

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
