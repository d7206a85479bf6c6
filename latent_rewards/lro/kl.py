"""The KL to the reference: which gradient it has, whose KL is charged, and at what price.

The objective is E[R] - beta E[sum_k KL_k] / D, KL_k of step k in nats and D latent dimensions. Its gradient has two
parts, the change of each KL_k where it was measured and the change of the states it is measured at:

    grad E[sum_k KL_k] = E[sum_k grad KL_k] + E[sum_j grad log p_j sum_{k>j} KL_k].

``kl="per_state"`` has the first part alone. ``kl="return"`` has both: estimators with score terms take the KL of later
steps off each step's advantage, and those that go through the chain measure the KL on the reparameterised chain.

A gate weighs the KL of each sample by a constant. What a step does to the gate itself is left out, except that score
terms cannot tell it from what the step does to the KL that the gate multiplies.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, DataError, Policy
from latent_rewards.lro.checks import check_finite
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.reference import AdaptersOff, Following, check_differentiable
from latent_rewards.lro.sampling import Batch
from latent_rewards.rollout import Chain, Trajectory, detached_chain, path_chain, path_kl, trajectory_kl
from latent_rewards.training.parts import HasStateDict
from latent_rewards.training.ranks import Ranks

ERROR_LIMIT, GAIN = 0.2, 0.1
"""The largest relative error an update of beta believes, and how much of it enters (Ziegler et al., section 2.2)."""

_AWAY = 1e-6
"""Nats per latent dimension that rounding does not explain."""


class AdaptiveBeta:
    """A price that rises while the KL is above its target and falls while it is below (Ziegler et al., 1909.08593).

    ``beta <- beta (1 + 0.1 clip(kl / target - 1, -0.2, 0.2))``: 2 % an update at the most.

    Args:
        beta: where it starts, positive: from 0 it would not move.
        target: nats per latent dimension, positive.
    """

    def __init__(self, beta: float, target: float) -> None:
        self.beta, self.target = beta, target

    def observe(self, kl: float) -> None:
        """Change the price after an update whose samples had a mean KL of ``kl`` nats per latent dimension."""
        error = min(max(kl / self.target - 1, -ERROR_LIMIT), ERROR_LIMIT)
        self.beta *= 1 + GAIN * error

    def state_dict(self) -> dict[str, Any]:
        """Return the price."""
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.beta = state["beta"]


def check_gate(proxy: object) -> None:
    """Check that a proxy can say how strange a sample is.

    Raises:
        ConfigError: it has no ``predict``.
    """
    if not hasattr(proxy, "predict"):
        raise ConfigError(
            f"kl_gate='uncertain' asks the proxy how strange a sample is, but {type(proxy).__name__} has no "
            "predict(latents, prompts) with .ood; pass a RewardProxy, or kl_gate='none'"
        )


@torch.no_grad()
def uncertainty_gate(proxy: object, latents: Tensor, prompts: Sequence[str], micro_batch: int = 64) -> Tensor:
    """Return how much of each sample's KL is charged, ``[B]`` in [0, 1], without gradient: the proxy's ``ood`` score.

    It is the share of held-out samples that are less strange, the largest over rewards where a proxy tells them apart:
    on samples like those the mean is 1/2, and 1 on samples beyond them all. It is not divided by its mean over the
    batch: a policy that left the proxy's data altogether would then be held no more than one that stayed, and what one
    sample is charged would depend on the others of its rank.

    Args:
        proxy: has ``predict(latents, prompts)``, such as :meth:`~latent_rewards.proxies.proxy.RewardProxy.predict`.
        latents: final latents, ``[B, C, F, H, W]``.
        prompts: B texts.
        micro_batch: samples per proxy call.

    Raises:
        DataError: a score is outside [0, 1].
    """
    parts = []
    for start in range(0, len(latents), micro_batch):
        stop = start + micro_batch
        with torch.autocast(latents.device.type, enabled=False):
            scores = cast(Any, proxy).predict(latents[start:stop], prompts[start:stop]).ood
        parts.append(torch.stack(list(scores.values())).amax(dim=0))
    gate = torch.cat(parts)
    inside = (gate >= 0) & (gate <= 1)
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise DataError(
            f"the proxy's ood score of the sample with prompt {prompts[row]!r} is {float(gate[row])}; a gate must lie "
            "in [0, 1]: train the proxy again, or use kl_gate='none'"
        )
    return gate


@dataclass
class Charge:
    """What the chains of one batch pay; the KL is evaluated when it is first asked for.

    Attributes:
        penalty: whose reference, gate and price.
        step: of the update.
        iteration: of the optimiser within the update; the first one's chains are the policy's own.
        batch: the samples.
        trajectory: their states.
        chain: the policy's steps at these states.
    """

    penalty: KLPenalty
    step: int
    iteration: int
    batch: Batch
    trajectory: Trajectory
    chain: Chain

    @cached_property
    def nats(self) -> Tensor:
        """The KL of each step, ``[B, K]``, with gradient."""
        penalty, config = self.penalty, self.penalty.config
        if penalty.path:
            return path_kl(self.chain, penalty.reference, self.trajectory, config.head_std)
        steps = self.chain.transitions
        return trajectory_kl(penalty.policy, penalty.reference, self.trajectory, config.head_std, steps)

    @cached_property
    def gate(self) -> Tensor | None:
        """The share of its KL each sample is charged, ``[B]``; None is all of it."""
        if self.penalty.config.kl_gate == "none":
            return None
        final, micro_batch = self.trajectory.final.detach(), self.penalty.config.micro_batch
        return uncertainty_gate(self.penalty.proxy, final, self.batch.prompts, micro_batch).to(self.nats)

    def shared(self) -> dict[str, Tensor]:
        """Return what an estimator of the reward is given for the KL's part of its gradient: ``costs`` or ``final``."""
        if self.penalty.path:
            return {"final": self.chain.final}
        if self.penalty.config.kl == "per_state":
            return {}
        nats = self.nats.detach() if self.gate is None else self.gate[:, None] * self.nats.detach()
        return {"costs": self.penalty.beta * nats / self.trajectory.final[0].numel()}

    def loss(self, logs: dict[str, float]) -> Tensor:
        """Return beta times the KL that is charged, ``[]``; fill ``logs``.

        Raises:
            NonFiniteError: a sample's KL is not finite.
        """
        nats, size = self.nats.sum(dim=1), self.trajectory.final[0].numel()
        check_finite("kl", nats, self.step, self.batch)
        kl = nats.mean() / size
        logs["kl"] = float(kl.detach())
        if self.gate is not None:
            kl = (self.gate * nats).mean() / size
            logs |= {"kl_gate": float(self.gate.mean()), "kl_gated": float(kl.detach())}
        if self.penalty.adaptive is not None:
            logs["beta"] = self.penalty.beta
        if self.iteration == 0:
            self.penalty.observe(self.step, kl.detach())
        return self.penalty.beta * kl


class KLPenalty:
    """The KL of a trainer's policy to its reference, priced.

    Args:
        config: the settings.
        policy: the policy that is trained.
        reference: see :mod:`latent_rewards.lro.reference`.
        proxy: tells the gate how strange samples are.
        estimator: the estimator of the reward's gradient.

    Raises:
        ConfigError: the proxy has no gate, the reference cannot follow, or gradients cannot go through it.
    """

    def __init__(self, config: LROConfig, policy: Policy, reference: Policy, proxy: object, estimator: str) -> None:
        self.config, self.policy, self.reference, self.proxy = config, policy, reference, proxy
        self.path = config.kl == "return" and config.is_path(estimator)
        if config.kl_gate == "uncertain":
            check_gate(proxy)
        if self.path:
            check_differentiable(reference)
        self.adaptive = None if config.kl_target is None else AdaptiveBeta(config.beta, config.kl_target)
        self.following: Following | None = None
        if config.sync_ref_model:
            every, alpha = config.ref_model_sync_steps, config.ref_model_mixup_alpha
            self.following = Following(cast(nn.Module, policy), reference, every=every, alpha=alpha)
        self._observed: Tensor | None = None

    @property
    def beta(self) -> float:
        """The price now."""
        return self.config.beta if self.adaptive is None else self.adaptive.beta

    def stateful(self) -> dict[str, HasStateDict]:
        """Return what a checkpoint must carry, by name; nothing by default, so that earlier checkpoints still fit."""
        parts: dict[str, HasStateDict] = {}
        if self.adaptive is not None:
            parts["beta"] = self.adaptive
        if self.following is not None:
            parts["reference"] = self.following
        return parts

    def chain(self, trajectory: Trajectory) -> Chain:
        """Return the policy's steps at the states where the KL is measured, with gradient."""
        if self.path:
            return path_chain(self.policy, trajectory, self.config.last_k)
        return detached_chain(self.policy, trajectory)

    def observe(self, step: int, kl: Tensor) -> None:
        """Take in the KL ``[]`` that was charged on chains of the policy's own, in nats per latent dimension."""
        self._observed = kl.clone()
        if step == 0 and isinstance(self.reference, AdaptersOff) and float(kl) > _AWAY:
            warnings.warn(
                f"the policy starts {float(kl):.3g} nats per latent dimension from itself without adapters, which is "
                "the reference: the penalty pulls it there; to hold it to where it starts, pass "
                "reference=copy.deepcopy(policy)",
                stacklevel=2,
            )

    def after_update(self, step: int, ranks: Ranks) -> None:
        """Change the price by the KL over all ranks of update ``step``, and move the reference if it is time."""
        if self.adaptive is not None and self._observed is not None:
            ranks.average([self._observed])
            self.adaptive.observe(float(self._observed))
        if self.following is not None:
            self.following.after_update(step)
