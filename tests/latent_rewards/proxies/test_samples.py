"""Data is brought into one form, refused by name, and divided without leaks."""

import math

import pytest
import torch

from latent_rewards.contracts import DataError
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies import samples as module
from latent_rewards.proxies.buckets import gather_buckets
from latent_rewards.proxies.samples import (
    check_trainable,
    concatenate_samples,
    gather_samples,
    group_ids,
    split_folds,
    split_samples,
)

LATENTS = torch.randn(40, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
REWARD = torch.arange(40.0)


@pytest.mark.parametrize(
    ("rewards", "names"),
    [
        (REWARD, ("reward",)),
        (torch.stack([REWARD, -REWARD], dim=1), ("reward_0", "reward_1")),
        (REWARD[:, None], ("reward_0",)),
        ({"b": REWARD, "a": REWARD.numpy()}, ("b", "a")),
    ],
)
def test_reward_names(rewards, names):
    samples = gather_samples(LATENTS, rewards, None)
    assert samples.reward_names == names and samples.rewards.shape == (40, len(names))
    assert samples.rewards[3, 0] == 3


def test_a_dataset_brings_everything_along_even_when_it_is_not_read_into_memory(monkeypatch):
    dataset = RewardDataset.from_tensors(
        LATENTS, ["p"] * 40, {"r": REWARD}, latent_space="v", metric_fingerprints={"r": "m"}
    )
    for limit in (2**30, 0):
        monkeypatch.setattr(module, "_IN_MEMORY_BYTES", limit)
        samples = gather_samples(dataset, None, None)
        assert (samples.latent_space, samples.metric_fingerprints) == ("v", {"r": "m"})
        assert torch.equal(samples.latents(torch.tensor([5, 2])), LATENTS[[5, 2]])
        assert samples.prompts == ["p"] * 40
    assert gather_samples(dataset, None, None).read_prompts == ["p"] * 40
    assert gather_samples(dataset, None, None, use_prompts=False).read_prompts is None
    with pytest.raises(DataError, match="brings its own"):
        gather_samples(dataset, REWARD, None)


@pytest.mark.parametrize(
    ("latents", "rewards", "prompts", "message"),
    [
        (LATENTS[0], REWARD, None, "5 dimensions"),
        (LATENTS * math.nan, REWARD, None, "NaN or infinity"),
        (LATENTS, None, None, "rewards is missing"),
        (LATENTS, REWARD[:3], None, "'reward' has shape"),
        (LATENTS, REWARD.reshape(1, 2, 20), None, r"rewards must be \[N\]"),
        (LATENTS, {}, None, "rewards is empty"),
        (LATENTS, {"q": REWARD / 0}, None, "'q' is infinite for sample 1"),
        (LATENTS, {"q": None}, None, "reward 'q' must be numbers, NaN where a metric does not apply"),
        (LATENTS, [None] * 40, None, "rewards must be numbers"),
        (LATENTS, REWARD.to(torch.complex64), None, "rewards must be real numbers; got torch.complex64"),
        (LATENTS, REWARD, REWARD, r"prompt embeddings must be \[N, D\] or \[N, L, D\]; got shape \(40,\)"),
        (LATENTS, REWARD, ["a"], "got 1 for 40"),
        (LATENTS, REWARD, "a text", "got 1 for 40"),
    ],
)
def test_unusable_data_is_refused(latents, rewards, prompts, message):
    with pytest.raises(DataError, match=message):
        gather_samples(latents, rewards, prompts)


def test_prompt_embeddings_are_taken_without_their_graph():
    embeddings = 2 * torch.ones(40, 3, requires_grad=True)
    assert not gather_samples(LATENTS, REWARD, embeddings).prompts.requires_grad


def test_latents_of_single_samples_are_to_be_stacked():
    with pytest.raises(DataError, match=r"a list of \[C, F, H, W\], such as \[1, 2, 2, 2\]; stack those of one shape"):
        gather_buckets(list(LATENTS), REWARD, None, linear=False)


def test_too_few_and_constant_rewards_are_refused():
    holes = torch.where(REWARD < 20, math.nan, REWARD)
    for rewards, message in [
        ({"ok": REWARD, "flat": torch.ones(40)}, "'flat' is constant"),
        ({"sparse": holes}, "'sparse' applies to 20 samples"),
    ]:
        with pytest.raises(DataError, match=message):
            check_trainable(gather_samples(LATENTS, rewards, None), 32)
    with pytest.raises(DataError, match="40 samples are too few"):
        check_trainable(gather_samples(LATENTS, REWARD, None), 41)


def test_split_keeps_a_prompt_in_one_part_and_folds_keep_it_in_one_fold():
    prompts = [f"prompt {i % 13}" for i in range(40)]
    samples = gather_samples(LATENTS, REWARD, prompts)
    training, heldout = split_samples(samples, 0.25, seed=1)
    assert sorted(torch.cat([training, heldout]).tolist()) == list(range(40))
    groups = group_ids(prompts, 40)
    assert not set(groups[training].tolist()) & set(groups[heldout].tolist())
    folds = split_folds(training, groups, 5, seed=0)
    for group in groups[training].unique():
        assert len(folds[groups[training] == group].unique()) == 1
    assert sorted(folds.unique().tolist()) == [0, 1, 2, 3, 4]


def test_split_is_random_and_seeded_where_prompts_do_not_repeat():
    samples = gather_samples(LATENTS, REWARD, None)
    first, again, other = (split_samples(samples, 0.25, seed=s)[1] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and len(first) == 10
    assert group_ids([f"prompt {i}" for i in range(40)], 40) is None
    assert group_ids(["one", "two"] * 20, 40) is None
    assert group_ids(torch.arange(40.0).floor_divide(4)[:, None], 40).tolist() == [i // 4 for i in range(40)]
    lonely = REWARD.clone()
    lonely[first] = math.nan
    with pytest.raises(DataError, match="has 0 values, 0 of them distinct, in the held-out part"):
        split_samples(gather_samples(LATENTS, lonely, None), 0.25, seed=1)


def test_concatenated_samples_read_from_the_right_side():
    first = gather_samples(LATENTS[:10], REWARD[:10], [f"a{i}" for i in range(10)])
    second = gather_samples(LATENTS[10:], REWARD[10:], [f"b{i}" for i in range(30)])
    both = concatenate_samples(first, second)
    for indices in ([12, 3, 39, 0], [1, 2], [11, 10]):
        assert torch.equal(both.latents(torch.tensor(indices)), LATENTS[indices])
    assert both.prompts[9:11] == ["a9", "b0"] and both.rewards[:, 0].tolist() == REWARD.tolist()
    with pytest.raises(DataError, match="of one kind"):
        concatenate_samples(first, gather_samples(LATENTS, REWARD, torch.zeros(40, 3)))


@pytest.mark.parametrize("use_prompts", [True, False])
def test_samples_of_one_prompt_are_not_divided_whether_prompts_are_read_or_not(use_prompts):
    prompts = [f"clip {i % 12}" for i in range(40)]
    for source in (LATENTS, [LATENTS[:20], LATENTS[20:]]):
        parts = isinstance(source, list)
        rewards = [REWARD[:20], REWARD[20:]] if parts else REWARD
        texts = [prompts[:20], prompts[20:]] if parts else prompts
        samples = gather_buckets(source, rewards, texts, use_prompts=use_prompts)
        training, heldout = ({prompts[i] for i in part} for part in split_samples(samples, 0.2, 0))
        assert len(heldout) > 1 and not training & heldout
        assert (samples.read_prompts is None) is not use_prompts
