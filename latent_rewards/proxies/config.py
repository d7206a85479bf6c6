"""Settings of a reward proxy and of its training."""

from __future__ import annotations

from dataclasses import dataclass

from latent_rewards.contracts import ConfigError, unknown_name
from latent_rewards.proxies.objectives import PREFERENCE_OBJECTIVES, SCORE_OBJECTIVES

TRUNKS = ("conv3d", "linear")


@dataclass
class ProxyConfig:
    """Settings of :func:`latent_rewards.proxies.train_proxy`.

    Attributes:
        trunk: "conv3d" (an ensemble of small residual networks) or "linear" (one exact ridge regression).
        objective: for rewards that are numbers "mse", "huber" (robust: single wild labels weigh less) or "gaussian"
            (the network also predicts the noise of each label, so ``std`` follows noise that differs between samples);
            for :class:`latent_rewards.proxies.Preferences` "bradley_terry" or "thurstone" (the network also predicts
            how undecided the judge is on each sample). The linear trunk knows "mse" and "bradley_terry".
        huber_delta: where the Huber loss turns linear, in standard deviations of the reward.
        width: channels of the conv3d trunk, a multiple of 8.
        depth: residual blocks of the conv3d trunk.
        ensemble_size: networks; each leaves another part of the data out. A linear proxy has one.
        num_updates: most updates per network; None chooses ``clamp(18 N / batch_size, 200, 600)`` for N samples.
        batch_size: samples per update.
        learning_rate: peak of the one-cycle schedule of AdamW.
        weight_decay: of AdamW.
        input_noise: standard deviation of Gaussian noise on the training latents, in units of each channel's standard
            deviation; a proxy that is climbed must not change with what no eye can see. The linear trunk has none.
        holdout_fraction: part of the data kept for the report and the calibration, in (0, 0.5].
        patience: evaluations (one every 25 updates) without improvement after which a network stops.
        min_samples: fewest samples, in all and per reward, that are accepted.
        use_prompts: condition on the prompts, where there are any.
        text_features: dimensions prompts are hashed to.
        ridge_alpha: penalty of the linear trunk, as scikit-learn's; None chooses it on held-out data.
        seed: root of all randomness.
        device: torch device; None takes the accelerator if there is one. The proxy stays there.
        progress: draw a progress bar.
    """

    trunk: str = "conv3d"
    objective: str = "mse"
    huber_delta: float = 1.0
    width: int = 64
    depth: int = 2
    ensemble_size: int = 3
    num_updates: int | None = None
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    input_noise: float = 0.3
    holdout_fraction: float = 0.15
    patience: int = 8
    min_samples: int = 32
    use_prompts: bool = True
    text_features: int = 256
    ridge_alpha: float | None = None
    seed: int = 0
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError when a setting is outside what it may be."""
        if self.trunk not in TRUNKS:
            raise ConfigError(unknown_name("trunk", self.trunk, TRUNKS))
        objectives = SCORE_OBJECTIVES + PREFERENCE_OBJECTIVES
        if self.objective not in objectives:
            raise ConfigError(unknown_name("objective", self.objective, objectives))
        if self.trunk == "linear" and self.objective not in ("mse", "bradley_terry"):
            raise ConfigError(
                f"the linear trunk is fitted by 'mse' (ridge) or 'bradley_terry' (logistic regression), not by "
                f"{self.objective!r}; choose another trunk or objective"
            )
        if not self.huber_delta > 0:
            raise ConfigError(f"huber_delta must be positive; got {self.huber_delta}")
        for name in ("width", "depth", "ensemble_size", "batch_size", "patience", "text_features"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
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
        if self.min_samples < 16:
            raise ConfigError(f"min_samples must be at least 16; got {self.min_samples}")
        if self.ridge_alpha is not None and not self.ridge_alpha > 0:
            raise ConfigError(f"ridge_alpha must be positive, or None; got {self.ridge_alpha}")

    def updates(self, count: int) -> int:
        """Return the number of updates for ``count`` training samples."""
        return self.num_updates or min(600, max(200, 18 * count // self.batch_size))
