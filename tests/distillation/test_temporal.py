import math

import pytest
import torch

from distillation.errors import NoiseError
from distillation.temporal import (
    feature_similarity_loss,
    frame_differences,
    frame_similarities,
    temporal_consistency_loss,
    temporal_vsd_loss,
)
from distillation.vsd import vsd_target


def clip(*frames):
    return torch.tensor(frames, dtype=torch.float64).view(1, 1, -1, 1, 1)


def test_differences_and_the_causal_mask():
    assert frame_differences(clip(1, 3, 6, 10)).flatten().tolist() == [2, 3, 4]
    assert frame_differences(clip(1, 3, 6, 10), mask_first=True).flatten().tolist() == [3, 4]


def test_consistency_term_matches_motion_and_not_position():
    still, moving = clip(0, 0, 0), clip(5, 6, 8)
    assert float(temporal_consistency_loss(moving + 3, moving)) == 0
    assert float(temporal_consistency_loss(still, moving)) == pytest.approx((1 + 4) / 2)
    assert float(temporal_consistency_loss(still, moving, mask_first=True)) == pytest.approx(4)


def test_consistency_target_gets_no_gradient():
    prediction, target = clip(0, 1).requires_grad_(), clip(0, 3).requires_grad_()
    temporal_consistency_loss(prediction, target).backward()
    assert target.grad is None
    assert prediction.grad.flatten().tolist() == [4, -4]  # d/dx (x1 - x0 - 3)^2 at 1 - 3 = -2


def test_vsd_term_vanishes_where_g_does_not_change_over_time():
    x = clip(0, 5, -2).requires_grad_()
    temporal_vsd_loss(x, clip(2, 2, 2)).backward()
    assert x.grad.abs().max() == 0


def test_vsd_term_has_the_gradient_of_its_definition():
    # 0.5 mean |dx - sg(dx - dg)|^2: the gradient in dx is dg / 2, and in x its transpose difference.
    x, g = clip(0, 5, -2).requires_grad_(), clip(1, 4, 9)
    loss = temporal_vsd_loss(x, g)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5 * (9 + 25) / 2)
    assert torch.allclose(x.grad.flatten(), torch.tensor([-3, 3 - 5, 5], dtype=torch.float64) / 2, rtol=0, atol=1e-14)


def test_too_few_frames_are_an_error():
    with pytest.raises(NoiseError, match="F >= 2"):
        frame_differences(clip(1))
    with pytest.raises(NoiseError, match="F >= 3"):
        frame_differences(clip(1, 2), mask_first=True)
    with pytest.raises(NoiseError, match=r"\[B, C, F, H, W\]"):
        frame_differences(clip(1, 2)[0])


def tokens(latents):
    """Latents as features, [B, F, H W, C]."""
    return latents.flatten(3).permute(0, 2, 3, 1)


def turning(*degrees):
    """One token of two channels that turns by angles: the cosine of neighbours is that of the difference."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()]).view(1, 2, -1, 1, 1)


def test_similarities_are_the_cosines_of_neighbouring_frames():
    similarity = frame_similarities(tokens(turning(0, 60, 60, 180)))
    assert similarity.shape == (1, 3, 1)
    expected = torch.tensor([0.5, 1.0, -0.5], dtype=torch.float64)
    assert torch.allclose(similarity.flatten(), expected, rtol=0, atol=1e-15)
    masked = frame_similarities(tokens(turning(0, 60, 60, 180)), mask_first=True)
    assert torch.allclose(masked.flatten(), expected[1:], rtol=0, atol=1e-15)


def test_feature_term_matches_the_targets_similarity_and_a_still_video_costs():
    target = turning(0, 60, 120)
    assert float(feature_similarity_loss(3 * turning(10, 70, 130), target, tokens)) < 1e-30
    still, slower = turning(0, 0, 0), turning(0, 30, 60)
    assert float(feature_similarity_loss(still, target, tokens)) == pytest.approx(0.25, abs=1e-14)
    slow = (math.cos(math.radians(30)) - 0.5) ** 2
    assert float(feature_similarity_loss(slower, target, tokens)) == pytest.approx(slow, abs=1e-14)
    # A target at rest is matched by rest, not by motion.
    assert float(feature_similarity_loss(target, still, tokens)) == pytest.approx(0.25, abs=1e-14)


def test_feature_term_masks_the_causal_first_pair():
    x, target = turning(0, 60, 120), turning(90, 60, 120)
    assert float(feature_similarity_loss(x, target, tokens, mask_first=True)) < 1e-30
    assert float(feature_similarity_loss(x, target, tokens)) == pytest.approx((0.5 - math.cos(math.pi / 6)) ** 2 / 2)


def test_feature_term_has_the_gradient_of_its_definition_and_the_target_none(randn):
    x, target = randn(1, 3, 3, 1, 2).requires_grad_(), randn(1, 3, 3, 1, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: feature_similarity_loss(z, target, tokens), (x,))
    feature_similarity_loss(x, target, tokens).backward()
    assert target.grad is None


def test_feature_term_of_vsd_rests_where_g_is_zero(randn):
    x = randn(1, 3, 3, 1, 2).requires_grad_()
    feature_similarity_loss(x, vsd_target(x, torch.zeros_like(x)), tokens).backward()
    assert float(x.grad.abs().max()) == 0
    x.grad = None
    feature_similarity_loss(x, vsd_target(x, randn(1, 3, 3, 1, 2, seed=1)), tokens).backward()
    assert float(x.grad.abs().max()) > 1e-3


def test_features_of_another_rank_are_an_error(randn):
    with pytest.raises(NoiseError, match=r"\[B, F, N, D\]"):
        frame_similarities(randn(1, 2, 3))
