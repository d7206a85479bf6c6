"""Settings of the two trainers; TRL's names where TRL has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from latent_rewards.contracts import ConfigError, unknown_name
from latent_rewards.lro.advantages import ScaleRewards
from latent_rewards.lro.guard import MIN_REFRESH_QUERIES
from latent_rewards.training.loop import LoopConfig, warmup_cosine
from latent_rewards.training.settings import check_types

SCORE_ESTIMATORS = ("reinforce", "smoothed")
GRADIENT_ESTIMATORS = ("hybrid", "pathwise")


@dataclass
class LROConfig:
    """What a latent reward optimisation run is.

    Attributes:
        num_updates: rollouts of new samples; each gives ``num_iterations`` optimiser steps.
        learning_rate: of AdamW without weight decay, positive.
        warmup: updates in which the learning rate rises linearly to it; 0 starts with all of it. It does not keep a
            policy from exploiting a proxy before the first refreshes: a smaller ``refresh_every`` does.
        learning_rate_floor: share of the learning rate that is left in the last update, reached along half a cosine;
            1 keeps it constant. A run whose rate falls cannot be prolonged later.
        prompts_per_update: prompts drawn for each update, without repeats until all were seen; over all ranks.
        num_generations: samples per prompt and update (one group).
        adapter_rank: train LoRA adapters of that rank in every linear layer of the policy in place of its weights, to
            which they are added when the run ends; wants a larger learning rate. The KL's reference is then the policy
            without them and takes no memory. None trains what asks for gradients.
        gradient_checkpointing: keep the inputs of the policy's blocks only, and compute the rest again in the backward
            pass: slower, and much smaller. The policy is, or holds, a diffusers network. Off again after the run.
        num_iterations: optimiser steps per rollout; above 1 each step's probability ratio is clipped.
        epsilon: clip range of that ratio, in (0, 1).
        step_counts: numbers of sampling steps; one is drawn for each update.
        estimator: ``"reinforce"`` or ``"smoothed"`` for ReinforceTrainer (default smoothed), ``"pathwise"`` or
            ``"hybrid"`` for DifferentiableRewardTrainer (default pathwise). None is the trainer's default.
        head_std: standard deviation, in latent units, of the Gaussian head on the last, deterministic step; also the
            unit in which the KL of that step is measured. Smoothing biases the gradient by O(head_std^2).
        score_last_step: False leaves the last step out of ``reinforce``, without a head, as most public code does. That
            is biased: what the parameters do at that step is not seen, so a single step has no gradient at all.
        num_draws: head draws per latent of ``smoothed``, at least 2; even if ``antithetic``.
        antithetic: draw the head's noise in pairs of opposite sign.
        chain: how ``smoothed`` reaches the steps before the last: "path" backpropagates the head's estimate through the
            last ``last_k`` of them, "score" uses score terms, whose variance grows with the size of the latents.
        last_k: steps the gradient of ``pathwise`` and of the "path" chain goes through; None is all of them, fewer
            saves memory and is biased.
        scale_rewards: ``"none"``, or divide rewards by the standard deviation of their ``"group"`` or ``"batch"``.
        multi_objective_aggregation: with several rewards, ``"sum_then_normalize"`` sums them and then takes advantages;
            ``"normalize_then_sum"`` first divides each by the standard deviation of its own group, so that a reward of
            small range does not vanish behind one of large range (GDPO, 2601.05242, which adds
            ``scale_rewards="batch"``). It takes a WeightedSum that does not normalise itself.
        gradient_aggregation: ``"upgrad"``, ``"mgda"`` or ``"pcgrad"`` estimate one gradient for each term of a
            WeightedSum and combine them so that none pays for another (see :mod:`latent_rewards.lro.gradients`; extra
            ``multi``). KL and anchor are added to the result. It takes as many backward passes more as there are
            rewards, and logs ``conflict``. None follows the gradient of the sum.
        beta: price of the KL to the reference in nats per latent dimension (mean over event dimensions, summed over
            steps); 0 needs no reference. With a ``kl_target``, where it starts.
        kl: "per_state" adds the KL of each step at the states that were sampled, as constants; its gradient ignores
            that steps also change which states come after them. "return" is the gradient of E[sum_k KL_k]: score terms
            (``reinforce``, ``hybrid``, chain "score") have the KL of the later steps taken off their advantage, with
            the leave-one-out baseline, and not divided by ``scale_rewards``; ``pathwise`` and the "path" chain measure
            the KL on the reparameterised chain, through the last ``last_k`` steps and at the price of a backward pass
            through the reference. With one step the two are the same. With ``num_iterations`` above 1 the KL is
            measured anew at the sampled states in each, the ratio of a step is clipped with its whole advantage, KL
            included, and as for the reward (PPO) no ratio corrects for the states being those of the older policy.
        kl_target: nats per latent dimension at which ``beta`` holds the KL that is charged (the gated one, if gated):
            after each update it changes by a tenth of the relative error, by 2 % at most (Ziegler et al.,
            1909.08593). None keeps ``beta``.
        kl_gate: "uncertain" multiplies each sample's KL by the proxy's ``ood`` score of its final latents, the share of
            held-out samples that are less strange: familiar samples are free to move, strange ones are held. The score
            is a constant to the gradient and is not normalised, so that typical samples pay half and a policy that
            drifts away pays all. Needs a proxy with ``predict``. "none" charges all alike.
        sync_ref_model: let the reference, a copy, follow the policy: ``ref_model_mixup_alpha * policy +
            (1 - ref_model_mixup_alpha) * reference`` after every ``ref_model_sync_steps`` updates (TR-DPO, 2404.09656).
            Not where the reference is the policy with its adapters off, which has no weights of its own.
        ref_model_sync_steps: updates between those moves.
        ref_model_mixup_alpha: share of the policy in them, in (0, 1].
        pessimism: how many of the proxy's own standard deviations a reward is scored below its mean (above, if its
            weight is negative).
        reward_cap: a proxy score beyond which more is not believed; scores are clamped to it. None does not clamp.
        refresh_every: updates between proxy refreshes; a refresh needs an oracle. Often with few queries is safer than
            seldom with many: in ``benchmarks.overoptimisation`` a policy can exploit a frozen proxy in ten updates.
        refresh_queries: fresh samples per refresh that the oracle scores, at least 8.
        refresh_steps: proxy updates per refresh.
        acquisition: which fresh samples the oracle scores: "random" takes them as the policy draws them; "uncertain",
            "top", "diverse" or "mixed" let the proxy choose half of them among more candidates (see
            :mod:`latent_rewards.proxies.acquire`). The other half stays as drawn, and the gap is recorded on it alone.
        acquisition_pool: candidates per query, at least 2; they cost a rollout and a proxy call. Unused by "random".
        replay_half_life: refreshes after which a replayed sample is drawn half as often; None replays all alike.
        max_queries: refresh queries in all; None is unlimited.
        anchor_weight: factor of the anchor's loss.
        anchor_every: updates between uses of the anchor's loss.
        holdout_every: updates between holdout evaluations.
        holdout_samples: samples per holdout evaluation, always the same prompts and noise.
        patience: holdout evaluations without a new best before training stops early; None never stops.
        min_improvement: how much better than the best a holdout evaluation must be to count.
        micro_batch: most samples per oracle call, per proxy call and per rollout of a refresh or holdout.
        seed: root of all randomness.
        output_dir: folder of checkpoints; a rerun with the same folder resumes. None keeps nothing on disk.
        checkpoint_every: updates between checkpoints.
        log_every: updates between tracker entries.
        log_with: accelerate tracker name, or None.
        max_grad_norm: gradient clipping; 0 does not clip.
        mixed_precision: "no" or "bf16".
        device: "cpu", "cuda", or one of several such as "cuda:1"; None takes an accelerator if there is one.
        progress: draw a progress bar.
    """

    num_updates: int = 200
    learning_rate: float = 1e-5
    warmup: int = 0
    learning_rate_floor: float = 1.0
    prompts_per_update: int = 8
    num_generations: int = 4
    adapter_rank: int | None = None
    gradient_checkpointing: bool = False
    num_iterations: int = 1
    epsilon: float = 0.2
    step_counts: list[int] = field(default_factory=lambda: [4])
    estimator: Literal["reinforce", "smoothed", "pathwise", "hybrid"] | None = None
    head_std: float = 0.1
    score_last_step: bool = True
    num_draws: int = 8
    antithetic: bool = True
    chain: Literal["score", "path"] = "path"
    last_k: int | None = None
    scale_rewards: ScaleRewards = "none"
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    gradient_aggregation: Literal["upgrad", "mgda", "pcgrad"] | None = None
    beta: float = 0.05
    kl: Literal["per_state", "return"] = "per_state"
    kl_target: float | None = None
    kl_gate: Literal["none", "uncertain"] = "none"
    sync_ref_model: bool = False
    ref_model_sync_steps: int = 512
    ref_model_mixup_alpha: float = 0.6
    pessimism: float = 0.5
    reward_cap: float | None = None
    refresh_every: int = 5
    refresh_queries: int = 64
    refresh_steps: int = 20
    acquisition: Literal["random", "uncertain", "top", "diverse", "mixed"] = "random"
    acquisition_pool: int = 4
    replay_half_life: float | None = None
    max_queries: int | None = None
    anchor_weight: float = 1.0
    anchor_every: int = 1
    holdout_every: int = 25
    holdout_samples: int = 64
    patience: int | None = 5
    min_improvement: float = 0.0
    micro_batch: int = 64
    seed: int = 0
    output_dir: str | None = None
    checkpoint_every: int = 100
    log_every: int = 10
    log_with: str | None = None
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "bf16"] = "no"
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            ConfigError: a value is out of range; the message names the field.
        """
        check_types(self, ConfigError)
        self.step_counts = _checked_step_counts(self.step_counts)
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}")
        if self.refresh_queries < MIN_REFRESH_QUERIES:
            raise ConfigError(f"refresh_queries must be at least {MIN_REFRESH_QUERIES}; got {self.refresh_queries}")
        if self.adapter_rank is not None and self.sync_ref_model:
            raise ConfigError(
                "adapter_rank and sync_ref_model exclude each other: the reference is the policy without its adapters, "
                "and has no weights that could follow; leave one of them out"
            )
        if self.acquisition_pool < 2:
            raise ConfigError(f"acquisition_pool must be at least 2; got {self.acquisition_pool}")
        for name in ("learning_rate", "head_std", "kl_target", "replay_half_life"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive; got {value}")
        for name in ("warmup", "beta", "pessimism", "anchor_weight", "min_improvement", "max_grad_norm", "max_queries"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} must not be negative; got {value}")
        if not 0 < self.epsilon < 1:
            raise ConfigError(f"epsilon must lie in (0, 1); got {self.epsilon}")
        if not 0 <= self.learning_rate_floor <= 1:
            raise ConfigError(f"learning_rate_floor must lie in [0, 1]; got {self.learning_rate_floor}")
        self._check_kl()
        self._check_choices()

    def _check_kl(self) -> None:
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ConfigError(f"ref_model_mixup_alpha must lie in (0, 1]; got {self.ref_model_mixup_alpha}")
        asked = {
            "kl_target": self.kl_target is not None,
            "kl_gate": self.kl_gate != "none",
            "sync_ref_model": self.sync_ref_model,
        }
        for name in (name for name, used in asked.items() if used and self.beta == 0):
            raise ConfigError(
                f"{name}={getattr(self, name)!r} has no effect with beta=0, which charges no KL; use a positive "
                "beta, or leave it at its default"
            )

    def _check_choices(self) -> None:
        choices = {
            "estimator": (None, *SCORE_ESTIMATORS, *GRADIENT_ESTIMATORS),
            "chain": ("score", "path"),
            "scale_rewards": ("none", "group", "batch"),
            "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
            "gradient_aggregation": (None, "upgrad", "mgda", "pcgrad"),
            "kl": ("per_state", "return"),
            "kl_gate": ("none", "uncertain"),
            "acquisition": ("random", "uncertain", "top", "diverse", "mixed"),
            "mixed_precision": ("no", "bf16"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(unknown_name(name, str(value), [str(a) for a in allowed if a]))
        if self.num_draws < 2 or (self.antithetic and self.num_draws % 2):
            raise ConfigError(f"num_draws must be at least 2, and even if antithetic; got {self.num_draws}")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of update ``step``, counted from 0."""
        factor = warmup_cosine(step, self.num_updates, warmup=self.warmup, floor=self.learning_rate_floor)
        return self.learning_rate * factor

    def check_estimator(self, allowed: Sequence[str]) -> str:
        """Return the estimator to use, the last of ``allowed`` being the default, checked against the other settings.

        Raises:
            ConfigError: another trainer's estimator, or one that these settings do not fit.
        """
        estimator = self.estimator or allowed[-1]
        if estimator not in allowed:
            raise ConfigError(
                f"estimator {estimator!r} belongs to the other trainer; this one has {', '.join(allowed)}"
            )
        if estimator == "reinforce" and not self.score_last_step and min(self.step_counts) == 1:
            raise ConfigError(
                "score_last_step=False leaves chains of 1 step without a gradient; keep it True, or take 1 out of "
                f"step_counts={self.step_counts}"
            )
        path = self.is_path(estimator)
        needs_group = estimator == "reinforce" or (not path and max(self.step_counts) > 1)
        needs_group = needs_group or self.scale_rewards == "group" or self.normalize_groups is not None
        if needs_group and self.num_generations < 2:
            raise ConfigError(f"num_generations must be at least 2 for the group baseline of {estimator!r}; got 1")
        if self.gradient_aggregation and self.kl == "return" and not path:
            raise ConfigError(
                f"kl='return' enters the score terms of {estimator!r} once, and gradient_aggregation takes those once "
                "for each reward; use kl='per_state', or an estimator that goes through the chain"
            )
        if path and self.num_iterations > 1:
            raise ConfigError(
                f"num_iterations must be 1 for {estimator!r}: without log-probs a reused rollout is biased"
            )
        return estimator

    def is_path(self, estimator: str) -> bool:
        """Return whether an estimator goes through the chain by backpropagation, and so has no score terms."""
        return estimator == "pathwise" or (estimator == "smoothed" and self.chain == "path")

    @property
    def normalize_groups(self) -> int | None:
        """Samples of the groups in which each reward is normalised; None where the sum alone is."""
        return self.num_generations if self.multi_objective_aggregation == "normalize_then_sum" else None

    def scoring_settings(self) -> dict[str, Any]:
        """Return the part of these settings that :class:`~latent_rewards.lro.scoring.ProxyReward` takes."""
        return {
            "pessimism": self.pessimism,
            "cap": self.reward_cap,
            "micro_batch": self.micro_batch,
            "normalize_groups": self.normalize_groups,
        }

    def refresh_settings(self) -> dict[str, Any]:
        """Return the part of these settings that :class:`~latent_rewards.lro.refresh.Refresher` takes."""
        return {
            "num_updates": self.refresh_steps,
            "seed": self.seed,
            "acquisition": self.acquisition,
            "acquisition_pool": self.acquisition_pool,
            "half_life": self.replay_half_life,
        }

    def loop_config(self) -> LoopConfig:
        """Return the part of these settings that the training loop takes."""
        return LoopConfig(
            num_steps=self.num_updates,
            seed=self.seed,
            output_dir=self.output_dir,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
            log_with=self.log_with,
            max_grad_norm=self.max_grad_norm,
            mixed_precision=self.mixed_precision,
            device=self.device,
            progress=self.progress,
        )


class StartedWith:
    """Keeps in the checkpoint which settings and prompts a run was started with, and refuses to resume with others.

    Settings that change no sample and no gradient (paths, logging, devices) may differ, and a run may be prolonged.

    Args:
        config: the settings of this run.
        num_prompts: number of training prompts.
        facts: what else the run was started with, by name; one that a checkpoint does not know is not compared.
    """

    def __init__(self, config: LROConfig, num_prompts: int, facts: Mapping[str, str] | None = None) -> None:
        # Where the learning rate falls, the length of the run decides how fast.
        free = _MAY_CHANGE if config.learning_rate_floor == 1 else _MAY_CHANGE - {"num_updates"}
        kept = {name: value for name, value in asdict(config).items() if name not in free}
        self._settings = {**kept, "number of prompts": num_prompts, **(facts or {})}

    def state_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return self._settings

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare the stored settings with this run's; one that was unknown then had what is its default now.

        Raises:
            ConfigError: one differs; the message names it.
        """
        defaults = {setting.name: setting.default for setting in fields(LROConfig)}
        for name, value in self._settings.items():
            stored = state.get(name, defaults.get(name, value))
            if stored != value:
                raise ConfigError(
                    f"the run in output_dir was started with {name}={stored!r}, this one has {value!r}; "
                    "use the old value to resume, or another output_dir"
                )


_MAY_CHANGE = frozenset(
    (
        "num_updates",
        "gradient_checkpointing",
        "micro_batch",
        "patience",
        "max_queries",
        "output_dir",
        "checkpoint_every",
        "log_every",
        "log_with",
        "device",
        "progress",
    )
)

_AT_LEAST_ONE = (
    "num_updates",
    "prompts_per_update",
    "num_generations",
    "adapter_rank",
    "num_iterations",
    "last_k",
    "ref_model_sync_steps",
    "refresh_every",
    "refresh_steps",
    "anchor_every",
    "holdout_every",
    "holdout_samples",
    "patience",
    "micro_batch",
    "checkpoint_every",
    "log_every",
)


def _checked_step_counts(step_counts: Sequence[int]) -> list[int]:
    counts = list(step_counts)
    if not counts or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
        raise ConfigError(
            f"step_counts must be a list of integers of at least 1, such as [4] or [1, 2, 4]; got {counts}"
        )
    return counts
