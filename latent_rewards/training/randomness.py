"""Stateless randomness: every number is a function of (seed, stage, step, global sample index).

Nothing draws from a global generator, so resuming, another batch size or another number of ranks changes no sample.
What is not ours and does (dropout, a user's metric) finds one that depends on the step: :func:`own_randomness`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from latent_rewards.training.devices import moved


def derive_seed(seed: int, stage: str, step: int, index: int = 0) -> int:
    """Return a 63-bit seed, a BLAKE2b hash of the four arguments."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, stage: str, step: int, index: int = 0) -> torch.Generator:
    """Return a CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, stage, step, index))


@contextmanager
def own_randomness(seed: int, stage: str, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """In the block, seed torch's global generators from the arguments; after it, they are as they were before.

    Args:
        seed: of the run.
        stage: its name.
        step: of the stage.
        rank: each process draws other numbers.
        device: whose generator is meant, beside the CPU's.
    """
    number, has_generator = derive_seed(seed, f"{stage}/global", step, rank), device.type not in ("cpu", "meta")
    forked = {"devices": [device], "device_type": device.type} if has_generator else {"devices": []}
    with torch.random.fork_rng(**forked):
        torch.random.default_generator.manual_seed(number)
        if has_generator:
            torch.get_device_module(device.type).manual_seed(number)
        yield


def sample_noise(
    seed: int,
    stage: str,
    step: int,
    indices: Sequence[int],
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return standard normal noise ``[len(indices), *shape]``, one independent stream per global sample index.

    The numbers are drawn in float32 on the CPU and then cast, so that they are the same on every device.
    """
    noise = torch.empty(len(indices), *shape)
    for row, index in enumerate(indices):
        noise[row] = torch.randn(tuple(shape), generator=generator(seed, stage, step, int(index)))
    return moved(noise, device, dtype)


def sample_uniform(seed: int, stage: str, step: int, indices: Sequence[int]) -> Tensor:
    """Return float64 numbers ``[len(indices)]``, uniform in [0, 1), one per global sample index."""
    values = [torch.rand((), generator=generator(seed, stage, step, int(i)), dtype=torch.float64) for i in indices]
    return torch.stack(values) if values else torch.empty(0, dtype=torch.float64)


def sample_index(seed: int, stage: str, step: int, count: int) -> int:
    """Return one integer in ``[0, count)``: the same on every rank, for choices a whole batch shares."""
    return int(torch.randint(count, (), generator=generator(seed, stage, step)))
