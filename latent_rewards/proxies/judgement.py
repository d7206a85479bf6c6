"""The parameters that turn scores into probabilities of outcomes, and how they are fitted."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latent_rewards.proxies.objectives import split_outputs
from latent_rewards.proxies.preferences import bradley_terry, judgement_variance, outcome_error, thurstone

PRIOR_STD = 0.5
"""Standard deviation of the normal priors on the logarithms that :func:`calibrate` fits."""


@dataclass
class Duels:
    """What n pairs are judged by.

    Attributes:
        scores: ``[n, 2]``.
        outcome: ``[n]``: 1, 0 or 0.5.
        log_variance: ``[n, 2]``, log v of Thurstone's model, or None.
        noise: ``[n, 2]``, or None.
    """

    scores: Tensor
    outcome: Tensor
    log_variance: Tensor | None = None
    noise: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Duels:
        """Return the pairs at ``rows``."""
        log_variance = None if self.log_variance is None else self.log_variance[rows]
        return Duels(
            self.scores[rows], self.outcome[rows], log_variance, None if self.noise is None else self.noise[rows]
        )


class Judgement(nn.Module):
    """Scores of two samples -> log-probabilities of the outcomes.

    Its parameters are logarithms; minus infinity says that there are no ties, or no noise levels.

    Args:
        objective: "bradley_terry" or "thurstone".

    Attributes:
        log_tie: ``[]``, log nu of Bradley-Terry or log tau of Thurstone.
        log_noise: ``[]``, log kappa of Thurstone.
    """

    def __init__(self, objective: str) -> None:
        super().__init__()
        self.objective = objective
        self.log_tie = nn.Parameter(torch.tensor(-math.inf), requires_grad=False)
        self.log_noise = nn.Parameter(torch.tensor(-math.inf), requires_grad=False)

    def start(self, tie_rate: float, noise: bool) -> None:
        """Set what training starts from: the tie parameter that ``tie_rate`` implies between equal samples, kappa = 1.

        With a ``tie_rate`` of 0 there are no ties, and without ``noise`` no noise levels.
        """
        with torch.no_grad():
            if tie_rate and self.objective == "bradley_terry":
                self.log_tie.fill_(math.log(2 * tie_rate / (1 - tie_rate)))
            elif tie_rate:
                # An untrained network predicts v near 1, so sigma^2 is near 2.
                quantile = torch.special.ndtri(torch.tensor((1 + tie_rate) / 2, dtype=torch.float64))
                self.log_tie.fill_(math.log(float(quantile) * math.sqrt(2)))
            if noise:
                self.log_noise.fill_(0.0)

    def forward(self, duels: Duels, log_scale: Tensor | None = None) -> Tensor:
        """Return log-probabilities ``[n, 3]``: first wins, tie, second wins; ``e^log_scale`` multiplies the scores."""
        difference = duels.scores[:, 0] - duels.scores[:, 1]
        if log_scale is not None:
            difference = difference * log_scale.exp()
        ties = self.log_tie if bool(torch.isfinite(self.log_tie)) else None
        if self.objective == "bradley_terry":
            return bradley_terry(difference, ties)
        assert duels.log_variance is not None  # noqa: S101 - for the type checker: thurstone's heads predict it
        kappa = self.log_noise.exp() if bool(torch.isfinite(self.log_noise)) else None
        variance = judgement_variance(duels.log_variance, duels.noise, kappa)
        return thurstone(difference, variance, None if ties is None else ties.exp())

    @torch.no_grad()
    def rescale(self, log_factor: float) -> None:
        """Express the parameters in scores that ``e^log_factor`` has multiplied; a model with no scale is unchanged."""
        if self.objective == "thurstone":
            self.log_tie.add_(log_factor)
            self.log_noise.add_(2 * log_factor)


class Judge(nn.Module):
    """A member of the ensemble and its own judgement: what is trained on pairs.

    Args:
        member: latents and prompts -> outputs ``[2 B, O]``; samples 2 i and 2 i + 1 are a pair.
        judgement: its parameters are trained along.
    """

    def __init__(self, member: nn.Module, judgement: Judgement) -> None:
        super().__init__()
        self.member, self.judgement = member, judgement

    def forward(self, latents: Tensor, prompt_features: Tensor | None) -> Tensor:
        """Return the member's outputs."""
        return self.member(latents, prompt_features)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of pairs.

        Args:
            outputs: ``[2 B, O]``.
            targets: ``[B, 3]``: the outcome and the noise levels of both samples.
        """
        scores, log_variance = split_outputs(outputs, 1)
        paired = None if log_variance is None else log_variance.reshape(-1, 2)
        duels = Duels(scores.reshape(-1, 2), targets[:, 0], paired, targets[:, 1:])
        return outcome_error(self.judgement(duels), targets[:, 0])


def calibrate(judgement: Judgement, duels: Duels) -> float:
    """Fit the scale of the scores and the judgement's parameters to pairs the scores were not fitted to.

    Networks are over- or underconfident; afterwards differences of ``factor * scores`` are what the model takes them
    for. The fit maximises the posterior for normal priors on the logarithms, the scale around 1 and the parameters
    around what they were, with standard deviation :data:`PRIOR_STD`: with few pairs little moves, with many the priors
    vanish.

    Args:
        judgement: is changed in place.
        duels: n pairs; scores in the unit that ``judgement`` is in.

    Returns:
        The factor.
    """
    fitted = deepcopy(judgement).to(duels.scores.device, torch.float64).requires_grad_(True)
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    parameters = [log_scale, *(p for p in fitted.parameters() if bool(torch.isfinite(p)))]
    priors = [parameter.detach().clone() for parameter in parameters]
    exact = Duels(
        duels.scores.double(),
        duels.outcome.double(),
        None if duels.log_variance is None else duels.log_variance.double(),
        None if duels.noise is None else duels.noise.double(),
    )
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        likelihood = outcome_error(fitted(exact, log_scale), exact.outcome) * len(exact.outcome)
        pull = sum((p - prior).square() for p, prior in zip(parameters, priors, strict=True)) / (2 * PRIOR_STD**2)
        posterior = likelihood + pull
        posterior.backward()
        return posterior

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        for mine, found in zip(judgement.parameters(), fitted.parameters(), strict=True):
            mine.copy_(found)
    return float(log_scale.detach().exp())


@torch.no_grad()
def crossfit_log_probabilities(judgement: Judgement, duels: Duels) -> Tensor:
    """Return log-probabilities ``[n, 3]``, each half of the pairs judged by what the other half calibrates."""
    count = len(duels.outcome)
    result = torch.empty(count, 3, dtype=torch.float64)
    for half in (0, 1):
        judged = torch.arange(count) % 2 == half
        own = deepcopy(judgement).to(duels.scores.device)
        factor = calibrate(own, duels[~judged])
        part = duels[judged]
        part.scores = part.scores * factor
        result[judged] = own(part).double().cpu()
    return result
