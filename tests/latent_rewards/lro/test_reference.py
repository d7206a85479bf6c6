from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.reference import (
    AdaptersOff,
    Following,
    adapter_layers,
    adapters_off,
    default_reference,
    only_adapters_train,
    reference_for,
)
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer
from latent_rewards.training.torchvision_guard import mend_torchvision

mend_torchvision()
from peft import LoraConfig, inject_adapter_in_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:no oracle", "ignore:one reward and no holdout")

PROMPTS = ["a", "b"]
ALL = [
    (ReinforceTrainer, "reinforce", "score"),
    (ReinforceTrainer, "smoothed", "score"),
    (ReinforceTrainer, "smoothed", "path"),
    (DifferentiableRewardTrainer, "hybrid", "path"),
    (DifferentiableRewardTrainer, "pathwise", "path"),
]


def config(**settings) -> LROConfig:
    chosen = {
        "num_updates": 5,
        "learning_rate": 0.05,
        "prompts_per_update": 2,
        "num_generations": 4,
        "step_counts": [2],
        "num_draws": 4,
        "beta": 0.1,
        "max_grad_norm": 0.0,
        "device": "cpu",
        "progress": False,
    }
    return LROConfig(**chosen | settings)


@pytest.fixture
def adapted(linear_policy):
    """A function that makes a policy x -> body(x) + head(x), whose body has a LoRA layer."""

    class Adapted(linear_policy):
        def __init__(self) -> None:
            super().__init__(dim=2)
            self.requires_grad_(False)
            self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def transition(self, latents: Tensor, step: int, num_steps: int, condition) -> tuple[Tensor, Tensor]:
            _, std = super().transition(latents, step, num_steps, condition)
            x = latents.flatten(1)
            return 0.5 * (self.body(x) + self.head(x)).view_as(latents), std

    def build(start: float = 0.0, **settings) -> Adapted:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            policy = Adapted()
            inject_adapter_in_model(LoraConfig(r=1, target_modules=["body"], **settings), policy)
            policy.double()
            nn.init.constant_(policy.body.lora_B["default"].weight, start)
        return policy

    return build


def mean(policy, latents: Tensor) -> Tensor:
    return policy.transition(latents, 0, 2, None)[0]


def base_mean(policy, latents: Tensor) -> Tensor:
    x = latents.flatten(1)
    return 0.5 * (policy.body.base_layer(x) + policy.head(x)).view_as(latents)


LATENTS = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2, 1, 1, 1)


def test_the_reference_of_adapters_is_the_policy_without_them(adapted):
    policy = adapted(start=0.7)
    assert only_adapters_train(policy) and len(adapter_layers(policy)) == 1
    reference, before = default_reference(policy), mean(policy, LATENTS)
    assert isinstance(reference, AdaptersOff) and reference.module is policy
    assert torch.equal(mean(reference, LATENTS), base_mean(policy, LATENTS))
    assert torch.equal(mean(policy, LATENTS), before) and not torch.equal(before, base_mean(policy, LATENTS))
    assert reference.latent_shape(None) == (2, 1, 1, 1) and reference.timesteps(2) == [1.0, 0.5]
    assert len(reference.encode(PROMPTS)) == 2


def test_what_is_compared_with_is_the_policy_as_it_was(adapted):
    policy, choice = adapted(start=0.7), {"charged": False, "compared": True, "moves": False}
    copied = reference_for(policy, None, **choice, new_adapters=False)
    assert not isinstance(copied, AdaptersOff) and torch.equal(mean(copied, LATENTS), mean(policy, LATENTS))
    assert isinstance(reference_for(policy, None, **choice, new_adapters=True), AdaptersOff)
    assert reference_for(policy, None, **choice | {"compared": False}, new_adapters=False) is None


def test_adapters_are_as_they_were_after_the_block_and_after_an_error_in_it(adapted):
    policy = adapted(start=0.7)
    policy.body.lora_A["default"].weight.requires_grad_(False)  # peft would train it again
    before, flags = mean(policy, LATENTS), [p.requires_grad for p in policy.parameters()]
    for error in (None, RuntimeError):
        try:
            with adapters_off(policy):
                assert torch.equal(mean(policy, LATENTS), base_mean(policy, LATENTS))
                if error is not None:
                    raise error
        except RuntimeError:
            pass
        assert torch.equal(mean(policy, LATENTS), before)
        assert [p.requires_grad for p in policy.parameters()] == flags
    policy.body.enable_adapters(False)
    with adapters_off(policy):
        pass
    assert policy.body.disable_adapters  # it was off before


def test_trainable_weights_beside_the_adapters_need_a_copy(adapted, linear_policy):
    policy = adapted()
    policy.head.requires_grad_(True)
    assert not only_adapters_train(policy) and not isinstance(default_reference(policy), AdaptersOff)
    policy = adapted()
    policy.body.base_layer.bias.requires_grad_(True)
    assert not only_adapters_train(policy)
    assert not only_adapters_train(linear_policy())


def test_a_module_trained_beside_its_original_is_switched_off_too(adapted):
    policy = adapted(modules_to_save=["head"])
    wrapper = policy.head
    if not hasattr(wrapper, "modules_to_save"):
        pytest.skip("this peft wraps modules_to_save in PeftModel only")
    assert only_adapters_train(policy) and len(adapter_layers(policy)) == 2
    start = mean(policy, LATENTS)
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight += 1.0
    assert not torch.equal(mean(policy, LATENTS), start)
    assert torch.equal(mean(default_reference(policy), LATENTS), start)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("kl", ["per_state", "return"])
def test_a_run_against_adapters_off_is_a_run_against_a_copy(adapted, exact_proxy, case, kl):
    trainer, estimator, chain = case

    def run(copied):
        policy = adapted()
        start = {name: value.clone() for name, value in policy.state_dict().items()}
        settings = config(estimator=estimator, chain=chain, kl=kl)
        reference = copy.deepcopy(policy) if copied else None
        made = trainer(policy, exact_proxy(), PROMPTS, settings, reference=reference)
        history = made.train().history
        moved = {name for name, value in policy.state_dict().items() if not torch.equal(value, start[name])}
        assert moved == {"body.lora_A.default.weight", "body.lora_B.default.weight"}
        return made, history, policy.state_dict()

    (off, history, weights), (copied, expected, other) = run(False), run(True)
    assert isinstance(off.reference, AdaptersOff) and isinstance(copied.reference, nn.Module)
    assert history[0]["kl"] == 0.0 < history[-1]["kl"]
    for mine, theirs in zip(history, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12, abs=1e-14)
    for name, value in weights.items():
        torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-14)


def test_a_policy_that_starts_away_from_its_base_is_told_so(adapted, exact_proxy, recwarn):
    DifferentiableRewardTrainer(adapted(), exact_proxy(), PROMPTS, config(num_updates=1)).train()
    assert not [w for w in recwarn if "without adapters" in str(w.message)]
    with pytest.warns(UserWarning, match=r"starts .* nats .* without adapters.*reference=copy.deepcopy"):
        DifferentiableRewardTrainer(adapted(start=0.7), exact_proxy(), PROMPTS, config(num_updates=2)).train()


def test_checkpointing_cannot_go_backwards_through_adapters_off(adapted, exact_proxy):
    policy = adapted()
    policy.body.gradient_checkpointing = True
    with pytest.raises(ConfigError, match=r"kl='return'.*gradient.checkpointing"):
        DifferentiableRewardTrainer(policy, exact_proxy(), PROMPTS, config(kl="return"))
    DifferentiableRewardTrainer(policy, exact_proxy(), PROMPTS, config())
    ReinforceTrainer(policy, exact_proxy(), PROMPTS, config(kl="return", chain="score"))


def test_the_copy_follows_the_policy_every_so_many_updates(linear_policy, exact_proxy):
    policy, seen = linear_policy(dim=2, gain=0.5), []

    def watch(step, logs):
        seen.append((policy.gain.item(), made.reference.gain.item(), made.reference.shift.detach().clone()))

    settings = config(num_updates=7, sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=0.3)
    made = DifferentiableRewardTrainer(policy, exact_proxy(), PROMPTS, settings, callbacks=[watch])
    history = made.train().history
    reference = 0.5
    for update, (mine, theirs, _) in enumerate(seen, start=1):
        if update % 3 == 0:
            reference = 0.3 * mine + 0.7 * reference
        assert theirs == pytest.approx(reference, rel=1e-12)
    assert len({theirs for _, theirs, _ in seen}) == 3 and float(seen[-1][2].abs().min()) > 0
    assert not made.reference.gain.requires_grad and history[0]["kl"] == 0.0


def test_a_copy_that_follows_all_the_way_is_the_policy(linear_policy, exact_proxy):
    settings = config(num_updates=4, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0)
    history = DifferentiableRewardTrainer(linear_policy(), exact_proxy(), PROMPTS, settings).train().history
    assert [entry["kl"] == 0.0 for entry in history] == [True, False, True, False]


def test_weights_that_are_equal_stay_equal_to_the_bit():
    policy, reference = nn.Linear(40, 40), nn.Linear(40, 40)
    reference.load_state_dict(policy.state_dict())
    following = Following(policy, reference, every=1, alpha=0.6)
    following.after_update(0)
    assert torch.equal(policy.weight, reference.weight)
    kept = {name: value.clone() for name, value in following.state_dict().items()}
    nn.init.zeros_(reference.weight)
    following.load_state_dict(kept)
    assert torch.equal(policy.weight, reference.weight)


def test_a_reference_that_cannot_follow_is_refused(adapted, linear_policy, exact_proxy):
    settings = config(sync_ref_model=True)
    with pytest.raises(ConfigError, match=r"adapters off; pass reference=copy.deepcopy\(policy\)"):
        DifferentiableRewardTrainer(adapted(), exact_proxy(), PROMPTS, settings)
    with pytest.raises(ConfigError, match="LinearPolicy has others; leave reference=None"):
        DifferentiableRewardTrainer(
            linear_policy(dim=2), exact_proxy(), PROMPTS, settings, reference=linear_policy(dim=3)
        )

    class Fixed:
        transition = linear_policy.transition

    with pytest.raises(ConfigError, match="Fixed has others"):
        DifferentiableRewardTrainer(linear_policy(), exact_proxy(), PROMPTS, settings, reference=Fixed())
