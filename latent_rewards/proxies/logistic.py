"""Logistic regression on differences of plain features: the linear proxy of preferences, and the baseline of any other.

Bradley-Terry with a linear score ``s = w'f`` is a logistic regression of "the first wins" on ``f_1 - f_2`` without
intercept; scikit-learn's ``LogisticRegression`` minimises ``|w|^2 / 2 + C sum(loss)``, with C = 1 / alpha. A tie counts
as half a win of either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rewards.proxies.linear import RELATIVE_ALPHAS
from latent_rewards.proxies.preferences import bradley_terry, outcome_error


def fit_logistic(differences: Tensor, outcome: Tensor, alpha: float | None, validation: Tensor) -> Tensor:
    """Fit scores to pairs.

    Args:
        differences: ``[n, D]``, features of the first less those of the second.
        outcome: ``[n]``: 1, 0 or 0.5; not all 0.5.
        alpha: penalty; None chooses one with the rows of ``validation`` and then uses all rows.
        validation: bool ``[n]``.

    Returns:
        float64 weights ``[D]``.
    """
    differences, outcome = differences.double().cpu(), outcome.double().cpu()
    decided = outcome != 0.5
    if alpha is None:
        scale = float(differences.square().sum(dim=1).mean())
        candidates = [max(relative * scale, 1e-12) for relative in RELATIVE_ALPHAS]
        rows, held = ~validation, validation & decided
        if not bool(held.any()) or not bool((rows & decided).any()):
            alpha = candidates[-1]
        else:
            errors = []
            for candidate in candidates:
                scores = differences[held] @ _solve(differences[rows], outcome[rows], candidate)
                errors.append(float(outcome_error(bradley_terry(scores), outcome[held])))
            alpha = candidates[min(range(len(errors)), key=errors.__getitem__)]
    return _solve(differences, outcome, alpha)


def _solve(differences: Tensor, outcome: Tensor, alpha: float) -> Tensor:
    from sklearn.linear_model import LogisticRegression

    won, tied = outcome != 0.5, outcome == 0.5
    ahead = differences[won] * (2 * outcome[won] - 1)[:, None]
    # Every other row is turned round, with the same loss, because scikit-learn refuses data of one class.
    sign = 1 - 2 * (torch.arange(len(ahead)) % 2).double()
    rows = torch.cat([ahead * sign[:, None], differences[tied], differences[tied]])
    ones = torch.ones(int(tied.sum()), dtype=torch.float64)
    labels = torch.cat([sign > 0, ones > 0, ones < 0])
    weights = torch.cat([torch.ones(len(ahead), dtype=torch.float64), ones / 2, ones / 2])
    if not bool(tied.any()) and len(ahead) == 1:
        rows, labels, weights = torch.cat([rows, -rows]), torch.tensor([True, False]), weights.repeat(2) / 2
    model = LogisticRegression(C=1 / alpha, fit_intercept=False, max_iter=1000, tol=1e-6)
    model.fit(rows.numpy(), labels.numpy(), sample_weight=weights.numpy())
    return torch.from_numpy(model.coef_[0])
