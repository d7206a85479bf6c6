"""What a proxy says of samples."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from latent_rewards.contracts import DataError
from latent_rewards.proxies.conformal import level_index


@dataclass(frozen=True)
class ProxyPrediction:
    """What a proxy says of B samples, each ``{reward name: [B]}``.

    Attributes:
        mean: predicted reward, in the metric's units.
        std: its calibrated standard deviation (see :mod:`latent_rewards.proxies.calibration`).
        ood: in [0, 1], how far the latents lie from the training data (see :mod:`latent_rewards.proxies.ood`); a
            property of the latents and prompts, so it is the same for every reward.
        ratios: ``{reward name: [999]}``, the held-out quantiles of ``|error| / std`` at levels k/1000.
    """

    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    ood: dict[str, Tensor]
    ratios: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def interval(self, level: float = 0.9) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the ends ``{reward name: [B]}``, low and high, of split-conformal intervals (Vovk et al. 2005).

        On samples exchangeable with the n held-out ones they cover with at least probability ``level``, up to
        fitting two numbers of the standard deviation on the same n; a level above n / (n + 1) gives infinite ends.

        Raises:
            ConfigError: ``level`` lies outside (0, 0.999].
            DataError: the prediction has no ``ratios``.
        """
        index = level_index(level)
        if set(self.ratios) != set(self.mean):
            raise DataError("this prediction has no ratios of a proxy's calibration; make it by RewardProxy.predict")
        widths = {name: self.ratios[name][index - 1].to(std) * std for name, std in self.std.items()}
        low = {name: mean - widths[name] for name, mean in self.mean.items()}
        return low, {name: mean + widths[name] for name, mean in self.mean.items()}
