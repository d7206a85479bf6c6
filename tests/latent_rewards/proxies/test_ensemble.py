"""Batches cover the data, unknown rewards weigh nothing, and the best weights are kept."""

import math

import pytest
import torch
from torch import nn
from tqdm import tqdm

from latent_rewards.proxies import ensemble as module, train_proxy
from latent_rewards.proxies.ensemble import (
    BestWeights,
    bucketed_batches,
    masked_error,
    shuffled_batches,
    train_member,
)
from latent_rewards.proxies.joint import CONTINUED_WARMUP


def test_masked_error_averages_the_known_entries_only():
    predicted = torch.tensor([[1.0, 5.0], [3.0, 7.0]], requires_grad=True)
    loss = masked_error(predicted, torch.tensor([[0.0, math.nan], [1.0, 7.0]]))
    assert float(loss.detach()) == pytest.approx((1 + 4 + 0) / 3)
    loss.backward()
    assert predicted.grad[0, 1] == 0
    assert float(masked_error(predicted, torch.full((2, 2), math.nan)).detach()) == 0


def test_every_pass_sees_every_sample_once():
    indices = torch.tensor([3, 5, 7, 9, 11, 13])
    batches = shuffled_batches(indices, 4, 3, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [4, 4, 4]
    order = torch.cat(batches)
    assert sorted(order[:6].tolist()) == sorted(order[6:].tolist()) == indices.tolist()
    assert not torch.equal(order[:6], order[6:])
    assert [len(b) for b in shuffled_batches(indices, 64, 2, torch.Generator())] == [6, 6]


def test_a_batch_is_of_one_bucket_and_buckets_come_in_proportion_to_their_sizes():
    sizes, count = torch.tensor([60, 30, 7, 3]), 90
    buckets = torch.arange(4).repeat_interleave(sizes)
    expected, totals, repeats = count * sizes / 100, torch.zeros(4), 200
    for seed in range(repeats):
        batches = bucketed_batches(torch.arange(100), buckets, 16, count, torch.Generator().manual_seed(seed))
        assert len(batches) == count
        owners = torch.stack([buckets[batch].unique() for batch in batches])[:, 0]
        turns = torch.bincount(owners, minlength=4)
        assert ((turns - expected).abs() < 1).all()
        assert all(len(batch) == min(16, int(sizes[owner])) for batch, owner in zip(batches, owners, strict=True))
        totals += turns
    # a turn more or less has variance f (1 - f), f the fraction of the expectation
    fraction = expected % 1
    sigma = (fraction * (1 - fraction) / repeats).sqrt()
    assert ((totals / repeats - expected).abs() <= 4.5 * sigma + 1e-9).all()
    assert not torch.equal(owners, owners.sort().values)
    own = torch.cat([batch for batch, owner in zip(batches, owners, strict=True) if owner == 1])
    assert sorted(own[:30].tolist()) == list(range(60, 90))


def test_one_bucket_is_shuffled_as_ever():
    rows = torch.arange(20)
    plain = shuffled_batches(rows, 8, 5, torch.Generator().manual_seed(3))
    same = bucketed_batches(rows, torch.zeros_like(rows), 8, 5, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


def test_a_large_fold_is_judged_by_a_part_of_it(world, quick, monkeypatch):
    draw, curved = world
    latents, judged = draw(300, 0), []
    kept = module._error_of
    monkeypatch.setattr(module, "_error_of", lambda m, r, rows, loss: judged.append(rows) or kept(m, r, rows, loss))
    proxies = []
    for limit in (2048, 7):
        monkeypatch.setattr(module, "_EVALUATION_ROWS", limit)
        proxies.append(train_proxy(latents, curved(latents), config=quick(num_updates=2)))
    assert [len(rows) for rows in judged] == [26, 26, 26, 7, 7, 7]
    for whole, part in zip(judged[:3], judged[3:], strict=True):
        assert set(part.tolist()) < set(whole.tolist())


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))

    def forward(self, latents, prompts):
        return self.slope * latents


def test_a_member_learns_and_is_frozen_again():
    line = Line()
    x = torch.linspace(-1, 1, 8)[:, None]
    steps = []
    with torch.no_grad():
        train_member(
            line,
            lambda indices: (x[indices], None, 2 * x[indices]),
            [torch.arange(8)] * 200,
            learning_rate=0.2,
            weight_decay=0.0,
            warmup=0.1,
            stop=lambda number: steps.append(number) or number == 150,
        )
    assert line.slope.item() == pytest.approx(2.0, abs=0.05)
    assert len(steps) == 151 and not line.slope.requires_grad and line.slope.grad is None


@pytest.mark.parametrize("warmup", [0.15, CONTINUED_WARMUP])
def test_any_number_of_updates_can_be_made(warmup):
    x = torch.linspace(-1, 1, 8)[:, None]
    for count in range(1, 31):
        line, steps = Line(), []
        train_member(
            line,
            lambda indices: (x[indices], None, 2 * x[indices]),
            [torch.arange(8)] * count,
            learning_rate=0.2,
            weight_decay=0.0,
            warmup=warmup,
            stop=steps.append,
        )
        assert steps == list(range(count)) and 0 < line.slope.item() < 3


def test_input_noise_flattens_the_fit_as_errors_in_variables_do():
    """Least squares on x + noise_std eps with E x^2 = 1 has slope 2 / (1 + noise_std^2)."""
    line = Line()
    x = torch.tensor([[-1.0], [1.0]]).repeat(500, 1)
    train_member(
        line,
        lambda indices: (x[indices], None, 2 * x[indices]),
        [torch.arange(1000)] * 300,
        learning_rate=0.1,
        weight_decay=0.0,
        warmup=0.1,
        stop=lambda number: False,
        input_noise=1.0,
        source=torch.Generator().manual_seed(0),
    )
    assert line.slope.item() == pytest.approx(1.0, abs=0.02)


def test_the_best_weights_come_back_when_patience_is_over():
    lines, slopes = (Line(), Line()), ([0.5, 0.9, 0.6, 0.4, 0.8, 0.3], [0.5, 0.6, 0.7, 0.6, 0.6, 0.6])

    def errors():
        return torch.stack([(line.slope[0] - 1).square() for line in lines]).detach()

    keeper = BestWeights(lines, errors, 2, 600, tqdm(disable=True))
    verdicts = []
    for number in range(25 * 6):
        if (number + 1) % 25 == 0:
            for line, values in zip(lines, slopes, strict=True):
                line.slope.data.fill_(values[number // 25])
        verdicts.append(keeper(number))
    # The second line was at its best in the third evaluation; it waits for two more.
    assert [i for i, verdict in enumerate(verdicts) if verdict][0] == 25 * 5 - 1
    keeper.restore()
    assert [line.slope.item() for line in lines] == pytest.approx([0.9, 0.7])


def test_a_long_training_is_evaluated_24_times():
    asked = []
    keeper = BestWeights([Line()], lambda: asked.append(1) or torch.zeros(1), 100, 2400, tqdm(disable=True))
    for number in range(2400):
        keeper(number)
    assert len(asked) == 24
