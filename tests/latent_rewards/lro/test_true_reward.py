from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer
from latent_rewards.lro.true_reward import DecodedReward, TrueReward

PROMPTS = ["a", "b"]


def truth(latents: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    return {"quality": -0.5 * (latents.flatten(1) - 1).square().sum(1)}


class SquareCodec:
    """Each latent value becomes its square, so that decoding twice or not at all shows in a gradient."""

    fingerprint = "square"

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.sizes.append((latents.shape[0], latents.shape[2]))
        return (latents**2).transpose(1, 2)

    def encode(self, videos: Tensor) -> Tensor:
        raise NotImplementedError


def brightness(videos: Tensor, prompts: list[str]) -> Tensor:
    return videos.mean(dim=(1, 2, 3, 4)) * torch.tensor([len(p) for p in prompts]).to(videos)


def settings(**changed) -> LROConfig:
    chosen = {
        "num_updates": 4, "learning_rate": 0.02, "prompts_per_update": 2, "num_generations": 4, "step_counts": [2],
        "beta": 0.0, "head_std": 0.3, "device": "cpu", "progress": False,
    }  # fmt: skip
    return LROConfig(**chosen | changed)


@pytest.mark.parametrize("micro_batch", [64, 3])
def test_a_rollout_is_scored_once_however_often_it_is_used(linear_policy, micro_batch):
    reward = TrueReward(truth, ["quality"])
    policy = linear_policy(dim=2, gain=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="one reward and no holdout")
        trainer = ReinforceTrainer(
            policy,
            reward,
            PROMPTS,
            settings(estimator="reinforce", num_iterations=3, scale_rewards="group", micro_batch=micro_batch),
        )
    result = trainer.train()
    assert reward.num_queries == 4 * 8
    assert len(result.history) == 4


def test_little_of_what_was_asked_is_remembered(monkeypatch):
    monkeypatch.setattr("latent_rewards.lro.true_reward._REMEMBERED", 2)
    reward, latents = TrueReward(truth, ["quality"]), torch.arange(4.0, dtype=torch.bfloat16).view(4, 1, 1, 1, 1)
    for row in (0, 1, 0, 2, 1, 0, 0):  # 0 and 1 are known at first; 2 takes the place of 0, and 0 that of 1
        scored = reward.scores(latents[row : row + 1], ["a"])
        assert torch.equal(scored["quality"], truth(latents[row : row + 1], ["a"])["quality"])
    assert reward.num_queries == 4
    reward.scores(latents[:1], ["b"])
    assert reward.num_queries == 5, "another prompt is another sample"


@pytest.mark.filterwarnings("ignore:one reward")
def test_reinforce_on_the_true_reward_climbs_it(linear_policy):
    policy = linear_policy(dim=2, gain=0.5)
    config = settings(estimator="reinforce", num_updates=60, learning_rate=0.05, num_generations=8)
    rewards = [
        value
        for _, value in ReinforceTrainer(policy, TrueReward(truth, ["quality"]), PROMPTS, config).train().proxy_curve
    ]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.3


@pytest.mark.filterwarnings("ignore:one reward")
def test_a_dropped_last_step_sees_nothing_of_what_parameters_do_there(linear_policy):
    """E[x_2] = gain^2 x_0 + (gain + 1) shift: the gradient by the shift is gain + 1, and the first step's part gain."""
    moved = {}
    for kept in (True, False):
        policy = linear_policy(dim=1, gain=2.0, sigma=0.5)
        policy.gain.requires_grad_(False)
        config = settings(
            estimator="reinforce", num_updates=1, prompts_per_update=2, num_generations=20_000, score_last_step=kept,
            max_grad_norm=0.0,
        )  # fmt: skip
        trainer = ReinforceTrainer(policy, TrueReward(lambda x, _: {"r": x.flatten(1).sum(1)}, ["r"]), PROMPTS, config)
        policy.shift.register_hook(lambda gradient, kept=kept: moved.update({kept: -float(gradient)}))
        trainer.train()
    error = 4.5 * math.sqrt(2.0**2 * (1 / 0.5**2 + 1 / 0.3**2) * 6 / 40_000)
    assert abs(moved[True] - 3.0) < error
    assert abs(moved[False] - 2.0) < error < 0.5


def test_what_true_rewards_refuse(linear_policy):
    with pytest.raises(ConfigError, match="reward_names"):
        TrueReward(truth)
    latents = torch.zeros(2, 1, 1, 1, 1)
    with pytest.raises(DataError, match="no 'speed'"):
        TrueReward(truth, ["speed"]).scores(latents, PROMPTS)
    with pytest.raises(ConfigError, match="has no gradient"):
        TrueReward(truth, ["quality"]).scores(latents.requires_grad_(), PROMPTS)
    with pytest.raises(ConfigError, match="rewards is empty"):
        DecodedReward(SquareCodec(), {})
    with pytest.raises(ConfigError, match="chunk_size"):
        DecodedReward(SquareCodec(), {"b": brightness}, chunk_size=0)
    with pytest.raises(ConfigError, match="latent_frames"):
        DecodedReward(SquareCodec(), {"b": brightness}, latent_frames=0)
    with pytest.raises(ConfigError, match="chains of 1 step"):
        settings(estimator="reinforce", score_last_step=False, step_counts=[1, 2]).check_estimator(("reinforce",))


def test_another_oracle_knows_its_names_and_space():
    oracle = type("Oracle", (), {"fingerprints": {"a": "1", "b": "2"}, "latent_space": "vae-1"})()
    reward = TrueReward(oracle)
    assert reward.reward_names == ("a", "b") and reward.latent_space == "vae-1"


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize(("latent_frames", "chunk_size"), [(None, 1), (2, 1), (None, 2)])
def test_decoded_reward_is_the_gradient_through_the_decoder(checkpointed, latent_frames, chunk_size):
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 3, 4, 2, 2, generator=source, dtype=torch.float64, requires_grad=True)
    texts = ["a", "bb", "ccc"]
    codec = SquareCodec()
    reward = DecodedReward(
        codec, {"b": brightness}, latent_frames=latent_frames, checkpointed=checkpointed, chunk_size=chunk_size
    )
    scores = reward.scores(latents, texts)["b"]
    (gradient,) = torch.autograd.grad(scores.sum(), latents)
    kept = latents_of(latents, latent_frames)
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(-1, 1, 1, 1, 1) / kept[0].numel()
    expected = torch.zeros_like(latents)
    expected[:, :, : kept.shape[2]] = 2 * kept.detach() * scale
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(scores, (kept.detach() ** 2 * scale).flatten(1).sum(1), rtol=1e-12, atol=0)
    sizes = [(1, kept.shape[2])] * 3 if chunk_size == 1 else [(2, 4), (1, 4)]
    assert sorted(codec.sizes) == sorted(sizes * (2 if checkpointed else 1))
    assert reward.num_queries == 3


def latents_of(latents: Tensor, latent_frames: int | None) -> Tensor:
    return latents if latent_frames is None else latents[:, :, :latent_frames]


def test_without_a_gradient_nothing_is_decoded_twice():
    codec = SquareCodec()
    DecodedReward(codec, {"b": brightness}).scores(torch.ones(2, 3, 1, 1, 1), ["a", "b"])
    assert codec.sizes == [(1, 1)] * 2


def test_a_decoder_without_a_gradient_is_named():
    codec = SquareCodec()
    codec.decode = torch.no_grad()(codec.decode)
    with pytest.raises(DataError, match="no gradient reaches the latents from b"):
        DecodedReward(codec, {"b": brightness}, checkpointed=False).scores(
            torch.ones(1, 3, 1, 1, 1, requires_grad=True), ["a"]
        )


@pytest.mark.filterwarnings("ignore:one reward")
def test_backpropagation_through_the_decoder_climbs(linear_policy):
    policy = linear_policy(dim=3, gain=0.5)
    reward = DecodedReward(SquareCodec(), {"b": lambda videos, _: -(videos.mean(dim=(1, 2, 3, 4)) - 1).square()})
    config = settings(num_updates=40, learning_rate=0.05)
    rewards = [value for _, value in DifferentiableRewardTrainer(policy, reward, PROMPTS, config).train().proxy_curve]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.1
    assert reward.num_queries == 40 * 8


def test_a_reward_of_decoded_frames_may_leave_the_prompts_alone():
    class Mean(torch.nn.Module):
        def forward(self, videos):
            return videos.mean(dim=(1, 2, 3, 4))

    latents, prompts = torch.full((2, 3, 1, 1, 1), 2.0), ["a", "bb"]

    def keyword(videos, *, prompts):
        return brightness(videos, prompts)

    def optional(videos, scale=2):
        return scale * videos.mean(dim=(1, 2, 3, 4))

    rewards = {"b": brightness, "module": Mean(), "keyword": keyword, "optional": optional}
    scores = DecodedReward(SquareCodec(), rewards).scores(latents, prompts)
    told = {name: values.tolist() for name, values in scores.items()}
    assert told == {"b": [4, 8], "module": [4, 4], "keyword": [4, 8], "optional": [8, 8]}
    for wrong, message in ((lambda: 0, r"must take videos, or videos and prompts; it takes \(\)"), (3, "got a int")):
        with pytest.raises(ConfigError, match=message):
            DecodedReward(SquareCodec(), {"wrong": wrong})
    for returned, told in ((1.0, "a float"), (torch.zeros(3), r"shape \[3\]")):
        with pytest.raises(DataError, match=rf"'wrong' must return a tensor .* per video, \[1\]; got {told}"):
            DecodedReward(SquareCodec(), {"wrong": lambda videos, value=returned: value}).scores(latents, prompts)


def test_what_an_oracle_does_not_return_is_missed_before_any_work(linear_policy, exact_proxy):
    class Other:
        fingerprints = {"other": "1"}

        def __call__(self, latents, prompts):
            pytest.fail("it was asked")

    with pytest.raises(ConfigError, match="unknown reward 'quality'"):
        TrueReward(Other(), ["quality"])
    with pytest.raises(ConfigError, match="the oracle returns other and not the proxy's reward 'quality'"):
        ReinforceTrainer(linear_policy(), exact_proxy(), PROMPTS, settings(), oracle=Other())
