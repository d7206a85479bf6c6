from __future__ import annotations

import pytest
import torch

from latent_rewards.contracts import DataError
from latent_rewards.lro.sampling import SampleSource
from latent_rewards.training.ranks import Ranks

PROMPTS = ["a", "b", "c", "a", {"prompt": "d", "image": 1}]


@pytest.fixture
def source(linear_policy):
    def make(step_counts=(2,), seed=0, prompts=PROMPTS):
        policy = linear_policy(dim=3)
        return SampleSource(policy, prompts, step_counts=step_counts, seed=seed, device="cpu", dtype=torch.float64)

    return make


def test_groups_are_neighbours_with_one_prompt_and_its_condition(source):
    batch = source().update_batch(0, num_prompts=5, num_generations=3)
    assert batch.noise.shape == (2, 15, 3, 1, 1, 1) and batch.noise.dtype == torch.float64
    assert batch.sample_ids == list(range(15))
    row = {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0}  # equal texts are encoded once
    assert batch.condition.table.flatten().tolist() == [row[text] for text in batch.prompts]
    groups = [batch.prompts[i : i + 3] for i in range(0, 15, 3)]
    assert all(len(set(group)) == 1 for group in groups)
    assert sorted(group[0] for group in groups) == ["a", "a", "b", "c", "d"]  # each listed prompt once


def test_no_prompt_repeats_before_all_were_seen(source):
    drawn = source()
    seen = [text for step in range(5) for text in drawn.update_batch(step, 2, 1).prompts]
    assert sorted(seen[:5]) == sorted(seen[5:]) == ["a", "a", "b", "c", "d"]


def test_a_batch_is_a_function_of_seed_and_step(source):
    one, two = source().update_batch(7, 2, 2), source().update_batch(7, 2, 2)
    assert torch.equal(one.noise, two.noise) and one.prompts == two.prompts
    for other in (source().update_batch(8, 2, 2), source(seed=1).update_batch(7, 2, 2)):
        assert not torch.equal(one.noise, other.noise)


def test_ranks_share_the_groups_of_one_process(source):
    whole = source().update_batch(3, 4, 2)
    parts = [source().update_batch(3, 4, 2, Ranks(rank, 2)) for rank in range(2)]
    for part in parts:
        assert part.prompts == [whole.prompts[i] for i in part.sample_ids]
        assert torch.equal(part.noise, whole.noise[:, part.sample_ids])
    assert parts[0].sample_ids + parts[1].sample_ids == list(range(8))


def test_step_counts_are_drawn_per_update(source):
    drawn = source(step_counts=(1, 2, 4))
    counts = [drawn.update_batch(step, 1, 1).num_steps for step in range(60)]
    assert {count: counts.count(count) > 8 for count in (1, 2, 4)} == {1: True, 2: True, 4: True}
    assert all(len(drawn.update_batch(s, 1, 1).noise) == counts[s] for s in range(9))


def test_evaluation_samples_do_not_depend_on_the_micro_batch(source):
    def samples(micro_batch):
        batches = list(source(step_counts=(1, 2)).evaluation_batches("stage", 0, 7, micro_batch))
        assert all(len(batch.prompts) <= micro_batch for batch in batches)
        return {
            i: (batch.prompts[row], batch.num_steps, batch.noise[:, row])
            for batch in batches
            for row, i in enumerate(batch.sample_ids)
        }

    one, many = samples(1), samples(5)
    assert sorted(one) == sorted(many) == list(range(7))
    for index, (prompt, num_steps, noise) in one.items():
        assert (prompt, num_steps) == many[index][:2] and torch.equal(noise, many[index][2])
    assert [one[i][1] for i in range(7)] == [1, 2, 1, 2, 1, 2, 1]
    assert sorted(one[i][0] for i in range(5)) == ["a", "a", "b", "c", "d"]


def test_ranks_share_the_evaluation_samples_of_one_process(source):
    def samples(ranks):
        batches = source(step_counts=(1, 2)).evaluation_batches("stage", 0, 7, 2, ranks)
        return {
            i: (batch.num_steps, batch.prompts[row], batch.noise[:, row])
            for batch in batches
            for row, i in enumerate(batch.sample_ids)
        }

    whole, parts = samples(Ranks()), [samples(Ranks(rank, 3)) for rank in range(3)]
    assert sorted(i for part in parts for i in part) == list(range(7))
    for part in parts:
        for i, (num_steps, prompt, noise) in part.items():
            assert (num_steps, prompt) == whole[i][:2] and torch.equal(noise, whole[i][2])


def test_prompts_are_checked(source):
    with pytest.raises(DataError, match="no prompts"):
        source(prompts=[])
