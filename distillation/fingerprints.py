"""Hashes of weights that survive being stored in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def add_weights(digest: Any, weights: Mapping[str, Tensor]) -> None:  # noqa: ANN401 - hashlib's objects have no type
    """Add names, shapes and values, rounded to bfloat16, to a hash, in the order of the names."""
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).reshape(-1).view(torch.uint8).numpy().tobytes())
