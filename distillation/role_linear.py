"""The linear layer of a shared base: one adapter at a time, added by the product that makes it.

peft's layer writes the product of an adapter, scales it (here by 1), and adds it: three passes over numbers as many as
the base's own output, where one will do.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from latent_rewards.training.torchvision_guard import mend_torchvision

mend_torchvision()  # before what imports torchvision

from peft.tuners.lora import Linear  # noqa: E402


class RoleLinear(Linear):
    """peft's linear layer with adapters of scale 1, without dropout, of which at most one is on."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``, plus ``(x A^T) B^T`` of the adapter that is on, ``[..., out]``, in the base's dtype."""
        if self.merged:
            return super().forward(x)
        if self.disable_adapters:
            plain: Tensor = self.base_layer(x)
            return plain
        (name,) = self.active_adapters
        first, second = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        rows = x.reshape(-1, x.shape[-1])
        made: Tensor = self.base_layer(rows)
        # Under autocast the input is read as it comes; made float32 first, it would be rounded again.
        read = rows if torch.is_autocast_enabled(x.device.type) else rows.to(first.weight.dtype)
        made.addmm_(first(read).to(made.dtype), second.weight.t().to(made.dtype))
        return made.reshape(*x.shape[:-1], made.shape[-1])
