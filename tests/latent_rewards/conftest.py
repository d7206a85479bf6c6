"""A policy, a codec and metrics small enough to reason about, which another process can import too."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOYS = '''
import os
import torch
from torch import nn

PROMPTS = ["a", {"prompt": "bb"}, "ccc"]

class Rows:
    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def index_select(self, index):
        return Rows(self.values[index])

    def to(self, device):
        return self

class LinearPolicy(nn.Module):
    """mean = gain x + length of the prompt / 10; std 0.5, and 0 at the last step."""

    def __init__(self, gain=0.5):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def encode(self, prompts):
        return Rows(torch.tensor([float(len(p if isinstance(p, str) else p["prompt"])) for p in prompts]))

    def latent_shape(self, condition):
        return (2, 3, 4, 4)

    def timesteps(self, num_steps):
        return [1 - k / num_steps for k in range(num_steps)]

    def transition(self, latents, step, num_steps, condition):
        mean = self.gain * latents + condition.values[:, None, None, None, None] / 10
        return mean, torch.tensor(0.5 if step + 1 < num_steps else 0.0)

class Codec:
    """Pixels are a sigmoid of the latents' mean; latents are two copies of the pixels' mean."""

    fingerprint = "toy-codec"

    def __init__(self):
        self.batch_sizes = []

    def decode(self, latents):
        self.batch_sizes.append(len(latents))
        return torch.sigmoid(latents.mean(1, keepdim=True)).expand(-1, 3, -1, -1, -1).transpose(1, 2).contiguous()

    def encode(self, videos):
        if videos.shape[-1] % 4:
            raise ValueError("sides must be multiples of 4")
        return videos.mean(2)[:, None].expand(-1, 2, -1, -1, -1).contiguous()

def level(videos, *, limit=2.0, crash=2.0):
    """The mean pixel; raises above one limit and kills its process above another."""
    values = videos.flatten(1).mean(1)
    if float(values.max()) > crash:
        os._exit(7)
    if float(values.max()) > limit:
        raise ValueError("too bright")
    return values

def words(videos, *, prompts):
    return [float(len(prompt)) for prompt in prompts]
'''


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys_of_tests.py").write_text(TOYS)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("toys_of_tests")
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def toy_folder(toys: ModuleType) -> Path:
    return Path(toys.__file__).parent
