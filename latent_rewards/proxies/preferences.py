"""Preferences: which of two samples is better, or that neither is; and how likely that is for given scores.

With ``d = s_1 - s_2`` the difference of the scores of two samples:

Bradley-Terry with Davidson's ties (Bradley & Terry 1952; Davidson 1970, JASA 65; the form of Firth, Kosmidis & Turner
2019, arXiv 1909.07123, section 1.1), for strengths ``pi = e^s`` and a tie parameter ``nu >= 0``::

    P(1 wins) : P(tie) : P(2 wins)  =  pi_1 : nu sqrt(pi_1 pi_2) : pi_2  =  e^(d/2) : nu : e^(-d/2)

nu = 0 is the Bradley-Terry model; for equal samples a tie has probability nu / (2 + nu).

Thurstone with ties (Thurstone 1927, case III; Glenn & David 1960, Biometrics 16): the judge sees each score with
Gaussian noise of its own variance and calls a tie where the difference is below a threshold tau >= 0::

    P(1 wins) = Phi((d - tau) / sigma),   P(2 wins) = Phi((-d - tau) / sigma),   sigma^2 = V_1 + V_2

V may depend on the sample, and on how noisy the latents are in which it is seen (noise-calibrated, as DiNa-LRM, arXiv
2602.11146, does with the time of a diffusion state): ``V = v(sample) + kappa noise^2``.

A score means nothing alone: a shift of all scores changes no probability. Nor does another shift for each prompt while
only samples of one prompt are compared, so compare such scores within a prompt. With Thurstone's model scores, sigma
and tau also have a common scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_rewards.contracts import DataError

FIRST, TIE, SECOND = 0, 1, 2
"""Columns of the log-probabilities of outcomes."""


@dataclass(eq=False)
class Preferences:
    """M judgements of two samples each, the rewards of :func:`latent_rewards.proxies.train_proxy` in another form.

    Attributes:
        first: int64 ``[M]``, rows of the latents.
        second: int64 ``[M]``, the samples they were compared with.
        outcome: ``[M]``: 1 the first is better, 0 the second is, 0.5 a tie.
        noise: ``[N]``, one per row of the latents, or None: how noisy these latents are, for example sigma of x_t,
            where the judge saw the clean sample; at least 0. It adds to the variance of Thurstone's model.
        across_prompts: pairs may have different prompts; else such a pair is an error.

    Raises:
        DataError: wrong shapes or types, an outcome that is none of the three, a pair of a sample with itself, ties
            only.
    """

    first: Tensor
    second: Tensor
    outcome: Tensor
    noise: Tensor | None = None
    across_prompts: bool = False

    def __post_init__(self) -> None:
        """Bring the fields to their types, and check what can be checked without the latents."""
        self.first, self.second = _indices("first", self.first), _indices("second", self.second)
        self.outcome = torch.as_tensor(self.outcome).detach().to("cpu", torch.float64)
        shapes = {tuple(values.shape) for values in (self.first, self.second, self.outcome)}
        if len(shapes) > 1:
            raise DataError(f"first, second and outcome must have one length; got shapes {sorted(shapes)}")
        wrong = ~torch.isin(self.outcome, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
        if bool(wrong.any()):
            pair = _where(wrong)
            raise DataError(
                f"outcome {float(self.outcome[pair]):g} of pair {pair} is none of 1 (first wins), 0 (second wins), 0.5 "
                f"(tie); {int(wrong.sum())} such: convert or drop them"
            )
        same = self.first == self.second
        if bool(same.any()):
            pair = _where(same)
            raise DataError(f"pair {pair} compares sample {int(self.first[pair])} with itself; drop it")
        if len(self) and bool((self.outcome == 0.5).all()):
            raise DataError(f"all {len(self)} pairs are ties; there is nothing to learn: add pairs with a winner")
        if self.noise is not None:
            self.noise = torch.as_tensor(self.noise).detach().to("cpu", torch.float64)
            if self.noise.ndim != 1 or not bool((torch.isfinite(self.noise) & (self.noise >= 0)).all()):
                raise DataError("noise must be [N], one per row of the latents, finite and not negative")

    def __len__(self) -> int:
        """Return M."""
        return len(self.first)

    @property
    def pairs(self) -> Tensor:
        """Both samples of every pair, int64 ``[M, 2]``."""
        return torch.stack([self.first, self.second], dim=1)

    @property
    def decided(self) -> Tensor:
        """Whether a pair has a winner, bool ``[M]``."""
        return self.outcome != 0.5


def name_preferences(rewards: object) -> tuple[str, Preferences] | None:
    """Return the name and the preferences if that is what ``rewards`` are, "preference" if they have no name.

    Raises:
        DataError: more than one reward beside or of preferences.
    """
    if isinstance(rewards, Preferences):
        return "preference", rewards
    if isinstance(rewards, Mapping) and any(isinstance(values, Preferences) for values in rewards.values()):
        if len(rewards) > 1:
            raise DataError(f"a proxy of preferences has one reward; got {sorted(rewards)}: train one proxy for each")
        name, values = next(iter(rewards.items()))
        return str(name), values
    return None


def check_preferences(preferences: Preferences, count: int, prompt_ids: Tensor | None, min_pairs: int) -> None:
    """Check preferences against the samples they are about.

    Args:
        preferences: M pairs.
        count: N, the number of samples.
        prompt_ids: int64 ``[N]``, equal for equal prompts, or None without prompts.
        min_pairs: fewest pairs that are accepted.

    Raises:
        DataError: too few pairs, an index out of range, noise of another length, or pairs of different prompts.
    """
    if len(preferences) < min_pairs:
        raise DataError(f"{len(preferences)} pairs are too few to fit a proxy; at least {min_pairs} (min_samples)")
    pairs = preferences.pairs
    outside = ((pairs < 0) | (pairs >= count)).any(dim=1)
    if bool(outside.any()):
        pair = _where(outside)
        raise DataError(
            f"pair {pair} names samples {pairs[pair].tolist()}, but there are {count} latents (0 to {count - 1})"
        )
    if preferences.noise is not None and len(preferences.noise) != count:
        raise DataError(f"noise has {len(preferences.noise)} values for {count} latents; give one per row")
    if prompt_ids is None or preferences.across_prompts:
        return
    mixed = prompt_ids[pairs[:, 0]] != prompt_ids[pairs[:, 1]]
    if bool(mixed.any()):
        pair = _where(mixed)
        raise DataError(
            f"pair {pair} compares samples {pairs[pair].tolist()} of different prompts ({int(mixed.sum())} such "
            "pairs): which is better says little then; drop them, or set Preferences(across_prompts=True)"
        )


def bradley_terry(difference: Tensor, log_tie: Tensor | None = None) -> Tensor:
    """Return log-probabilities of the outcomes in the Bradley-Terry model with Davidson's ties.

    Args:
        difference: ``[...]``, score of the first less that of the second: log-odds of a win.
        log_tie: log nu, ``[]``; None: ties do not happen (nu = 0).

    Returns:
        ``[..., 3]``: first wins, tie, second wins; in the dtype of ``difference``, at least float32.
    """
    difference = difference.to(torch.promote_types(difference.dtype, torch.float32))
    if log_tie is None:
        never = torch.full_like(difference, -torch.inf)
        win = torch.nn.functional.logsigmoid
        return torch.stack([win(difference), never, win(-difference)], dim=-1)
    tie = log_tie.to(difference).expand_as(difference)
    return torch.stack([difference / 2, tie, -difference / 2], dim=-1).log_softmax(dim=-1)


def thurstone(difference: Tensor, variance: Tensor, tie: Tensor | None = None) -> Tensor:
    """Return log-probabilities of the outcomes in Thurstone's model with ties below a threshold.

    Args:
        difference: ``[...]``, score of the first less that of the second.
        variance: positive, broadcasts with ``difference``: sigma^2, see :func:`judgement_variance`.
        tie: tau > 0, ``[]``, in the unit of the scores; None: ties do not happen (tau = 0).

    Returns:
        ``[..., 3]``: first wins, tie, second wins; in the dtype of ``difference``, at least float32.
    """
    dtype = torch.promote_types(difference.dtype, torch.float32)
    scale = variance.to(dtype).rsqrt()
    z = difference.to(dtype) * scale
    if tie is None:
        never = torch.full_like(z, -torch.inf)
        return torch.stack([torch.special.log_ndtr(z), never, torch.special.log_ndtr(-z)], dim=-1)
    threshold = tie.to(dtype) * scale
    first, second = torch.special.log_ndtr(z - threshold), torch.special.log_ndtr(-z - threshold)
    # Phi(b) - Phi(a) for the interval mirrored into the lower tail, where both logarithms are exact.
    upper, lower = torch.special.log_ndtr(threshold - z.abs()), torch.special.log_ndtr(-threshold - z.abs())
    return torch.stack([first, upper + (-torch.expm1(lower - upper)).log(), second], dim=-1)


def judgement_variance(log_variance: Tensor, noise: Tensor | None = None, noise_scale: Tensor | None = None) -> Tensor:
    """Return sigma^2 ``[...]``, the variance of the difference of two noisy scores: ``sum_i v_i + kappa noise_i^2``.

    Args:
        log_variance: ``[..., 2]``, log v of both samples.
        noise: ``[..., 2]``, their noise levels, or None.
        noise_scale: kappa, ``[]``; None adds no noise.
    """
    variance = log_variance.to(torch.promote_types(log_variance.dtype, torch.float32)).exp()
    if noise is not None and noise_scale is not None:
        variance = variance + noise_scale.to(variance) * noise.to(variance).square()
    return variance.sum(dim=-1)


def outcome_error(log_probabilities: Tensor, outcome: Tensor) -> Tensor:
    """Return the mean negative log-likelihood, nats per pair, of outcomes ``[M]`` (1, 0, 0.5; NaN has no weight).

    Args:
        log_probabilities: ``[M, 3]``, see :func:`bradley_terry`.
        outcome: ``[M]``.
    """
    known = ~outcome.isnan()
    column = ((1 - outcome[known]) * 2).round().long()
    chosen = log_probabilities[known].gather(-1, column[:, None])
    return -chosen.sum() / known.sum().clamp(min=1)


def _indices(name: str, values: Tensor) -> Tensor:
    tensor = torch.as_tensor(values).detach().cpu()
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"{name} must be whole numbers [M], rows of the latents; got {tensor.dtype} "
                        f"{tuple(tensor.shape)}")  # fmt: skip
    return tensor.long()


def _where(mask: Tensor) -> int:
    return int(mask.nonzero()[0])
