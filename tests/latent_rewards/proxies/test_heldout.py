"""Held-out predictions keep prompts together and are judged by the other half."""

import math

import torch

from latent_rewards.proxies.calibration import Z_LEVEL
from latent_rewards.proxies.heldout import HeldOut, crossfit_ood, halve, heldout_prompts, judge
from latent_rewards.proxies.samples import gather_samples


def test_prompts_are_numbered_and_share_a_half():
    latents = torch.zeros(60, 1, 1, 1, 1)
    samples = gather_samples(latents, torch.arange(60.0), [f"p{i % 12}" for i in range(60)])
    prompts = heldout_prompts(samples, torch.arange(0, 60, 2))
    assert prompts.max() == 5 and torch.equal(prompts[:6], prompts[6:12])
    assert torch.equal(
        heldout_prompts(gather_samples(latents, torch.arange(60.0), None), torch.arange(7)), torch.arange(7)
    )
    many = torch.arange(40) % 13
    halves = halve(many)
    assert all(len(halves[many == prompt].unique()) == 1 for prompt in range(13)) and halves.any() and not halves.all()
    assert halve(torch.arange(40) % 3).sum() == 20


def test_judgement_is_in_the_rewards_units():
    errors = torch.ones(40, 1) * (1 - 2 * (torch.arange(40)[:, None] % 2))
    target = torch.linspace(-1, 1, 40)[:, None]
    target[3] = math.nan
    heldout = judge(
        target.nan_to_num(0) + errors, torch.zeros(40, 1), target, torch.arange(40),
        centre=torch.tensor([10.0]), scale=torch.tensor([4.0]),
    )  # fmt: skip
    known = ~target.isnan()
    torch.testing.assert_close(heldout.predicted[known], 10 + 4 * (target + errors)[known].double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(heldout.std, torch.full((40, 1), 4 / Z_LEVEL).double(), atol=1e-5, rtol=0)
    assert heldout.truth[3].isnan().all() and 0 < float(heldout.coverage()) <= 1
    again = HeldOut.from_tensors(heldout.tensors())
    assert torch.equal(again.std, heldout.std) and torch.equal(again.prompts, heldout.prompts)


def test_strangeness_is_ranked_against_the_other_half():
    distance = torch.arange(400.0)
    scores = crossfit_ood(distance, None, torch.arange(400))
    assert scores[0] == 0 and scores[399] == 1 and abs(float(scores.mean()) - 0.5) < 0.02
    odd = torch.where(torch.arange(400) % 2 == 0, distance, distance + 1000)
    assert (crossfit_ood(odd, None, torch.arange(400))[1::2] == 1).all()
