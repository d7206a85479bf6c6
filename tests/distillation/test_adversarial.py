import math

import pytest
import torch
from torch import nn

from distillation.adversarial import AdversarialHead, approximate_r1, discriminator_loss, generator_loss
from distillation.errors import DistillationConfigError, NoiseError

P, Q, S = 0.8, -0.4, 0.7
"""Means of data and student, and their common spread."""


def logits(*values):
    return torch.tensor(values, dtype=torch.float64)


def quantiles(mean, count=20001):
    """Points of N(mean, S^2) at equal probabilities: means over them are integrals."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return mean + S * torch.special.ndtri(levels)


def test_losses_have_their_exact_values():
    zero, one = logits(0.0, 0.0), logits(1.0)
    assert float(generator_loss(zero)) == pytest.approx(math.log(2), abs=1e-15)
    assert float(discriminator_loss(zero, zero)) == pytest.approx(2 * math.log(2), abs=1e-15)
    assert float(generator_loss(one)) == pytest.approx(-math.log(1 / (1 + math.exp(-1))), abs=1e-15)
    d_real, d_fake = (1 / (1 + math.exp(-logit)) for logit in (1.0, -2.0))
    expected = -math.log(d_real) - math.log(1 - d_fake)
    assert float(discriminator_loss(one, logits(-2.0))) == pytest.approx(expected, abs=1e-15)


def test_gradients_have_their_signs_and_do_not_vanish_for_a_losing_student():
    fake = logits(-20.0, 20.0).requires_grad_()
    generator_loss(fake).backward()
    assert fake.grad.tolist() == pytest.approx([-0.5, 0.0], abs=1e-8), "d/dl of -log D: 1/2 of -(1 - D)"
    real, fake = logits(0.0).requires_grad_(), logits(0.0).requires_grad_()
    discriminator_loss(real, fake).backward()
    assert (float(real.grad), float(fake.grad)) == (-0.5, 0.5)


def test_optimum_is_the_density_ratio_of_two_gaussians():
    # log p / q of N(P, S^2) and N(Q, S^2) is a line: slope (P - Q) / S^2, zero halfway between the means.
    slope, offset = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))
    real, fake = quantiles(P), quantiles(Q)
    optimizer = torch.optim.LBFGS([slope, offset], max_iter=100, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = discriminator_loss(slope * real + offset, slope * fake + offset)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(slope.detach()) == pytest.approx((P - Q) / S**2, rel=1e-3)
    assert float((-offset / slope).detach()) == pytest.approx((P + Q) / 2, abs=1e-6)


def test_the_student_is_pulled_to_the_data_by_the_optimal_discriminator():
    x = quantiles(Q, 101).requires_grad_()
    generator_loss((P - Q) / S**2 * (x - (P + Q) / 2)).backward()
    assert bool((x.grad < 0).all()), "downhill is to the right, where the data are"


def test_approximate_r1_is_the_squared_gradient():
    # l(x) = w x: the expectation over eps is |w|^2 for any std; over the signs of the axes it is exact.
    weight, std = torch.tensor([0.6, -1.1, 0.3], dtype=torch.float64), 0.05
    x = torch.zeros(6, 3, dtype=torch.float64)
    noise = torch.cat([torch.eye(3), -torch.eye(3)]).double() * math.sqrt(3)
    penalty = approximate_r1(x @ weight, (x + std * noise) @ weight, std)
    assert float(penalty) == pytest.approx(float(weight @ weight), abs=1e-14)
    with pytest.raises(DistillationConfigError, match="std"):
        approximate_r1(x @ weight, x @ weight, 0.0)


def test_a_fresh_head_is_undecided_and_pushes_nowhere(randn):
    head, features = AdversarialHead(6, hidden_dim=5).double(), randn(3, 2, 4, 6).requires_grad_()
    assert head(features).tolist() == [0, 0, 0]
    generator_loss(head(features)).backward()
    assert float(features.grad.abs().max()) == 0
    assert float(head.judge.weight.grad.abs().min()) > 0, "it can learn"


def test_head_pools_tokens_whatever_their_order_and_keeps_samples_apart(randn):
    head = AdversarialHead(6, hidden_dim=5).double()
    nn.init.normal_(head.judge.weight, generator=torch.Generator().manual_seed(0))
    features = randn(3, 2, 4, 6)
    out = head(features)
    assert out.shape == (3,)
    assert torch.allclose(head(features.flip(1, 2)), out, rtol=0, atol=1e-14)
    assert torch.allclose(head(features.flatten(1, 2)), out, rtol=0, atol=1e-14)
    assert torch.allclose(head(torch.cat([features, features], dim=1)), out, rtol=0, atol=1e-14), "a mean, not a sum"
    changed = features.clone()
    changed[0] += randn(2, 4, 6, seed=1)
    assert torch.equal(head(changed)[1:], out[1:])
    assert not torch.allclose(head(changed)[0], out[0])


def test_a_head_learns_to_tell_features_that_differ_in_one_frame(randn):
    torch.manual_seed(0)
    head = AdversarialHead(4, hidden_dim=8).double()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    marked = torch.tensor([2.0, -2.0, 0.0, 0.0], dtype=torch.float64)
    for step in range(120):
        real, fake = randn(32, 3, 2, 4, seed=2 * step), randn(32, 3, 2, 4, seed=2 * step + 1)
        real[:, 1, 0] += 2 * marked
        loss = discriminator_loss(head(real), head(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * 2 * math.log(2)


def test_mistakes_are_errors(randn):
    with pytest.raises(NoiseError, match=r"features \[B, ..., 6\]"):
        AdversarialHead(6)(randn(2, 3, 5))
    with pytest.raises(NoiseError, match="tokens between"):
        AdversarialHead(6)(randn(2, 6))
    with pytest.raises(DistillationConfigError, match="feature_dim"):
        AdversarialHead(0)
