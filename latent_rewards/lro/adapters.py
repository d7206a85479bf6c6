"""LoRA adapters (Hu et al., 2106.09685) as what is tuned of a policy: few parameters, and no reference of its own.

They are put in when a trainer is made and added to the weights when it has trained, so that the policy is then what it
was before: a module with the same parameters, of other values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from latent_rewards.contracts import ConfigError
from latent_rewards.lro.reference import adapter_layers
from latent_rewards.training.precision import widened
from latent_rewards.training.randomness import derive_seed
from latent_rewards.training.torchvision_guard import mend_torchvision


class Adapters:
    """Adapters in every linear layer of a module; nothing else of it is trained until they are merged.

    Args:
        module: gets them in place, and computes what it did.
        rank: of each, at least 1.
        seed: of their first weights.

    Raises:
        ConfigError: the module has no linear layer, adapters already, or is trained in part only.
    """

    def __init__(self, module: nn.Module, rank: int, seed: int) -> None:
        self.module = module
        self._trained = [parameter.requires_grad for parameter in module.parameters()]
        # Attention of torch's own reads the weight of its output layer past the layer itself.
        fused = {f"{name}.out_proj" for name, part in module.named_modules() if isinstance(part, nn.MultiheadAttention)}
        linear = [n for n, layer in module.named_modules() if isinstance(layer, nn.Linear) and n not in fused]
        if not linear:
            raise ConfigError(f"adapter_rank={rank}: {type(module).__name__} has no nn.Linear; leave it None")
        if adapter_layers(module) or len(set(self._trained)) > 1:
            raise ConfigError(
                f"adapter_rank={rank} would freeze all but new adapters, but {type(module).__name__} already trains a "
                f"part of itself ({sum(self._trained)} of {len(self._trained)} parameters); leave it None"
            )
        self._add(linear, rank, seed)

    def _add(self, linear: list[str], rank: int, seed: int) -> None:
        mend_torchvision()
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import cast_adapter_dtype

        with torch.random.fork_rng():  # peft freezes all else
            torch.manual_seed(derive_seed(seed, "lro/adapters", 0))
            exactly = "|".join(map(re.escape, linear))
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly), self.module)
        for layer in adapter_layers(self.module):
            if layer.get_base_layer().weight.dtype == torch.float64:
                layer.double()
        cast_adapter_dtype(self.module, "default")  # at first it is the base's

    def merge(self) -> None:
        """Add the adapters to the weights, and take them off.

        A module in 16 bits is in float32 then: in 16, most of what the adapters learnt would be lost.
        """
        widened(self.module)
        for _, layer in self._wrapped():
            layer.merge()
        self.remove()

    def remove(self) -> None:
        """Put the layers back in their places, and train what was trained before."""
        wrapped = self._wrapped()
        for path, layer in wrapped:
            parent, _, child = path.rpartition(".")
            setattr(self.module.get_submodule(parent), child, layer.get_base_layer())
        if wrapped:
            del self.module.peft_config
        for parameter, trained in zip(self.module.parameters(), self._trained, strict=True):
            parameter.requires_grad_(trained)

    def _wrapped(self) -> list[tuple[str, Any]]:
        return [(path, layer) for path, layer in self.module.named_modules() if hasattr(layer, "get_base_layer")]


@contextmanager
def removed_on_error(adapters: Adapters | None) -> Iterator[None]:
    """Leave a policy as it was where its trainer cannot be made."""
    try:
        yield
    except BaseException:
        if adapters is not None:
            adapters.remove()
        raise
