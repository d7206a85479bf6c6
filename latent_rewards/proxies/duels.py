"""Training a proxy on preferences: divide the pairs, fit each member, calibrate, report.

The held-out part shares no sample and no prompt with the training part. Pairs link what they compare, prompts where
there are at least ten and samples otherwise; linked things stay in one part. Where everything is linked (all samples
compared across each other) the things are divided and the pairs that would join the two parts are left out, with a
warning that says how many.

Each member is shifted to a mean score of 0 over the training samples, and with Thurstone's model scaled to a variance
V of 1/2, geometric mean over the training samples, so that two typical ones have ``V_1 + V_2 = 1``. The mean of the
members is then scaled by what makes its probabilities right on held-out pairs
(:func:`latent_rewards.proxies.judgement.calibrate`). So a difference of 1 means that the proxy is sure to odds of e : 1
(Bradley-Terry) or, between typical samples and without ties, to Phi(1) = 0.84 (Thurstone). A proxy that has learned
little scales its scores down, as a regression shrinks to the mean.

``std`` is the members' disagreement in that unit: nobody knows true scores to calibrate it by, and it includes what
pairs cannot tell, a shift of all scores of a prompt.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from latent_rewards.contracts import DataError
from latent_rewards.proxies.ensemble import Batch, Reader, fit_members, shuffled_batches
from latent_rewards.proxies.features import linear_features
from latent_rewards.proxies.heads import NetworkMember
from latent_rewards.proxies.judgement import Duels, Judge, Judgement, calibrate, crossfit_log_probabilities
from latent_rewards.proxies.linear import LinearMember
from latent_rewards.proxies.logistic import fit_logistic
from latent_rewards.proxies.objectives import split_outputs
from latent_rewards.proxies.preference_report import evaluate_preferences
from latent_rewards.proxies.preferences import Preferences
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.samples import MIN_GROUPS, MIN_HELDOUT
from latent_rewards.proxies.text import Prompts
from latent_rewards.training.randomness import generator

_LARGEST_SHARE = 0.2
_SMALL = 200
_CENTRE_ROWS = 4096
_BASELINE_ROWS = 2048
_FLOOR = 1e-6


class DuelReader:
    """Reads pairs as :func:`latent_rewards.proxies.ensemble.train_member` wants them; samples 2 i, 2 i + 1 are a pair.

    Args:
        samples: reads single samples.
        preferences: the pairs.
    """

    def __init__(self, samples: Reader, preferences: Preferences) -> None:
        self.samples, self.pairs = samples, preferences.pairs
        noise = torch.zeros(len(self.pairs), 2) if preferences.noise is None else preferences.noise[self.pairs]
        self._targets = torch.cat([preferences.outcome[:, None], noise], dim=1).to(samples.rewards)

    def __call__(self, indices: Tensor) -> Batch:
        """Return latents and prompts of ``[2 B]`` samples, and the targets, of the pairs at ``indices`` ``[B]``."""
        latents, prompts, _ = self.samples(self.pairs[indices].flatten())
        return latents, prompts, self.targets(indices)

    def noised(self, source: torch.Generator) -> DuelReader:
        """Return itself: preferences are learned from clean latents."""
        return self

    def batches(self, indices: Tensor, batch_size: int, count: int, source: torch.Generator) -> list[Tensor]:
        """Return batches of pairs; see :func:`latent_rewards.proxies.ensemble.shuffled_batches`."""
        return shuffled_batches(indices, batch_size, count, source)

    def targets(self, indices: Tensor) -> Tensor:
        """Return ``[B, 3]``: the outcome and the noise levels of both samples."""
        return self._targets[indices.to(self._targets.device)]

    def map(self, function: Callable[[Tensor, Tensor | None], Tensor], indices: Tensor) -> Tensor:
        """Return ``function(latents, prompts)``, ``[2 n, ...]``, with every distinct sample read once."""
        distinct, positions = self.pairs[indices].flatten().unique(return_inverse=True)
        values = self.samples.map(function, distinct)
        return values[positions.to(values.device)]


def split_pairs(
    preferences: Preferences, prompt_ids: Tensor | None, count: int, fraction: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Divide pairs so that no sample and no prompt of a held-out pair is trained on.

    Args:
        preferences: M pairs of N samples.
        prompt_ids: int64 ``[N]``, or None.
        count: N.
        fraction: of the groups that is held out (twice that where everything is linked, see the module).
        seed: root of the division.

    Returns:
        The sorted training pairs, the sorted held-out pairs, and int64 ``[M, 2]`` groups of both samples of each pair,
        which a fold keeps together.

    Raises:
        DataError: a part has fewer than five pairs with a winner.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    by_prompt = prompt_ids is not None and int(prompt_ids.max()) + 1 >= MIN_GROUPS
    units = (prompt_ids if prompt_ids is not None and by_prompt else torch.arange(count))[preferences.pairs]
    size = int(units.max()) + 1
    links = coo_array((torch.ones(len(units)).numpy(), tuple(units.T.numpy())), shape=(size, size))
    component = torch.from_numpy(connected_components(links, directed=False)[1]).long()[units]
    sizes = component[:, 0].bincount()
    if int((sizes > 0).sum()) >= MIN_GROUPS and float(sizes.max()) <= _LARGEST_SHARE * len(units):
        units, share = component, fraction
    else:
        share = min(0.5, 2 * fraction)
    ids = units.unique()
    order = torch.randperm(len(ids), generator=generator(seed, "proxy/split", 0))
    chosen = torch.isin(units, ids[order[: max(1, round(share * len(ids)))]])
    heldout, training = chosen.all(dim=1).nonzero()[:, 0], (~chosen).all(dim=1).nonzero()[:, 0]
    lost = len(units) - len(heldout) - len(training)
    if lost:
        warnings.warn(
            f"{lost} of {len(units)} pairs are not used: they link samples that are held out with others. Compare "
            f"within prompts ({MIN_GROUPS} or more of them) or within small groups of samples to use all",
            stacklevel=4,
        )
    for part, rows in (("training", training), ("held-out", heldout)):
        decided = int(preferences.decided[rows].sum())
        if decided < MIN_HELDOUT:
            raise DataError(
                f"the {part} part has {decided} pairs with a winner ({len(rows)} in all), fewer than {MIN_HELDOUT}; "
                "collect more pairs, compare within more prompts, or change holdout_fraction or seed"
            )
    return training, heldout, units


def fit_preferences(
    proxy: RewardProxy, reader: Reader, preferences: Preferences, prompt_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Train the members of ``proxy``, calibrate its scores, and set its report.

    Args:
        proxy: new, its latent scales set.
        reader: reads the samples.
        preferences: checked pairs.
        prompt_ids: int64 ``[N]``, or None.

    Returns:
        The sorted training and held-out samples.
    """
    config = proxy.config
    training, heldout, units = split_pairs(
        preferences, prompt_ids, len(reader.rewards), config.holdout_fraction, config.seed
    )
    duels = DuelReader(reader, preferences)
    ties = int((~preferences.decided).sum())
    tie_rate = float((~preferences.decided[training]).sum() + 0.5) / (len(training) + 1) if ties else 0.0
    num_folds = 10 if len(training) >= _SMALL else 5
    ids, positions = units[training].unique(return_inverse=True)
    folds = torch.randperm(len(ids), generator=generator(config.seed, "proxy/folds", 0))[positions] % num_folds
    left_out = (folds == 0).any(dim=1)

    judgement = cast(Judgement, proxy.judgement)
    judgement.start(tie_rate, preferences.noise is not None)
    seen = preferences.pairs[training].unique()
    if proxy.is_linear:
        member = cast(LinearMember, proxy.members[0])
        member.weight.copy_(_logistic(duels, training, config.ridge_alpha, left_out)[:, None])
        member.intercept.sub_(reader.map(member, seen).mean(dim=0))
    else:
        _fit_judges(proxy, duels, training, folds, seen)

    held = _duels(proxy, duels, heldout)
    log_probabilities = crossfit_log_probabilities(judgement, held)
    ridge = held, log_probabilities
    if not proxy.is_linear:
        ridge = _baseline(duels, training, heldout, left_out, tie_rate)
    entry = evaluate_preferences(
        held.scores, log_probabilities, (ridge[0].scores, ridge[1]), held.outcome, tie_rate, len(training)
    )
    proxy.report = {proxy.reward_names[0]: entry}
    proxy.reward_std.fill_(calibrate(judgement, held))
    proxy.calibration.residual_variance.fill_(_FLOOR)
    return seen, preferences.pairs[heldout].unique()


def _fit_judges(proxy: RewardProxy, duels: DuelReader, training: Tensor, folds: Tensor, seen: Tensor) -> None:
    """Train members on pairs, bring their scores to one origin and unit, and average their judgements."""
    shared = cast(Judgement, proxy.judgement)
    judges = []
    for member in proxy.members:
        own = Judgement(shared.objective).to(proxy.reward_std.device)
        own.load_state_dict(shared.state_dict())
        judges.append(Judge(member, own))
    fit_members(proxy, duels, training, folds, [(judge, judge.loss) for judge in judges])
    order = torch.randperm(len(seen), generator=generator(proxy.config.seed, "proxy/centre", 0))
    rows = seen[order[:_CENTRE_ROWS]].sort().values
    with torch.no_grad():
        for judge in judges:
            to_unit(judge, duels.samples.map(judge.member, rows))
        for name, parameter in shared.named_parameters():
            values = [cast(Tensor, getattr(judge.judgement, name)) for judge in judges]
            parameter.copy_(torch.stack(values).mean())
    proxy.requires_grad_(False)


@torch.no_grad()
def to_unit(judge: Judge, outputs: Tensor) -> None:
    """Shift a judge's scores to a mean of 0, and scale Thurstone's to a geometric mean variance of 1/2.

    This changes the last layer and the judgement, in place, and no probability of any outcome.

    Args:
        judge: a trained one of a :class:`latent_rewards.proxies.heads.NetworkMember`.
        outputs: ``[n, O]``, of its member for the samples that define the unit.
    """
    output = cast(NetworkMember, judge.member).head.output
    scores, log_variance = split_outputs(outputs, 1)
    output.bias[0] -= scores.mean()
    if log_variance is not None:
        log_sigma = 0.5 * (math.log(2) + float(log_variance.mean()))
        output.weight[0] *= math.exp(-log_sigma)
        output.bias[0] *= math.exp(-log_sigma)
        output.bias[1] -= 2 * log_sigma
        judge.judgement.rescale(-log_sigma)


@torch.no_grad()
def _duels(proxy: RewardProxy, duels: DuelReader, rows: Tensor) -> Duels:
    """Return what the pairs at ``rows`` are judged by, before calibration, on the CPU."""

    def read(latents: Tensor, prompts: Tensor | None) -> Tensor:
        means, variance = proxy.member_outputs(latents, prompts)
        mean = means.mean(dim=0)
        return mean if variance is None else torch.cat([mean, variance.log()], dim=1)

    values, targets = duels.map(read, rows).cpu(), duels.targets(rows).cpu()
    scores, log_variance = split_outputs(values, 1)
    paired = None if log_variance is None else log_variance.reshape(-1, 2)
    return Duels(scores.reshape(-1, 2), targets[:, 0], paired, targets[:, 1:])


def _differences(duels: DuelReader, rows: Tensor) -> Tensor:
    features = duels.map(linear_features, rows).double().unflatten(0, (-1, 2))
    return features[:, 0] - features[:, 1]


def _logistic(duels: DuelReader, rows: Tensor, alpha: float | None, validation: Tensor) -> Tensor:
    outcome = duels.targets(rows)[:, 0]
    return fit_logistic(_differences(duels, rows), outcome, alpha, validation).to(duels.samples.rewards.device)


def _baseline(
    duels: DuelReader, training: Tensor, heldout: Tensor, validation: Tensor, tie_rate: float
) -> tuple[Duels, Tensor]:
    """Return a logistic regression's duels and cross-fitted log-probabilities, fitted on at most 2,048 pairs."""
    every = -(-len(training) // _BASELINE_ROWS)
    weight = _logistic(duels, training[::every], None, validation[::every])
    scores = duels.map(lambda latents, prompts: linear_features(latents, prompts).double() @ weight, heldout)
    judged = Duels(scores.cpu().reshape(-1, 2), duels.targets(heldout)[:, 0].cpu())
    judgement = Judgement("bradley_terry")
    judgement.start(tie_rate, noise=False)
    return judged, crossfit_log_probabilities(judgement, judged)


def compare(proxy: RewardProxy, first: Tensor, second: Tensor, prompts: Prompts | None, noise: Tensor | None) -> Tensor:
    """Return probabilities ``[B, 3]``; see :meth:`latent_rewards.proxies.RewardProxy.compare`."""
    if proxy.judgement is None:
        raise DataError(
            f"this proxy was trained on scores ({proxy.config.objective!r}) and knows no duels; compare its predictions"
        )
    if first.shape != second.shape:
        raise DataError(f"first {tuple(first.shape)} and second {tuple(second.shape)} must have one shape")
    if noise is not None and noise.shape != (len(first), 2):
        raise DataError(f"noise must be [{len(first)}, 2], the levels of both samples; got {tuple(noise.shape)}")
    features = proxy.read_prompts(prompts, len(first))
    scores, variances = [], []
    for latents in (first, second):
        means, variance = proxy.member_outputs(proxy.normalise(latents), features)
        scores.append(means.mean(dim=0) * proxy.reward_std)
        variances.append(variance)
    log_variance = None if variances[0] is None else torch.cat([v.log() for v in variances if v is not None], dim=1)
    levels = torch.zeros(len(first), 2) if noise is None else noise
    duels = Duels(torch.cat(scores, dim=1), torch.empty(len(first)), log_variance, levels.to(scores[0]))
    return proxy.judgement(duels).exp().to(torch.promote_types(torch.float32, first.dtype))
