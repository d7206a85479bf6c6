import pytest
import torch

from latent_rewards.metrics import check_metric, create_metric
from recipes.moving_digits import metrics as _register  # noqa: F401
from recipes.moving_digits.metrics import cut_digits
from recipes.moving_digits.world import DIRECTIONS, ClipSpec, draw_specs, render, write_prompt


@pytest.fixture(scope="module")
def clips():
    specs = draw_specs(60, seed=1)
    return (
        render(specs, seed=1, split="heldout"),
        [write_prompt(s, seed=1, index=i) for i, s in enumerate(specs)],
        specs,
    )


@pytest.mark.parametrize("name", ["digits.legibility", "digits.legibility_holdout"])
def test_legibility_is_high_on_unseen_scans_and_low_otherwise(clips, name):
    videos, prompts, _ = clips
    metric = create_metric(name)
    real = metric(videos, prompts)
    assert real.shape == (60,) and float(real.mean()) > 0.75
    assert float(metric(videos, prompts[1:] + prompts[:1]).mean()) < 0.25
    assert float(metric(torch.zeros_like(videos), prompts).mean()) < 0.2
    noise = torch.rand(videos.shape, generator=torch.Generator().manual_seed(0))
    assert float(metric(noise, prompts).mean()) < 0.2


def test_direction_follows_the_motion(clips):
    videos, prompts, specs = clips
    metric = create_metric("digits.direction")
    assert float((metric(videos, prompts) > 0.9).float().mean()) > 0.95
    assert float((metric(videos.flip(1), prompts) < 0.1).float().mean()) > 0.95
    still = videos[:, :1].expand_as(videos)
    assert torch.allclose(metric(still, prompts), torch.full((60,), 0.5))


def test_cuts_are_centred_wherever_the_digit_is():
    specs = [ClipSpec(3, "red", direction, "fast") for direction in DIRECTIONS]
    videos = render(specs, seed=0)
    for video in videos:
        cuts = cut_digits(video)
        assert cuts.shape == (17, 64) and float(cuts.max()) <= 1.0
        assert float((cuts - cuts.mean(dim=0)).abs().mean()) < 0.06


def test_the_metrics_keep_their_promises(clips):
    videos, prompts, _ = clips
    for name in ("digits.legibility", "digits.legibility_holdout", "digits.direction"):
        check_metric(create_metric(name), videos=videos[:4], prompts=prompts[:4])
