"""Latent reward optimisation: fine-tune a few-step policy on the scores of a proxy that is kept honest.

One update: draw prompts, a step count and noise; roll the policy out without gradient; estimate the gradient of the
reward (:mod:`latent_rewards.lro.estimators`); add ``beta`` times the KL to the reference (:mod:`latent_rewards.lro.kl`)
and the anchor's loss; step. Every ``refresh_every`` updates the oracle scores fresh samples and the proxy learns from
them; every ``holdout_every`` updates a metric that is never optimised is evaluated, and the best policy by it is what
remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from latent_rewards.contracts import Anchor, ConfigError, Oracle, Policy, Prompt, Reward, check_prompts
from latent_rewards.dataset import RewardDataset
from latent_rewards.lro import checks, estimators
from latent_rewards.lro.adapters import Adapters, removed_on_error
from latent_rewards.lro.config import GRADIENT_ESTIMATORS, SCORE_ESTIMATORS, LROConfig, StartedWith
from latent_rewards.lro.gradients import GradientAggregation
from latent_rewards.lro.guard import Floors, Guard, RefreshSchedule
from latent_rewards.lro.kl import Charge, KLPenalty
from latent_rewards.lro.reference import reference_for
from latent_rewards.lro.refresh import Refresher, check_fingerprints, query
from latent_rewards.lro.result import TrainResult
from latent_rewards.lro.sampling import Batch, SampleSource, noise_dtype
from latent_rewards.lro.scoring import AdaptiveReward, Proxy, ProxyReward
from latent_rewards.rollout import Chain, Trajectory, detached_chain, rollout
from latent_rewards.training.loop import NonFiniteError, StopTraining, TrainingLoop, set_learning_rate
from latent_rewards.training.parts import HasStateDict
from latent_rewards.training.precision import widened_to_train

Callback = Callable[[int, dict[str, float]], None]


class LatentRewardTrainer:
    """What both trainers share; use :class:`ReinforceTrainer` or :class:`DifferentiableRewardTrainer`.

    Args:
        policy: an ``nn.Module`` that is a Policy; parameters with ``requires_grad`` are trained in place, in eval mode
            and in at least float32.
        proxy: scores latents; updated in place when there is an oracle.
        prompts: training prompts, texts or mappings.
        config: see :class:`~latent_rewards.lro.config.LROConfig`.
        reward: combines the proxy's rewards; None takes the only one.
        oracle: true metrics for refresh and gap; without one the proxy stays frozen.
        dataset: what the proxy was trained on, replayed at each refresh.
        holdout: an oracle that is never optimised; decides early stop and which policy remains: one that keeps the
            floors of the reward, if it measures them.
        reference: policy the KL is measured to. None, if ``beta`` is positive or the reward compares with it: the
            policy with its peft adapters off where they are all that is trained, else a frozen copy of it.
        anchor: a loss that holds the policy near what it was distilled from.
        callbacks: called with the step and this process's log after each update.

    Raises:
        ConfigError: settings and parts do not fit together.
        DataError: no prompts, or a blank one.
        FingerprintMismatchError: oracle, proxy and dataset differ in latent space or metrics.
    """

    estimator_names: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        policy: Policy,
        proxy: Proxy,
        prompts: Sequence[Prompt],
        config: LROConfig | None = None,
        reward: Reward | None = None,
        oracle: Oracle | None = None,
        dataset: RewardDataset | None = None,
        holdout: Oracle | None = None,
        reference: Policy | None = None,
        anchor: Anchor | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config = config or LROConfig()
        self.estimator = config.check_estimator(self.estimator_names)
        self.policy, self.oracle, self.holdout = policy, oracle, holdout
        self.anchor, self.callbacks = anchor, tuple(callbacks)
        check_fingerprints(oracle, proxy, dataset)
        checks.check_direction(proxy, reward, oracle)
        listed = check_prompts(prompts)
        for count in config.step_counts:
            policy.timesteps(count)
        module = checks.as_module(policy)
        self.adapters = None if config.adapter_rank is None else Adapters(module, config.adapter_rank, config.seed)
        with removed_on_error(self.adapters):
            self.checkpointed = checks.checkpointed(module) if config.gradient_checkpointing else []
            self.scoring = ProxyReward(proxy, reward, **config.scoring_settings())
            self.aggregation = None
            if config.gradient_aggregation is not None:
                trained = [p for p in module.parameters() if p.requires_grad]
                self.aggregation = GradientAggregation(config.gradient_aggregation, reward, trained, config.seed)
            self.guard = Guard(
                module,
                RefreshSchedule(config.refresh_every, config.refresh_queries, config.max_queries),
                patience=config.patience,
                min_improvement=config.min_improvement,
                floors=reward if isinstance(reward, Floors) else None,
                lower_is_better=getattr(holdout, "lower_is_better", frozenset()),
            )
            self.refresher = None
            if oracle is not None:
                self.refresher = Refresher(self.scoring, oracle, dataset, self.guard, **config.refresh_settings())
            checks.warn_of_exploitation(proxy, oracle, holdout)
            widened_to_train(module)  # its reference is a copy
            charged, compared = reference is not None or config.beta > 0, self.scoring.needs_reference
            others = {"moves": config.sync_ref_model, "new_adapters": self.adapters is not None}
            self.reference = reference_for(policy, reference, charged=charged, compared=compared, **others)
            self.penalty = None
            if charged and self.reference is not None:
                self.penalty = KLPenalty(config, policy, self.reference, proxy, self.estimator)
            self.loop = self._make_loop(module, listed)
            self.samples = SampleSource(
                policy,
                listed,
                step_counts=config.step_counts,
                seed=config.seed,
                device=self.loop.device,
                dtype=noise_dtype(module),
            )

    def train(self) -> TrainResult:
        """Run (or resume) the updates, put the best policy by the holdout back, and return what happened.

        Raises:
            NonFiniteError: a sample, reward, loss or gradient is not finite; parameters are as before that update.
            OffPolicyError: the policy does not repeat its own rollout (dropout, for instance).
        """
        checks.as_module(self.policy).eval()
        for other in (self.scoring.proxy, self.reference):
            if isinstance(other, nn.Module):  # as the loop does with the policy
                self.loop.ranks.broadcast((*other.parameters(), *other.buffers()))
        history = self.loop.run(self._step)
        with self.loop.randomness():
            self._evaluate_holdout(self.loop.step)
        self.guard.rollback()
        for part in self.checkpointed:
            part.disable_gradient_checkpointing()
        if self.adapters is not None:
            self.adapters.merge()
        return TrainResult(
            history=history,
            best_step=self.guard.best_step,
            num_queries=self.guard.num_queries,
            stopped_early=self.guard.stopped,
            proxy_curve=[(entry["step"], entry["reward"]) for entry in history],
            true_curve=self.guard.gaps,
            holdout_curve=self.guard.holdout,
        )

    def _make_loop(self, module: nn.Module, prompts: Sequence[Prompt]) -> TrainingLoop:
        trained = [p for p in module.parameters() if p.requires_grad]
        if not trained:
            raise ConfigError("the policy has no parameter with requires_grad; unfreeze what should be trained")
        facts = checks.started_with(module, prompts, self.scoring)
        loaded_first: dict[str, HasStateDict] = {"settings": StartedWith(self.config, len(prompts), facts)}
        if isinstance(self.scoring.reward, AdaptiveReward):
            loaded_first["reward"] = self.scoring.reward
        stateful: dict[str, HasStateDict] = {"guard": self.guard}
        if self.refresher is not None:
            stateful["refresher"] = self.refresher
        if self.anchor is not None:
            stateful["anchor"] = self.anchor
        if self.penalty is not None:
            stateful |= self.penalty.stateful()
        loop = TrainingLoop(
            self.config.loop_config(),
            name="lro",
            modules={"policy": module},
            optimizers={"policy": torch.optim.AdamW(trained, lr=self.config.learning_rate, weight_decay=0.0)},
            stateful=stateful,
            loaded_first=loaded_first,
        )
        ranks = loop.ranks.count
        if self.config.prompts_per_update % ranks:
            raise ConfigError(
                f"prompts_per_update={self.config.prompts_per_update} cannot be shared by {ranks} ranks; use a multiple"
            )
        for other in (self.scoring.proxy, self.reference):
            if isinstance(other, nn.Module):
                other.to(loop.device)
        if isinstance(self.reference, nn.Module):
            self.reference.requires_grad_(False).eval()
        return loop

    def _step(self, step: int) -> dict[str, float]:
        config = self.config
        logs = {} if step % config.holdout_every else self._evaluate_holdout(step)
        if self.guard.stopped:
            raise StopTraining
        due = self.guard.queries_due(step) if self.refresher is not None else 0
        if due and self.refresher is not None:
            candidates = self._generate("lro/refresh", step, self.refresher.candidates(due))
            logs |= self.refresher.refresh(step, candidates, due)
        batch = self._draw_batch(step)
        trajectory = self._rollout(batch)
        checks.check_finite("latents", trajectory.final.flatten(1).sum(1), step, batch)
        set_learning_rate(self.loop.optimizers["policy"], config.learning_rate_at(step))
        for iteration in range(config.num_iterations):
            loss, parts = self._loss(step, iteration, batch, trajectory)
            parts["grad_norm"] = self._descend(loss, batch)
            if self.anchor is not None:
                self.anchor.after_step()
        if self.penalty is not None:
            self.penalty.after_update(step, self.loop.ranks)
        if self.scoring.needs_reference:
            parts |= self._compared(batch, trajectory)
        logs = {**parts, **self.scoring.after_update(parts, self.loop.ranks), **logs}
        for callback in self.callbacks:
            callback(step, logs)
        return logs

    def _draw_batch(self, step: int) -> Batch:
        config = self.config
        return self.samples.update_batch(step, config.prompts_per_update, config.num_generations, self.loop.ranks)

    def _loss(self, step: int, iteration: int, batch: Batch, trajectory: Trajectory) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of one optimiser step and what to log; every transition is evaluated with gradient once."""
        config = self.config
        logs: dict[str, float] = {}
        with self.loop.accelerator.autocast():
            chain, charge = self._chain(trajectory), None
            if chain is not None and iteration == 0:
                checks.check_on_policy(step, trajectory, chain.transitions, config.head_std)
            if chain is not None and self.penalty is not None:
                charge = Charge(self.penalty, step, iteration, batch, trajectory, chain)
            reward = self._reward_function(step, batch, logs)
            shared = self._shared(chain, charge)
            estimate = partial(self._estimate, step, iteration, batch, trajectory, shared=shared)
            if self.aggregation is None:
                loss = estimate(reward)
            else:
                loss, told = self.aggregation(step, estimate, partial(reward, apart=True), self.loop.ranks)
                logs |= told
            if charge is not None:
                loss = loss + charge.loss(logs)
            if self.anchor is not None and step % config.anchor_every == 0:
                noise = self.samples.noise(f"lro/anchor/{iteration}", step, batch.sample_ids, batch.num_steps)
                anchor = self.anchor.loss(self.policy, batch.condition, noise)
                loss = loss + config.anchor_weight * anchor
                logs["anchor"] = float(anchor.detach())
        return loss, {**logs, "loss": float(loss.detach())}

    def _estimate(
        self,
        step: int,
        iteration: int,
        batch: Batch,
        trajectory: Trajectory,
        reward: estimators.RewardFunction,
        shared: dict[str, Any],
    ) -> Tensor:
        raise NotImplementedError

    def _chain(self, trajectory: Trajectory) -> Chain | None:
        """Return the policy's steps with gradient, where the estimator or the KL has a use for all of them."""
        if self.penalty is not None:
            return self.penalty.chain(trajectory)
        if self.config.is_path(self.estimator):
            return None
        return detached_chain(self.policy, trajectory)

    def _shared(self, chain: Chain | None, charge: Charge | None) -> dict[str, Any]:
        """Return what every estimator is given: settings, and what was computed already."""
        given: dict[str, Any] = {
            "num_generations": self.config.num_generations,
            "scale_rewards": self.config.scale_rewards,
            "ranks": self.loop.ranks,
            "transitions": None if chain is None else chain.transitions,
        }
        if charge is not None:
            given |= charge.shared()
        return given

    def _epsilon(self) -> float | None:
        return self.config.epsilon if self.config.num_iterations > 1 else None

    def _reward_function(self, step: int, batch: Batch, logs: dict[str, float]) -> Callable[..., Tensor]:
        """Return the reward of latents ``[N, ...]``, ``latents[i]`` belonging to sample i % B; it fills ``logs``.

        With ``apart`` it returns the reward's terms ``[R, N]``.
        """

        def reward(latents: Tensor, *, apart: bool = False) -> Tensor:
            repeats = len(latents) // len(batch.prompts)
            with torch.autocast(latents.device.type, enabled=False):
                total, scores = self.scoring(latents, batch.prompts * repeats, batch.condition, self.loop.ranks)
            per_sample = total.detach().view(repeats, -1).mean(dim=0)
            checks.check_finite("reward", per_sample, step, batch)
            logs["reward"] = float(per_sample.mean())
            logs["reward_std"] = float(per_sample.std(correction=min(1, len(per_sample) - 1)))
            logs.update({f"rewards/{name}/mean": float(score.detach().mean()) for name, score in scores.items()})
            if apart:
                return self.scoring.terms(scores, repeats, self.loop.ranks)
            return self.scoring.normalized(total, scores, repeats)

        return reward

    def _descend(self, loss: Tensor, batch: Batch) -> float:
        try:
            return self.loop.update("policy", loss)
        except NonFiniteError as error:
            everyone = list(range(len(batch.prompts)))
            raise NonFiniteError(f"{error}; the update's samples: {checks.describe(batch, everyone)}") from error

    @torch.no_grad()
    def _rollout(self, batch: Batch) -> Trajectory:
        # Its own autocast block: weights cast without gradient must not be reused by the forward that needs one.
        with self.loop.accelerator.autocast():
            return rollout(self.policy, batch.condition, batch.noise, batch.num_steps)

    @torch.no_grad()
    def _compared(self, batch: Batch, trajectory: Trajectory) -> dict[str, float]:
        """Return what the proxy makes of the policy's and the reference's samples of the same prompts and noise."""
        assert self.reference is not None  # noqa: S101 - for the type checker
        with self.loop.accelerator.autocast():
            theirs = rollout(self.reference, batch.condition, batch.noise, batch.num_steps).final
        return {
            f"{who}/{name}/mean": float(values.mean())
            for who, final in (("policy", trajectory.final), ("reference", theirs))
            for name, values in self.scoring.scores(final, batch.prompts).items()
        }

    def _generate(self, stage: str, step: int, num_samples: int) -> Iterator[tuple[Batch, Tensor]]:
        micro_batch = self.config.micro_batch
        for batch in self.samples.evaluation_batches(stage, step, num_samples, micro_batch, self.loop.ranks):
            yield batch, self._rollout(batch).final

    def _evaluate_holdout(self, step: int) -> dict[str, float]:
        if self.holdout is None or self.guard.evaluated(step):
            return {}
        samples = self._generate("lro/holdout", 0, self.config.holdout_samples)
        mine = [query(self.holdout, final, batch.prompts) for batch, final in samples]
        parts = [part for share in self.loop.ranks.gather(mine) for part in share]
        return self.guard.record_holdout(step, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


class ReinforceTrainer(LatentRewardTrainer):
    """Optimises a proxy through its values alone: ``estimator="smoothed"`` (default) or ``"reinforce"``.

    See :class:`LatentRewardTrainer` for the arguments and :mod:`latent_rewards.lro.estimators` for the estimators.
    """

    estimator_names = SCORE_ESTIMATORS

    def _estimate(
        self,
        step: int,
        iteration: int,
        batch: Batch,
        trajectory: Trajectory,
        reward: estimators.RewardFunction,
        shared: dict[str, Any],
    ) -> Tensor:
        config = self.config
        shared = shared | {"head_std": config.head_std, "epsilon": self._epsilon()}
        if self.estimator == "reinforce":
            head = self.samples.noise("lro/head", step, batch.sample_ids, 1)[0] if config.score_last_step else None
            return estimators.reinforce(self.policy, trajectory, reward, head_noise=head, **shared)
        count = config.num_draws // 2 if config.antithetic else config.num_draws
        heads = self.samples.noise(f"lro/head/{iteration}", step, batch.sample_ids, count)
        return estimators.smoothed(
            self.policy,
            trajectory,
            reward,
            head_noise=heads,
            antithetic=config.antithetic,
            chain=config.chain,
            last_k=config.last_k,
            **shared,
        )


class DifferentiableRewardTrainer(LatentRewardTrainer):
    """Optimises a proxy through its gradient: ``estimator="pathwise"`` (default) or ``"hybrid"``.

    See :class:`LatentRewardTrainer` for the arguments and :mod:`latent_rewards.lro.estimators` for the estimators.
    """

    estimator_names = GRADIENT_ESTIMATORS

    def _estimate(
        self,
        step: int,
        iteration: int,
        batch: Batch,
        trajectory: Trajectory,
        reward: estimators.RewardFunction,
        shared: dict[str, Any],
    ) -> Tensor:
        if self.estimator == "pathwise":
            return estimators.pathwise(self.policy, trajectory, reward, last_k=self.config.last_k, **shared)
        return estimators.hybrid(self.policy, trajectory, reward, epsilon=self._epsilon(), **shared)
