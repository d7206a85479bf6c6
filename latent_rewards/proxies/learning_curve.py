"""What more labels would bring: the same proxy refitted on parts of its data, and the power law through its errors.

With errors e(n) at n labels (1 - Spearman, 1 - R2, MAE), the least-squares slope b of ``log e`` on ``log n`` gives
``e(2 N) = e(N) 2^b`` (Hestness et al. 2017; a positive b, that is noise, counts as 0: no gain is promised). A power law
without a floor is hopeful: a metric's own noise cannot be learned away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latent_rewards.contracts import DataError
from latent_rewards.proxies.report import accuracy
from latent_rewards.training.randomness import generator

FRACTIONS = (0.25, 0.5)
"""Parts of the training data that are refitted, beside all of it."""

_MIN_ROWS = 16
_MIN_VALUES = 5
_TINY = 1e-9


def nested_parts(rewards: Tensor, names: Sequence[str], training: Tensor, seed: int) -> list[Tensor]:
    """Return for each fraction which of the ``training`` samples to refit on (sorted), each part within the next.

    Args:
        rewards: ``[N, R]``, NaN where one does not apply.
        names: of the rewards.
        training: int64 ``[n]``.
        seed: of the choice.

    Raises:
        DataError: a part has fewer than 16 samples, or fewer than 5 values or only one value of a reward.
    """
    order = torch.randperm(len(training), generator=generator(seed, "proxy/learning_curve", 0))
    parts = [training[order[: round(fraction * len(training))]].sort().values for fraction in FRACTIONS]
    for part in parts:
        if len(part) < _MIN_ROWS:
            raise DataError(
                f"a quarter of {len(training)} training samples is {len(part)}, fewer than the {_MIN_ROWS} a learning "
                "curve needs; collect more, or set learning_curve=False"
            )
        for name, values in zip(names, rewards[part].T, strict=True):
            known = values[~values.isnan()]
            if len(known) < _MIN_VALUES or float(known.max() - known.min()) == 0:
                raise DataError(
                    f"reward {name!r} has {len(known)} values, {len(known.unique())} of them distinct, in a part of "
                    f"{len(part)} samples of the learning curve; collect more, or set learning_curve=False"
                )
    return parts


def learning_curves(
    refit: Callable[[Tensor], Tensor], parts: Sequence[Tensor], predicted: Tensor, truth: Tensor, known: Tensor
) -> list[dict[str, Any]]:
    """Return the learning curve of every reward.

    Args:
        refit: int64 rows -> predictions ``[m, R]`` for the held-out samples by the same proxy, fitted on those rows.
        parts: of :func:`nested_parts`, followed by all training rows.
        predicted: what the proxy that was fitted on all of them predicts, ``[m, R]``.
        truth: held-out rewards ``[m, R]``, NaN where one does not apply.
        known: bool ``[N, R]``, which rewards apply to which row.

    Returns:
        Per reward ``{"num_train", "spearman", "r2", "mae"}``, lists from the smallest part to all, and ``"twice"``:
        the same four as numbers, expected at twice the labels; None where a score is not known.
    """
    stages = [*(refit(part) for part in parts[:-1]), predicted]
    curves = []
    for column in range(truth.shape[1]):
        scores = [accuracy(stage[:, column], truth[:, column]) for stage in stages]
        curve: dict[str, Any] = {"num_train": [int(known[part, column].sum()) for part in parts]}
        curve |= {key: [_number(score[key]) for score in scores] for key in ("spearman", "r2", "mae")}
        curves.append({**curve, "twice": expect_twice(curve)})
    return curves


def expect_twice(curve: dict[str, Any]) -> dict[str, float | int | None]:
    """Return spearman, r2 and mae expected at twice the largest ``num_train`` of a curve; None where one is unknown."""
    sizes = curve["num_train"]
    expected: dict[str, float | int | None] = {"num_train": 2 * sizes[-1]}
    for key, best in (("spearman", 1.0), ("r2", 1.0), ("mae", 0.0)):
        values = curve[key]
        if any(value is None for value in values):
            expected[key] = None
            continue
        errors = [abs(best - value) for value in values]
        twice = errors[-1] * 2 ** min(0.0, power_law_exponent(sizes, errors))
        expected[key] = best - twice if best else twice
    return expected


def power_law_exponent(sizes: Sequence[int], errors: Sequence[float]) -> float:
    """Return the least-squares slope of ``log error`` on ``log size``."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).clamp(min=_TINY).log()
    centred = x - x.mean()
    return float((centred * y).sum() / centred.square().sum())


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
