"""Adapters are all that is tuned, and end in the policy's own weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError
from latent_rewards.lro.adapters import Adapters
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.pareto import WeightConditioned
from latent_rewards.lro.reference import AdaptersOff, adapter_layers
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer

pytestmark = pytest.mark.filterwarnings("ignore:no oracle", "ignore:one reward and no holdout")

LATENTS = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2, 1, 1, 1)


@pytest.fixture
def policy(linear_policy):
    """A policy of two linear layers, one inside another module."""

    class Layered(linear_policy):
        def __init__(self) -> None:
            super().__init__(dim=2)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.body = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()

        def transition(self, latents: Tensor, step: int, num_steps: int, condition) -> tuple[Tensor, Tensor]:
            mean, std = super().transition(latents, step, num_steps, condition)
            read = latents.flatten(1).to(self.body[0].weight.dtype)
            return mean + self.body(read).view_as(latents), std

    return Layered()


def config(**settings) -> LROConfig:
    chosen = {
        "num_updates": 4, "learning_rate": 0.1, "prompts_per_update": 2, "num_generations": 4, "step_counts": [2],
        "adapter_rank": 1, "beta": 0.1, "device": "cpu", "progress": False,
    }  # fmt: skip
    return LROConfig(**chosen | settings)


def mean(policy, latents: Tensor = LATENTS) -> Tensor:
    return policy.transition(latents, 0, 2, None)[0]


def test_adapters_change_nothing_at_first_and_are_merged_exactly(policy):
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    start = mean(policy)
    adapters = Adapters(policy, 2, seed=0)
    assert torch.equal(mean(policy), start)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all("lora_" in name and p.dtype == torch.float64 for name, p in trained.items())
    ups = [parameter for name, parameter in trained.items() if "lora_B" in name]
    for up in ups:
        nn.init.constant_(up, 0.3)
    tuned = mean(policy)
    downs = [parameter.detach().clone() for name, parameter in trained.items() if "lora_A" in name]
    adapters.merge()
    torch.testing.assert_close(mean(policy), tuned, rtol=0, atol=1e-14)
    after = dict(policy.named_parameters())
    assert after.keys() == before.keys() and all(p.requires_grad for p in after.values())
    assert not adapter_layers(policy) and not hasattr(policy, "peft_config")
    for name, up, down in zip(("body.0.weight", "body.2.weight"), ups, downs, strict=True):
        torch.testing.assert_close(after[name], before[name] + up @ down, rtol=0, atol=1e-14)
    assert all(torch.equal(after[name], before[name]) for name in before if not name.endswith("weight"))


@pytest.mark.parametrize(
    ("trainer", "estimator"), [(DifferentiableRewardTrainer, "pathwise"), (ReinforceTrainer, "smoothed")]
)
def test_a_run_tunes_adapters_alone(policy, exact_proxy, trainer, estimator):
    before = copy.deepcopy(policy)
    seen = []

    def watch(step: int, logs: dict) -> None:
        seen.append([p.detach().clone() for name, p in policy.named_parameters() if "lora_" not in name])

    run = trainer(policy, exact_proxy(), ["a", "b"], config(estimator=estimator), callbacks=[watch])
    assert isinstance(run.reference, AdaptersOff)
    run.train()
    base = list(before.parameters())
    assert all(torch.equal(a, b) for now in seen for a, b in zip(now, base, strict=True))
    assert not adapter_layers(policy) and not torch.equal(mean(policy), mean(before))
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {"body.0.weight", "body.2.weight"}


def test_an_interrupted_run_continues_to_the_same_bits(policy, exact_proxy, tmp_path):
    def run(folder: str, *counts: int) -> list[Tensor]:
        for count in counts:
            tuned = copy.deepcopy(policy)
            settings = config(num_updates=count, output_dir=str(tmp_path / folder), seed=3)
            DifferentiableRewardTrainer(tuned, exact_proxy(), ["a", "b"], settings).train()
        return list(tuned.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run("parts", 3, 6), run("whole", 6), strict=True))


def test_layers_are_taken_by_their_whole_names_and_only_where_they_are_called():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2)
            self.block = nn.ModuleDict({"out": nn.LayerNorm(4)})

    odd = Odd()
    adapters = Adapters(odd, 1, seed=0)
    assert [name for name, p in odd.named_parameters() if p.requires_grad and "lora_A" in name] == [
        "out.lora_A.default.weight"
    ]
    adapters.merge()
    assert isinstance(odd.block["out"], nn.LayerNorm) and type(odd.out) is nn.Linear


def test_a_trainer_that_cannot_be_made_leaves_the_policy_as_it_was(policy, exact_proxy):
    proxy = exact_proxy()
    proxy.reward_names = ("quality", "room")
    with pytest.raises(ConfigError, match="say how to combine them"):
        DifferentiableRewardTrainer(policy, proxy, ["a"], config())
    assert not adapter_layers(policy) and all(parameter.requires_grad for parameter in policy.parameters())


@pytest.mark.parametrize("rank", [1, None])
def test_a_policy_in_sixteen_bits_learns_by_steps_that_are_lost_in_them(policy, exact_proxy, rank):
    policy.to(torch.bfloat16)
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    settings = config(adapter_rank=rank, learning_rate=1e-5, beta=0.0, num_updates=2)
    trainer = DifferentiableRewardTrainer(policy, exact_proxy(), ["a"], settings)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert (policy.gain.dtype == torch.bfloat16) is (rank is not None), "what is frozen stays as it is"
    trainer.train()
    after = policy.state_dict()
    assert {value.dtype for value in after.values()} == {torch.float32}
    moved = [float((after[name] - start[name].float()).abs().max()) for name in after if "weight" in name]
    assert 0 < min(moved) and max(moved) < 1e-4
    assert any(torch.equal(after[name].bfloat16(), start[name]) for name in after)


def test_what_adapters_cannot_be_added_to_is_refused(policy, linear_policy, exact_proxy):
    with pytest.raises(ConfigError, match=r"adapter_rank=1: LinearPolicy has no nn\.Linear; leave it None"):
        DifferentiableRewardTrainer(linear_policy(), exact_proxy(), ["a"], config())
    partly = copy.deepcopy(policy)
    partly.gain.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"Layered already trains a part of itself \(5 of 6 parameters\)"):
        Adapters(partly, 1, seed=0)
    with pytest.raises(ConfigError, match="already trains a part of itself"):
        Adapters(WeightConditioned(copy.deepcopy(policy), ("a", "b")), 1, seed=0)
    Adapters(policy, 1, seed=0)
    with pytest.raises(ConfigError, match="already trains a part of itself"):
        Adapters(policy, 1, seed=0)
    with pytest.raises(ConfigError, match="adapter_rank must be at least 1; got 0"):
        config(adapter_rank=0)
    with pytest.raises(ConfigError, match="adapter_rank and sync_ref_model"):
        config(sync_ref_model=True)
