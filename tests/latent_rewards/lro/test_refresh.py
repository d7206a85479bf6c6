from __future__ import annotations

import math

import pytest
import torch

from latent_rewards.contracts import ConfigError, DataError, FingerprintMismatchError
from latent_rewards.dataset import RewardDataset
from latent_rewards.lro.guard import Guard, RefreshSchedule
from latent_rewards.lro.refresh import Refresher, check_fingerprints, query
from latent_rewards.lro.sampling import Batch
from latent_rewards.lro.scoring import ProxyReward


def latents(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1, 1)


def samples(*values: float) -> list[tuple[Batch, torch.Tensor]]:
    count = len(values)
    return [(Batch(range(count), ["p"] * count, list(range(count)), torch.zeros(1), 1), latents(*values))]


def oracle(latents: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
    x = latents.flatten(1).sum(1)
    return {"quality": torch.where(x > 5, math.nan, -((x - 2) ** 2)), "unused": x}


def replay(latent_space: str | None = None, dtype: torch.dtype = torch.float64) -> RewardDataset:
    return RewardDataset.from_tensors(
        latents(0, 1).to(dtype),
        ["p", "p"],
        {"quality": torch.tensor([-4.0, -1.0])},
        latent_space=latent_space,
        metric_fingerprints={"quality": "v1"},
    )


@pytest.fixture
def refresher(exact_proxy, linear_policy):
    def make(dataset=None, proxy=None, truth=oracle):
        scoring = ProxyReward(proxy or exact_proxy(), None, pessimism=0.5, cap=None, micro_batch=8)
        return Refresher(scoring, truth, dataset, Guard(linear_policy(), RefreshSchedule(5, 3)), num_updates=7, seed=3)

    return make


def test_gap_is_logged_before_the_proxy_learns(refresher):
    made = refresher(replay())
    logs = made.refresh(5, samples(1.0, 2.0, 6.0))
    # proxy -(x - 1)^2 / 2: 0 and -1/2; true -1 and 0; the third has no true reward
    assert logs == {"true/quality": -0.5, "gap/quality": 0.25, "queries": 3.0}
    assert made.scoring.proxy.target.item() == 2.0


def test_fresh_samples_join_the_replay_and_each_update_has_its_seed(refresher):
    made = refresher(replay())
    made.refresh(5, samples(1.0, 2.0, 6.0))
    made.refresh(10, samples(1.5))
    first, second = made.scoring.proxy.updates
    assert (first["fresh"], first["replay"], second["fresh"], second["replay"]) == (3, 2, 1, 5)
    assert first["seed"] != second["seed"]
    assert made.replay.latents().flatten().tolist() == [0, 1, 1, 2, 6, 1.5]
    assert made.replay.rewards["quality"].isnan().tolist() == [False] * 4 + [True, False]
    assert made.replay.metric_fingerprints == {"quality": "v1"}


def test_it_works_without_a_first_dataset_and_casts_to_the_dtype_of_one(refresher):
    made = refresher()
    made.refresh(5, samples(1.0, 2.0))
    assert len(made.replay) == 2
    stored = refresher(replay(dtype=torch.bfloat16))
    stored.refresh(5, samples(1.0))
    assert stored.replay.latents().dtype == torch.bfloat16


def test_columns_the_proxy_lacks_are_unknown_in_fresh_samples(refresher):
    dataset = RewardDataset.from_tensors(
        latents(0, 1), ["p", "p"], {"more": torch.zeros(2), "quality": torch.tensor([-4.0, -1.0])}
    )
    made = refresher(dataset)
    made.refresh(5, samples(1.0))
    assert made.replay.rewards["more"].isnan().tolist() == [False, False, True]
    with pytest.raises(DataError, match="lacks it: unknown reward 'quality'"):
        refresher(RewardDataset.from_tensors(latents(0), ["p"], {"more": torch.zeros(1)}))


def test_state_restores_replay_and_proxy(refresher):
    made, other = refresher(replay()), refresher(replay())
    made.refresh(5, samples(1.0, 2.0, 6.0))
    other.load_state_dict(made.state_dict())
    assert other.scoring.proxy.target.item() == 2.0
    assert other.replay.prompts == made.replay.prompts
    assert torch.equal(other.replay.latents(), made.replay.latents())
    assert torch.equal(other.replay.rewards["quality"][:4], made.replay.rewards["quality"][:4])


def test_what_an_oracle_must_return(refresher):
    with pytest.raises(DataError, match="'quality'"):
        refresher(truth=lambda latents, prompts: {"other": torch.zeros(len(latents))}).refresh(5, samples(1.0))
    with pytest.raises(DataError, match=r"'quality' has shape \(1, 1\); expected \[1\]"):
        query(lambda latents, prompts: {"quality": torch.zeros(1, 1)}, latents(1.0), ["p"])


def test_a_proxy_that_cannot_learn_is_refused_beside_an_oracle(refresher, exact_proxy):
    class Fixed:
        reward_names = ("quality",)

    with pytest.raises(ConfigError, match=r"Fixed has no update"):
        refresher(proxy=Fixed())


def test_latent_spaces_must_agree(exact_proxy):
    class Space:
        latent_space = "vae-b"

        def __call__(self, latents, prompts):
            return {}

    proxy = exact_proxy()
    check_fingerprints(Space(), proxy, replay())  # the proxy does not know its own
    proxy.latent_space = "vae-a"
    check_fingerprints(oracle, proxy, replay("vae-a"))
    with pytest.raises(FingerprintMismatchError, match=r"'vae-a'.*oracle.*'vae-b'"):
        check_fingerprints(Space(), proxy, None)
    with pytest.raises(FingerprintMismatchError, match=r"'vae-a'.*dataset.*'vae-c'"):
        check_fingerprints(oracle, proxy, replay("vae-c"))


def test_metrics_must_agree(exact_proxy):
    class Scored:
        fingerprints: dict[str, str] = {"quality": "v2", "unused": "v1"}

        def __call__(self, latents, prompts):
            return {}

    with pytest.raises(FingerprintMismatchError, match="'quality' is 'v2' in the oracle and 'v1' in the dataset"):
        check_fingerprints(Scored(), exact_proxy(), replay())
    Scored.fingerprints = {"quality": "v1"}
    check_fingerprints(Scored(), exact_proxy(), replay())
