"""Settings of a reward proxy and of its training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latent_rewards.contracts import ConfigError, unknown_name
from latent_rewards.proxies.objectives import PREFERENCE_OBJECTIVES, SCORE_OBJECTIVES
from latent_rewards.proxies.trunks import AUTO, TrunkKind, trunk_kind
from latent_rewards.training.settings import check_types

MEAN_CALIBRATIONS = ("none", "isotonic")


_AT_LEAST_ONE = (
    "width",
    "depth",
    "ensemble_size",
    "batch_size",
    "decoder_clips",
    "decoder_updates",
    "patience",
    "text_features",
)


@dataclass
class ProxyConfig:
    """Settings of :func:`latent_rewards.proxies.train_proxy`.

    Attributes:
        trunk: "conv3d" (an ensemble of small residual networks), "transformer" (of factorised space-time transformers),
            "pixels" (of networks on small frames, which a tiny decoder draws; it needs ``train_proxy(..., codec=)``),
            "linear" (one exact ridge regression), "backbone" (an ensemble of heads on features of a frozen video
            transformer), "backbone_linear" (ridge regression on them), one added by
            :func:`latent_rewards.proxies.trunks.register_trunk`, or "auto": chosen among those by cross-validation,
            see :mod:`latent_rewards.proxies.selection`.
        objective: for rewards that are numbers "mse", "huber" (robust: single wild labels weigh less) or "gaussian"
            (the network also predicts the noise of each label, so ``std`` follows noise that differs between samples);
            for :class:`latent_rewards.proxies.Preferences` "bradley_terry" or "thurstone" (the network also predicts
            how undecided the judge is on each sample). Ridge regressions know "mse", "linear" also "bradley_terry".
        huber_delta: where the Huber loss turns linear, in standard deviations of the reward.
        width: channels of a trunk and hidden units of its head, a multiple of 8.
        depth: blocks of a trunk; None takes 1 for "pixels", 2 for the others.
        ensemble_size: networks; each leaves another part of the data out. A linear proxy has one.
        num_updates: most updates per network; None chooses ``clamp(18 N / batch_size, 200, 600)`` for N samples, for
            "pixels" ``clamp(90 N / batch_size, 200, 2500)``.
        batch_size: samples per update.
        learning_rate: peak of the one-cycle schedule of AdamW.
        weight_decay: of AdamW.
        input_noise: standard deviation of Gaussian noise on the training latents, in units of each channel's standard
            deviation; a proxy that is climbed must not change with what no eye can see. The linear trunk has none.
        holdout_fraction: part of the data kept for the report and the calibration, in (0, 0.5].
        refit_fraction: after the report and the calibration the networks go on for this part of their updates and learn
            from all samples, the held-out ones too; 0 keeps those that were judged. Networks that learnt nothing, ridge
            regressions and proxies of preferences stay what they were.
        decoder_clips: for "pixels", most clips decoded to teach the tiny decoder; fewer where decoding is slow.
        decoder_updates: of the tiny decoder, of 24 clips each.
        patience: evaluations without improvement after which a network stops; there is one every 25 updates, or about
            24 in all if that is fewer.
        min_samples: fewest samples, in all and per reward, that are accepted.
        use_prompts: condition on the prompts, where there are any.
        text_features: dimensions prompts are hashed to.
        noise_levels: (low, high) in [0, 1]: train on ``alpha(t) x0 + sigma(t) eps`` for t in that range, so that noisy
            latents can be scored (``proxy(latents, prompts, t=...)``); None for clean latents only.
        adapter_rank: rank of LoRA adapters that the trunk "backbone" trains in its transformer; 0 for none.
        selection_budget: for "auto", most sample updates (one forward and backward pass of one sample) spent on
            choosing; None spends as many as one full training, or what 25 updates of each take.
        ridge_alpha: penalty of the linear trunk, as scikit-learn's; None chooses it on held-out data.
        calibrate_mean: "none", or "isotonic": map the mean by isotonic regression on the held-out part (see
            :mod:`latent_rewards.proxies.isotonic`); for predictions that are ordered well and scaled wrongly.
        learning_curve: also refit on a quarter and on half of the training data, which costs three quarters of the
            fit again, and report what twice the labels would bring.
        any_size: accept latents of frame counts and resolutions it was not trained on; their scores are only as good as
            the trunk carries over, so look at the out-of-distribution score. Not with the linear trunk.
        in_memory_mib: a dataset with more MiB of latents than this is read on demand, others as a whole.
        seed: root of all randomness.
        device: "cpu", "cuda", or one of several such as "cuda:1"; None takes an accelerator if there is one. The proxy
            stays there.
        progress: draw a progress bar.
    """

    trunk: str = "conv3d"
    objective: str = "mse"
    huber_delta: float = 1.0
    width: int = 64
    depth: int | None = None
    ensemble_size: int = 3
    num_updates: int | None = None
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    input_noise: float = 0.3
    holdout_fraction: float = 0.15
    refit_fraction: float = 0.25
    decoder_clips: int = 1024
    decoder_updates: int = 3600
    patience: int = 8
    min_samples: int = 32
    use_prompts: bool = True
    text_features: int = 256
    noise_levels: tuple[float, float] | None = None
    adapter_rank: int = 0
    selection_budget: int | None = None
    ridge_alpha: float | None = None
    calibrate_mean: str = "none"
    learning_curve: bool = False
    any_size: bool = False
    in_memory_mib: int = 1024
    seed: int = 0
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError when a setting is outside what it may be."""
        check_types(self, ConfigError)
        if self.trunk != AUTO:
            trunk_kind(self.trunk)
        self._check_conditioning()
        if self.calibrate_mean not in MEAN_CALIBRATIONS:
            raise ConfigError(unknown_name("calibrate_mean", self.calibrate_mean, MEAN_CALIBRATIONS))
        self._check_objective()
        for name in _AT_LEAST_ONE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}")
        if self.any_size and self.trunk == "linear":
            raise ConfigError(
                "any_size needs a trunk that reads any size; the linear one reads the shape it was fitted on"
            )
        if self.in_memory_mib < 0:
            raise ConfigError(f"in_memory_mib must not be negative; got {self.in_memory_mib}")
        if self.width % 8:
            raise ConfigError(f"width must be a multiple of 8; got {self.width}")
        if self.num_updates is not None and self.num_updates < 1:
            raise ConfigError(f"num_updates must be at least 1, or None; got {self.num_updates}")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be positive; got {self.learning_rate}")
        if self.input_noise < 0:
            raise ConfigError(f"input_noise must not be negative; got {self.input_noise}")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay must not be negative; got {self.weight_decay}")
        if not 0 < self.holdout_fraction <= 0.5:
            raise ConfigError(f"holdout_fraction must lie in (0, 0.5]; got {self.holdout_fraction}")
        if not 0 <= self.refit_fraction < math.inf:
            raise ConfigError(f"refit_fraction must be finite and not negative; got {self.refit_fraction}")
        if self.min_samples < 16:
            raise ConfigError(f"min_samples must be at least 16; got {self.min_samples}")
        if self.ridge_alpha is not None and not self.ridge_alpha > 0:
            raise ConfigError(f"ridge_alpha must be positive, or None; got {self.ridge_alpha}")

    def _check_objective(self) -> None:
        objectives = SCORE_OBJECTIVES + PREFERENCE_OBJECTIVES
        if self.objective not in objectives:
            raise ConfigError(unknown_name("objective", self.objective, objectives))
        if not self.huber_delta > 0:
            raise ConfigError(f"huber_delta must be positive; got {self.huber_delta}")
        if self.trunk == AUTO or not trunk_kind(self.trunk).closed_form:
            return
        if self.objective != "mse" and (self.trunk, self.objective) != ("linear", "bradley_terry"):
            raise ConfigError(
                f"trunk {self.trunk!r} is fitted by 'mse' (ridge), and 'linear' also by 'bradley_terry' (logistic "
                f"regression), not by {self.objective!r}; choose another trunk or objective"
            )

    def _check_conditioning(self) -> None:
        closed = self.trunk != AUTO and trunk_kind(self.trunk).closed_form
        if self.noise_levels is not None:
            pair = isinstance(self.noise_levels, tuple | list) and len(self.noise_levels) == 2
            if not pair or not 0 <= self.noise_levels[0] < self.noise_levels[1] <= 1:
                raise ConfigError(f"noise_levels must be (low, high), 0 <= low < high <= 1; got {self.noise_levels}")
            if closed:
                raise ConfigError(f"trunk {self.trunk!r} is linear and has no time; set noise_levels=None")
            # JSON and YAML give a list.
            self.noise_levels = (float(self.noise_levels[0]), float(self.noise_levels[1]))
            if self.trunk != AUTO and trunk_kind(self.trunk).needs_codec:
                raise ConfigError(f"trunk {self.trunk!r} draws clean latents and has no time; set noise_levels=None")
        if self.adapter_rank < 0:
            raise ConfigError(f"adapter_rank must not be negative; got {self.adapter_rank}")
        if self.adapter_rank and self.trunk not in (AUTO, "backbone"):
            raise ConfigError(f"adapter_rank={self.adapter_rank} needs trunk='backbone'; got {self.trunk!r}")
        if self.selection_budget is not None and self.selection_budget < 1:
            raise ConfigError(f"selection_budget must be at least 1, or None; got {self.selection_budget}")

    @property
    def in_memory_bytes(self) -> int:
        """``in_memory_mib`` in bytes."""
        return self.in_memory_mib * 2**20

    @property
    def blocks(self) -> int:
        """``depth``, or the trunk's own."""
        return self.depth or trunk_kind(self.trunk).depth

    def updates(self, count: int) -> int:
        """Return the number of updates for ``count`` training samples."""
        kind = TrunkKind(AUTO) if self.trunk == AUTO else trunk_kind(self.trunk)
        return self.num_updates or min(kind.most_updates, max(200, kind.passes * count // self.batch_size))
