"""What a proxy said of samples before it was trained on them, kept beside it so that its report can be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from latent_rewards.proxies.calibration import Z_LEVEL, crossfit
from latent_rewards.proxies.ood import OodScore
from latent_rewards.proxies.samples import Samples, prompt_ids


@dataclass(frozen=True)
class HeldOut:
    """Predictions for n held-out samples, each calibrated by the half of them that it does not belong to.

    Attributes:
        predicted: float64 ``[n, R]``, in the rewards' units.
        std: float64 ``[n, R]``, their standard deviations.
        truth: float64 ``[n, R]``, NaN where a reward does not apply.
        ood: float32 ``[n]`` in [0, 1].
        prompts: int64 ``[n]``, equal for samples of one prompt.
    """

    predicted: Tensor
    std: Tensor
    truth: Tensor
    ood: Tensor
    prompts: Tensor

    def coverage(self) -> Tensor:
        """Return the share ``[R]`` of truths inside the 90 % interval; NaN where there is none."""
        inside = ((self.predicted - self.truth).abs() <= Z_LEVEL * self.std).double()
        return torch.where(self.truth.isnan(), torch.nan, inside).nanmean(dim=0)

    def tensors(self) -> dict[str, Tensor]:
        """Return the attributes by name, on the CPU."""
        return {field.name: getattr(self, field.name).cpu().contiguous() for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> HeldOut:
        """Invert :meth:`tensors`.

        Raises:
            KeyError: one is missing.
        """
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})


def heldout_prompts(samples: Samples, heldout: Tensor) -> Tensor:
    """Return int64 ``[n]``: numbers of the prompts of the samples at ``heldout``; all differ where there is none."""
    ids = prompt_ids(samples.prompts)
    return torch.arange(len(heldout)) if ids is None else ids[heldout].unique(return_inverse=True)[1]


def halve(prompts: Tensor) -> Tensor:
    """Return bool ``[n]``, which half each sample is in; samples of one prompt share a half if there are 10 prompts."""
    number = int(prompts.max()) + 1
    return (prompts if number >= 10 else torch.arange(len(prompts))) % 2 == 0


def judge(
    mean: Tensor,
    variance: Tensor,
    target: Tensor,
    prompts: Tensor,
    *,
    centre: Tensor,
    scale: Tensor,
    isotonic: bool = False,
) -> HeldOut:
    """Return held-out predictions with their cross-fitted calibration; ``ood`` is NaN.

    Args:
        mean: predictions ``[n, R]``, standardised.
        variance: the ensemble's ``[n, R]``; zero for a single regression.
        target: rewards ``[n, R]``, standardised, NaN where one does not apply.
        prompts: int64 ``[n]``.
        centre: means of the rewards ``[R]``.
        scale: their standard deviations ``[R]``.
        isotonic: calibrate the mean too.
    """
    mean, variance, target, centre, scale = (x.double().cpu() for x in (mean, variance, target, centre, scale))
    predicted, std = crossfit(mean, variance, target, halve(prompts), isotonic=isotonic)
    unknown = torch.full((len(mean),), torch.nan)
    return HeldOut(predicted * scale + centre, std * scale, target * scale + centre, unknown, prompts)


def crossfit_ood(distance: Tensor, disagreement: Tensor | None, prompts: Tensor) -> Tensor:
    """Return out-of-distribution scores ``[n]``, each half of the samples ranked against the other half."""
    halves, scores = halve(prompts), torch.empty(len(distance))
    for half in (True, False):
        judged, score = halves == half, OodScore()
        score.fit(distance[~judged], None if disagreement is None else disagreement[~judged])
        scores[judged] = score(distance[judged], (distance if disagreement is None else disagreement)[judged])
    return scores
