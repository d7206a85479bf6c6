"""Which policy the KL is measured to: a frozen copy, one that follows, or the policy itself with its adapters off."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from latent_rewards.contracts import Condition, ConfigError, Policy, Prompt

_ADAPTER_CLASSES = (
    ("peft.tuners.tuners_utils", "BaseTunerLayer"),
    ("peft.utils.other", "AuxiliaryTrainingWrapper"),
)


def adapter_layers(module: nn.Module) -> list[Any]:
    """Return the layers of ``module`` that peft can switch off: adapters, and modules trained beside their original."""
    # A policy that holds such layers was made by peft, so there is nothing to import, which would be slow.
    loaded = [(sys.modules.get(name), kind) for name, kind in _ADAPTER_CLASSES]
    kinds = tuple(getattr(source, kind) for source, kind in loaded if hasattr(source, kind))
    return [layer for layer in module.modules() if isinstance(layer, kinds)]


def only_adapters_train(module: nn.Module) -> bool:
    """Return whether switching adapters off leaves none of the parameters that are trained."""
    layers = adapter_layers(module)
    if not layers:
        return False
    bases = [layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module for layer in layers]
    base = {id(parameter) for part in bases for parameter in part.parameters()}
    adapters = {id(parameter) for layer in layers for parameter in layer.parameters()} - base
    return all(id(parameter) in adapters for parameter in module.parameters() if parameter.requires_grad)


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Run the block without the module's adapters; after it, or an error in it, all is as before.

    peft freezes adapters that it switches off and unfreezes all those that it switches on, so that which parameters
    are trained is restored too.
    """
    layers = [layer for layer in adapter_layers(module) if not layer.disable_adapters]
    trained = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


class AdaptersOff:
    """A policy without its adapters, as a reference that needs no second copy of the weights.

    It is what the adapters were added to. A policy whose adapters did something already starts away from it; pass a
    copy as the reference to hold such a policy to where it starts.

    Args:
        policy: an ``nn.Module`` that is a Policy and holds peft layers.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def module(self) -> nn.Module:
        """The policy."""
        assert isinstance(self._policy, nn.Module)  # noqa: S101 - for the type checker; the trainer refuses others
        return self._policy

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return the policy's condition."""
        return self._policy.encode(prompts)

    def latent_shape(self, condition: Condition) -> tuple[int, int, int, int]:
        """Return the policy's ``(C, F, H, W)``."""
        return self._policy.latent_shape(condition)

    def timesteps(self, num_steps: int) -> Sequence[float]:
        """Return the policy's times."""
        return self._policy.timesteps(num_steps)

    def transition(self, latents: Tensor, step: int, num_steps: int, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return the policy's transition without adapters."""
        with adapters_off(self.module):
            return self._policy.transition(latents, step, num_steps, condition)


def default_reference(policy: Policy) -> Policy:
    """Return the policy with its adapters off if they are all that is trained, else a copy of it."""
    if isinstance(policy, nn.Module) and only_adapters_train(policy):
        return AdaptersOff(policy)
    return copy.deepcopy(policy)


def reference_for(
    policy: Policy, given: Policy | None, *, charged: bool, compared: bool, moves: bool, new_adapters: bool
) -> Policy | None:
    """Return the reference of a run: the given one, one that is made if there is a use for it, or None.

    Args:
        policy: what is tuned.
        given: what the user passed.
        charged: the KL to it is in the loss.
        compared: the reward compares samples with its.
        moves: it follows the policy.
        new_adapters: all that is trained are adapters that change nothing yet.

    Raises:
        ConfigError: it is the policy itself, or moves though samples are compared with its.
    """
    if given is policy:
        raise ConfigError("reference is the policy itself; pass a copy, or None to have one made")
    if compared and moves:
        raise ConfigError(
            "the reward's baselines are of the policy as it was, but sync_ref_model moves the reference; use "
            "sync_ref_model=False, or a Lagrangian without baselines"
        )
    if given is not None or not (charged or compared):
        return given
    # Adapters that did something before are a part of the policy as it was.
    return copy.deepcopy(policy) if compared and not new_adapters else default_reference(policy)


def check_differentiable(reference: Policy) -> None:
    """Check that gradients to the states can go through ``reference``.

    Raises:
        ConfigError: its adapters are off in the forward pass only, and checkpointing repeats that in the backward pass.
    """
    if isinstance(reference, AdaptersOff) and any(
        getattr(module, "gradient_checkpointing", False) is True for module in reference.module.modules()
    ):
        raise ConfigError(
            "kl='return' goes backwards through the reference, which is the policy with its adapters off; gradient "
            "checkpointing would repeat its forward pass with the adapters on: disable it, pass "
            "reference=copy.deepcopy(policy), or use kl='per_state'"
        )


class Following:
    """Moves a reference after its policy: ``reference <- alpha policy + (1 - alpha) reference`` (TR-DPO, 2404.09656).

    Args:
        policy: what is followed.
        reference: a module with the same parameters; changed in place.
        every: updates between moves.
        alpha: share of the policy, in (0, 1]; 1 replaces the reference.

    Raises:
        ConfigError: the reference has no weights of its own, or others than the policy.
    """

    def __init__(self, policy: nn.Module, reference: Policy, *, every: int, alpha: float) -> None:
        if isinstance(reference, AdaptersOff):
            raise ConfigError(
                "sync_ref_model moves a copy of the weights, but the reference is the policy with its adapters off; "
                "pass reference=copy.deepcopy(policy), or sync_ref_model=False"
            )
        shapes = [
            {name: parameter.shape for name, parameter in module.named_parameters()}
            for module in (policy, reference)
            if isinstance(module, nn.Module)
        ]
        if not isinstance(reference, nn.Module) or shapes[0] != shapes[1]:
            raise ConfigError(
                f"sync_ref_model needs a reference with the policy's parameters, but {type(reference).__name__} has "
                "others; leave reference=None, or use sync_ref_model=False"
            )
        self.policy, self.reference, self.every, self.alpha = policy, reference, every, alpha

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Move the reference if update ``step``, counted from 0, is one after which it moves."""
        if (step + 1) % self.every:
            return
        for mine, theirs in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), self.alpha)  # leaves equal numbers as they are, to the bit

    def state_dict(self) -> dict[str, Any]:
        """Return the reference's parameters."""
        return dict(self.reference.named_parameters())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, parameter in self.reference.named_parameters():
            parameter.copy_(state[name])
