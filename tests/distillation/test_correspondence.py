import math

import pytest
import torch

from distillation.correspondence import correspondence_loss, frame_matches, soft_flow, window_offsets
from distillation.errors import DistillationConfigError, NoiseError
from distillation.vsd import vsd_target

SHIFT = (1, -2)
SHARP = 0.01
KINDS = ["flow", "kl"]


@pytest.fixture
def pattern(randn):
    """A random pattern of vectors of equal length, translated by ``shift`` from frame to frame; [1, C, F, 8, 8]."""

    def build(shift=SHIFT, frames=3, channels=16, seed=0):
        first = torch.nn.functional.normalize(randn(1, channels, 8, 8, seed=seed), dim=1) * math.sqrt(channels)
        moved = [first.roll((i * shift[0], i * shift[1]), dims=(2, 3)) for i in range(frames)]
        return torch.stack(moved, dim=2)

    return build


def interior(values, radius=2):
    return values[:, :, radius:-radius, radius:-radius]


@pytest.mark.parametrize("shift", [(0, 0), (1, -2), (-2, 1), (0, 1)])
def test_a_translated_pattern_has_its_translation_as_soft_flow(pattern, shift):
    flow = interior(soft_flow(pattern(shift), radius=2, temperature=SHARP))
    assert flow.shape == (1, 2, 4, 4, 2)
    expected = torch.tensor(shift, dtype=torch.float64).expand_as(flow)
    assert torch.allclose(flow, expected, rtol=0, atol=1e-12)


def test_matches_are_the_softmax_of_their_definition(randn):
    latents, radius, temperature = randn(2, 3, 2, 4, 5), 1, 0.7
    log_p, mask = frame_matches(latents, radius=radius, temperature=temperature)
    offsets = window_offsets(radius).long().tolist()
    assert offsets[0] == [-1, -1]
    assert offsets[5] == [0, 1]
    for b, y, x in ((0, 0, 0), (1, 2, 3), (1, 3, 4)):
        scores = {}
        for index, (dy, dx) in enumerate(offsets):
            if 0 <= y + dy < 4 and 0 <= x + dx < 5:
                product = float(latents[b, :, 0, y, x] @ latents[b, :, 1, y + dy, x + dx])
                scores[index] = math.exp(product / (math.sqrt(3) * temperature))
        for index in range(9):
            assert bool(mask[y, x, index]) is (index in scores)
            expected = scores.get(index, 0.0) / sum(scores.values())
            assert float(log_p[b, 0, y, x, index].exp()) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_costs_nothing_and_gets_no_gradient(randn, kind):
    x = randn(2, 4, 3, 4, 4).requires_grad_()
    target = x.detach().clone().requires_grad_()
    loss = correspondence_loss(x, target, kind=kind)
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(x.grad.abs().max()) < 1e-16
    assert target.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_still_video_costs_more_than_the_targets_motion(pattern, kind):
    target, still, slower = pattern((1, -2)), pattern((0, 0)), pattern((1, -1))
    costs = [float(correspondence_loss(x, target, kind=kind, temperature=0.3)) for x in (target, slower, still)]
    assert costs[0] == 0
    assert costs[2] > costs[1] > 0.1
    # And where the target rests, motion is what costs.
    assert float(correspondence_loss(pattern((1, 0)), still, kind=kind, temperature=0.3)) > 0.1


def test_flow_loss_of_a_still_video_has_its_exact_value(pattern):
    # Sharp matches: the flow is wrong by (1, -2) everywhere inside; sqrt(d^2 + 1) - 1 of both components.
    flows = [soft_flow(pattern(shift), radius=2, temperature=SHARP) for shift in ((0, 0), SHIFT)]
    assert torch.allclose(interior(flows[1] - flows[0]), torch.tensor(SHIFT, dtype=torch.float64), rtol=0, atol=1e-12)
    expected = float((torch.sqrt((flows[1] - flows[0]) ** 2 + 1) - 1).mean())
    loss = correspondence_loss(pattern((0, 0)), pattern(SHIFT), radius=2, temperature=SHARP)
    assert float(loss) == pytest.approx(expected, abs=1e-13)


def test_kl_sees_matches_that_average_to_the_same_flow():
    # Along a row, position 1 matches both neighbours alike, or itself: the flow is 0 either way.
    def row(values):
        return torch.tensor(values, dtype=torch.float64).view(1, 1, 2, 1, 3)

    split, rest = row([[0.0, 3.0, 0.0], [1.0, 0.0, 1.0]]), row([[0.0, 3.0, 0.0], [0.0, 1.0, 0.0]])
    flows = [soft_flow(latents, radius=1)[0, 0, 0, 1] for latents in (split, rest)]
    assert float((flows[0] - flows[1]).abs().max()) < 1e-15
    high, low = math.exp(3), 1.0
    p, q = [high, low, high], [low, high, low]
    kl = sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert float(correspondence_loss(rest, split, kind="kl", radius=1)) == pytest.approx(kl / 3, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_loss(randn, kind):
    x, target = randn(1, 2, 3, 2, 3).requires_grad_(), randn(1, 2, 3, 2, 3, seed=1)
    assert torch.autograd.gradcheck(lambda z: correspondence_loss(z, target, kind=kind, radius=1), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_the_causal_first_pair_is_masked(randn, kind):
    target = randn(1, 4, 4, 4, 4)
    x = target.clone()
    x[:, :, 0] = randn(1, 4, 4, 4, seed=1)
    assert float(correspondence_loss(x, target, kind=kind, mask_first=True)) == 0
    assert float(correspondence_loss(x, target, kind=kind)) > 1e-3
    assert soft_flow(x, mask_first=True).shape[1] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_vsd_form_rests_where_g_is_zero_and_else_pulls_towards_its_target(pattern, randn, kind):
    x = pattern((1, -1)).requires_grad_()
    correspondence_loss(x, vsd_target(x, torch.zeros_like(x)), kind=kind).backward()
    assert float(x.grad.abs().max()) < 1e-16
    gradient = randn(*x.shape, seed=2)
    before = correspondence_loss(x, vsd_target(x, gradient), kind=kind)
    (pull,) = torch.autograd.grad(before, x)
    after = correspondence_loss(x - 0.5 * pull, vsd_target(x, gradient), kind=kind)
    assert float(after.detach()) < float(before.detach())


def test_half_precision_is_read_in_float32(pattern):
    assert soft_flow(pattern().to(torch.bfloat16)).dtype == torch.float32


def test_mistakes_are_errors(randn):
    latents = randn(1, 2, 2, 3, 3)
    with pytest.raises(DistillationConfigError, match="kind must be 'flow' or 'kl'; got 'raft'"):
        correspondence_loss(latents, latents, kind="raft")
    with pytest.raises(DistillationConfigError, match="radius"):
        frame_matches(latents, radius=0)
    with pytest.raises(DistillationConfigError, match="temperature"):
        frame_matches(latents, temperature=0.0)
    with pytest.raises(NoiseError, match="F >= 3"):
        frame_matches(latents, mask_first=True)
    with pytest.raises(NoiseError, match=r"\[B, C, F, H, W\]"):
        frame_matches(latents[0])
