"""Isotonic calibration of predicted rewards: a monotone map that is differentiable and never flat.

Isotonic regression (Zadrozny & Elkan 2002) of held-out rewards on predictions corrects a mean that is shrunk,
stretched or bent, but its plateaus would stop a gradient. Here it is read at 33 knots, quantiles of the held-out
predictions, joined by straight lines; a slope below a floor is raised to it, and the map is shifted so that its mean
over the held-out samples stays the rewards' mean. Beyond the outermost predictions it rises with the floor's slope: it
promises little where nothing was seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SLOPE_FLOOR = 0.05
"""Least slope, in standard deviations of the reward per predicted standard deviation."""

_KNOTS = 33
_EVENNESS = 1e-3
_MIN_SAMPLES = 5


class MonotoneMap(nn.Module):
    """Standardised predictions ``[B, R]`` -> calibrated ones; the identity until :meth:`fit`.

    Args:
        num_rewards: R.
    """

    positions: Tensor
    values: Tensor
    outer_slope: Tensor

    def __init__(self, num_rewards: int) -> None:
        super().__init__()
        knots = torch.linspace(-3, 3, _KNOTS).expand(num_rewards, _KNOTS)
        self.register_buffer("positions", knots.clone())
        self.register_buffer("values", knots.clone())
        self.register_buffer("outer_slope", torch.ones(num_rewards))

    def forward(self, predicted: Tensor) -> Tensor:
        """Return the calibrated predictions ``[B, R]``, differentiably; strictly increasing in each prediction."""
        rows = predicted.T
        upper = torch.searchsorted(self.positions, rows.detach().to(self.positions).contiguous()).clamp(1, _KNOTS - 1)
        left, right = self.positions.gather(1, upper - 1), self.positions.gather(1, upper)
        low, high = self.values.gather(1, upper - 1), self.values.gather(1, upper)
        inside = low + (high - low) / (right - left) * (rows - left)
        first, last = self.positions[:, :1], self.positions[:, -1:]
        below = self.values[:, :1] + self.outer_slope[:, None] * (rows - first)
        above = self.values[:, -1:] + self.outer_slope[:, None] * (rows - last)
        return torch.where(rows < first, below, torch.where(rows > last, above, inside)).T

    @torch.no_grad()
    def fit(self, predicted: Tensor, target: Tensor) -> None:
        """Set the map from held-out predictions and rewards ``[n, R]``, NaN where a reward is unknown.

        A reward with fewer than 5 known values, or one predicted value, keeps the map it has.
        """
        from sklearn.isotonic import IsotonicRegression

        for column in range(target.shape[1]):
            known = ~target[:, column].isnan()
            x, y = predicted[known, column].double().cpu(), target[known, column].double().cpu()
            if len(x) < _MIN_SAMPLES or float(x.max() - x.min()) <= 1e-9:
                continue
            even = torch.linspace(0, 1, _KNOTS, dtype=x.dtype)
            # Equal predictions give equal quantiles; a little of an even grid lets them be joined by lines.
            knots = torch.lerp(torch.quantile(x, even), x.min() + even * (x.max() - x.min()), _EVENNESS)
            fitted = IsotonicRegression(out_of_bounds="clip").fit(x.numpy(), y.numpy())
            levels = torch.from_numpy(fitted.predict(knots.numpy())).double()
            rises = torch.maximum(levels.diff(), SLOPE_FLOOR * knots.diff())
            self.positions[column] = knots
            self.values[column] = torch.cat([levels[:1], levels[0] + rises.cumsum(0)])
            self.outer_slope[column] = SLOPE_FLOOR
            shift = y.mean() - self(predicted[known].to(self.positions))[:, column].double().mean().cpu()
            self.values[column] += shift
