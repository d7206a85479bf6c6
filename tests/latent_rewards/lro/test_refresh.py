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


class Choosing:
    """Chooses the largest x, and says what it was asked; scores x too high by x itself."""

    reward_names = ("quality",)

    def __init__(self):
        self.asked, self.updates = [], []

    def scores(self, latents, prompts, pessimism=0.0):
        x = latents.flatten(1).sum(1)
        return {"quality": 2 * x}

    def acquire(self, latents, k, prompts, *, strategy, seed, reward):
        assert len(latents) == len(prompts)
        self.asked.append({"pool": latents.flatten().tolist(), "k": k, "strategy": strategy, "seed": seed})
        return reward({"quality": latents.flatten()}).argsort(descending=True)[:k]

    def update(self, fresh, *, replay, num_updates, seed, num_random=None, half_life=None, replay_ages=None):
        self.updates.append(
            {"fresh": fresh.latents().flatten().tolist(), "prompts": fresh.prompts, "num_random": num_random}
            | {"half_life": half_life, "ages": None if replay_ages is None else replay_ages.tolist()}
        )


def linear_truth(latents, prompts):
    return {"quality": latents.flatten(1).sum(1)}


def choosing(linear_policy, dataset=None, **settings):
    scoring = ProxyReward(Choosing(), None, pessimism=0.5, cap=None, micro_batch=3)
    guard = Guard(linear_policy(), RefreshSchedule(5, 8))
    made = {"acquisition": "top", "acquisition_pool": 2, **settings}
    return Refresher(scoring, linear_truth, dataset, guard, num_updates=7, seed=3, **made)


def drawn(ids, values):
    prompts = [f"prompt {i}" for i in ids]
    return Batch(range(len(ids)), prompts, list(ids), torch.zeros(1), 1), latents(*values)


def test_half_of_the_queries_stay_as_drawn_and_the_gap_is_recorded_on_them_alone(linear_policy):
    made = choosing(linear_policy)
    assert (made.candidates(5), choosing(linear_policy, acquisition="random").candidates(5)) == (10, 5)
    # ids 0, 1, 2 are the drawn half; of 3 ... 9 the two largest are 7 (of 80) and 4 (of 60)
    values = {0: 1.0, 1: -4.0, 2: 6.0, 3: 10.0, 4: 60.0, 5: 3.0, 6: 50.0, 7: 80.0, 8: 0.0, 9: 2.0}
    first, second = [0, 2, 4, 6, 8], [1, 3, 5, 7, 9]  # as two step counts are drawn
    batches = [drawn(ids, [values[i] for i in ids]) for ids in (first, second)]
    logs = made.refresh(5, batches, 5)
    assert logs == {"true/quality": 1.0, "gap/quality": 1.0, "queries": 5.0}
    proxy = made.scoring.proxy
    assert proxy.updates[0]["fresh"] == [1.0, -4.0, 6.0, 80.0, 60.0]
    assert proxy.updates[0]["prompts"] == [f"prompt {i}" for i in (0, 1, 2, 7, 4)]
    assert proxy.updates[0]["num_random"] == 3
    assert proxy.asked[0]["pool"] == [values[i] for i in range(3, 10)]
    assert (proxy.asked[0]["k"], proxy.asked[0]["strategy"]) == (2, "top")
    made.refresh(10, batches, 5)
    assert proxy.asked[0]["seed"] != proxy.asked[1]["seed"]
    with pytest.raises(ConfigError, match="queries="):
        made.refresh(15, batches)


def test_the_recorded_gap_is_unbiased_though_the_proxy_chooses_its_worst_errors(linear_policy):
    """The gap of a sample is x, so over the policy's samples it is 0; over the chosen ones it is far above."""
    made = choosing(linear_policy, acquisition_pool=4)
    source, chosen = torch.Generator().manual_seed(0), []
    for step in range(150):
        values = torch.randn(32, generator=source, dtype=torch.float64).tolist()
        made.refresh(step, [drawn(range(32), values)], 8)
        chosen += made.scoring.proxy.updates[-1]["fresh"][4:]
    gaps = torch.tensor([entry["proxy"]["quality"] - entry["true"]["quality"] for entry in made.guard.gaps])
    assert abs(float(gaps.mean())) < 4.5 / math.sqrt(150 * 4)
    assert float(torch.tensor(chosen).mean()) > 1.0
    assert made.guard.num_queries == 150 * 8


def test_replay_ages_count_refreshes_also_after_a_resume(linear_policy):
    made = choosing(linear_policy, replay(), acquisition="random", half_life=2.0)
    for step in (5, 10, 15):
        made.refresh(step, samples(*range(3)))
    seen = [(update["half_life"], update["ages"]) for update in made.scoring.proxy.updates]
    assert seen == [(2.0, [1, 1]), (2.0, [2, 2, 1, 1, 1]), (2.0, [3, 3, 2, 2, 2, 1, 1, 1])]
    resumed = choosing(linear_policy, replay(), acquisition="random", half_life=2.0)
    resumed.load_state_dict(made.state_dict())
    assert resumed.replay_ages().tolist() == [4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1] and len(resumed.replay) == 11
    first = choosing(linear_policy, None, acquisition="random", half_life=2.0)
    first.refresh(5, samples(1.0))
    assert first.scoring.proxy.updates[0]["ages"] is None


def test_a_proxy_that_cannot_choose_or_weigh_is_refused_at_once(refresher, exact_proxy, linear_policy):
    scoring = ProxyReward(exact_proxy(), None, pessimism=0.5, cap=None, micro_batch=8)
    guard = Guard(linear_policy(), RefreshSchedule(5, 8))
    for settings, missing in (({"acquisition": "top"}, "no num_random="), ({"half_life": 1.0}, "no half_life=")):
        with pytest.raises(ConfigError, match=missing):
            Refresher(scoring, oracle, None, guard, num_updates=7, seed=3, **settings)

    class Updating(Choosing):
        acquire = property()

    scoring = ProxyReward(Updating(), None, pessimism=0.5, cap=None, micro_batch=8)
    with pytest.raises(ConfigError, match=r"Updating has no acquire"):
        Refresher(scoring, oracle, None, guard, num_updates=7, seed=3, acquisition="mixed")
