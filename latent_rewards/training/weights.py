"""A short text that changes with a network's weights: how two runs tell that they were given the same."""

from __future__ import annotations

import hashlib
import math

from torch import nn

DIGEST_LENGTH = 16


def weights_digest(module: nn.Module, *, without: str | None = None) -> str:
    """Return a hash of up to 1,024 values of each parameter and buffer: enough to notice other weights, and fast.

    Args:
        module: any.
        without: leaves out what has this in its name.
    """
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in module.state_dict().items():
        if without is not None and without in name:
            continue
        values = tensor.detach().flatten()
        values = values[:: math.ceil(max(1, len(values)) / 1024)].to("cpu").double()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:DIGEST_LENGTH]
