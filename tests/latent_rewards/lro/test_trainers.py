from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, DataError, FingerprintMismatchError
from latent_rewards.dataset import RewardDataset
from latent_rewards.lro.checks import OffPolicyError
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer
from latent_rewards.proxies import ProxyConfig, train_proxy
from latent_rewards.rewards import WeightedSum
from latent_rewards.training import loop as module_of_loops
from latent_rewards.training.loop import NonFiniteError
from latent_rewards.training.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:no oracle", "ignore:one reward and no holdout")

PROMPTS = ["a", "b", "c"]
ALL = [
    (ReinforceTrainer, "reinforce"),
    (ReinforceTrainer, "smoothed"),
    (DifferentiableRewardTrainer, "pathwise"),
    (DifferentiableRewardTrainer, "hybrid"),
    (ReinforceTrainer, "smoothed path"),
]


def config(**settings) -> LROConfig:
    chosen = {
        "num_updates": 30,
        "learning_rate": 0.05,
        "prompts_per_update": 3,
        "num_generations": 4,
        "step_counts": [2],
        "beta": 0.0,
        "pessimism": 0.0,
        "max_grad_norm": 0.0,
        "device": "cpu",
        "progress": False,
    }
    chosen |= settings
    chosen["chain"] = "path" if chosen.get("estimator") == "smoothed path" else "score"
    chosen["estimator"] = (chosen.get("estimator") or "").removesuffix(" path") or None
    return LROConfig(**chosen)


def truth(latents: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """The true reward: -|x - 1|^2 / 2."""
    return {"quality": -0.5 * (latents.flatten(1) - 1).square().sum(1)}


@pytest.mark.parametrize(("trainer", "estimator"), ALL)
def test_every_trainer_climbs_the_proxy_and_logs_what_it_should(linear_policy, exact_proxy, trainer, estimator):
    policy = linear_policy(dim=2, gain=0.5)
    made = trainer(
        policy, exact_proxy(), PROMPTS, config(estimator=estimator, step_counts=[1, 2], beta=1e-3, head_std=0.3)
    )
    result = made.train()
    rewards = [value for _, value in result.proxy_curve]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3
    assert len(result.history) == 30 and not result.stopped_early and result.best_step is None
    names = {"step", "reward", "reward_std", "rewards/quality/mean", "kl", "loss", "grad_norm"}
    assert set(result.history[0]) == names
    assert result.history[0]["kl"] == 0.0 < result.history[-1]["kl"]


@pytest.mark.parametrize(("trainer", "estimator"), ALL)
def test_each_transition_is_evaluated_with_gradient_once(linear_policy, exact_proxy, trainer, estimator):
    policy = linear_policy()
    trainer(policy, exact_proxy(), PROMPTS, config(estimator=estimator, num_updates=3)).train()
    assert policy.calls == 3 * 2


def test_only_parameters_that_require_a_gradient_move(linear_policy, exact_proxy):
    policy = linear_policy()
    policy.gain.requires_grad_(False)
    DifferentiableRewardTrainer(policy, exact_proxy(), PROMPTS, config(num_updates=3)).train()
    assert float(policy.gain) == 1.0 and float(policy.shift.detach().abs().max()) > 0.1
    policy.shift.requires_grad_(False)
    with pytest.raises(ConfigError, match="requires_grad"):
        DifferentiableRewardTrainer(policy, exact_proxy(), PROMPTS, config())


@pytest.mark.parametrize(("trainer", "estimator"), ALL)
@pytest.mark.parametrize("reward", ["linear", "quadratic"])
def test_kl_regularised_optimum(linear_policy, exact_proxy, trainer, estimator, reward):  # row 13
    dim, mu, h, slope, curvature, target = 3, 0.2, 0.5, 0.6, 0.8, 1.5
    beta = 0.9  # per latent dimension: the KL of the whole event is charged beta / dim
    policy = linear_policy(dim=dim, gain=0.0, shift=mu)
    policy.gain.requires_grad_(False)
    if reward == "linear":
        proxy = exact_proxy(curvature=0.0, slope=slope)
        optimum = mu + h**2 * slope / (beta / dim)
    else:
        proxy = exact_proxy(target=target, curvature=curvature)
        optimum = (curvature * target + beta / dim * mu / h**2) / (curvature + beta / dim / h**2)
    path: list[Tensor] = []
    settings = config(
        estimator=estimator, beta=beta, head_std=h, step_counts=[1], num_updates=220, learning_rate=0.02,
        prompts_per_update=1, num_generations=2 if trainer is DifferentiableRewardTrainer else 16,
    )  # fmt: skip
    trainer(
        policy, proxy, PROMPTS, settings, callbacks=[lambda step, logs: path.append(policy.shift.detach().clone())]
    ).train()
    if trainer is DifferentiableRewardTrainer:
        torch.testing.assert_close(path[-1], torch.full_like(path[-1], optimum), rtol=0, atol=1e-3)
    else:
        # Batch means of the stationary part: 6 blocks x 3 coordinates, all with the same expectation.
        blocks = torch.stack(path[100:]).view(6, 20, dim).mean(1).flatten()
        assert abs(float(blocks.mean()) - optimum) < 4.5 * float(blocks.std()) / math.sqrt(len(blocks)) + 1e-3
        assert float(blocks.std()) < 0.1


@pytest.mark.parametrize(("trainer", "estimator"), ALL[:2] + ALL[3:4])
def test_several_iterations_per_rollout_use_clipped_ratios(linear_policy, exact_proxy, trainer, estimator):
    policy = linear_policy(gain=0.5)
    settings = config(estimator=estimator, num_iterations=3, epsilon=0.1, num_updates=15, head_std=0.3)
    result = trainer(policy, exact_proxy(), PROMPTS, settings).train()
    assert policy.calls == 15 * 3 * 2
    assert result.proxy_curve[-1][1] > result.proxy_curve[0][1] + 0.2


def test_a_policy_that_does_not_repeat_itself_is_refused(linear_policy, exact_proxy):
    class Random(linear_policy):
        def transition(self, latents, step, num_steps, condition):
            mean, std = super().transition(latents, step, num_steps, condition)
            return nn.functional.dropout(mean, 0.5), std

    with pytest.raises(OffPolicyError, match="dropout"):
        ReinforceTrainer(Random(), exact_proxy(), PROMPTS, config()).train()


def test_dropout_is_off_during_training(linear_policy, exact_proxy):
    class WithDropout(linear_policy):
        def transition(self, latents, step, num_steps, condition):
            mean, std = super().transition(latents, step, num_steps, condition)
            return nn.functional.dropout(mean, 0.5, training=self.training), std

    ReinforceTrainer(WithDropout().train(), exact_proxy(), PROMPTS, config(num_updates=2)).train()


class Broken(nn.Module):
    """A proxy whose value or gradient is NaN for the sample with the largest latent."""

    reward_names = ("quality",)

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def scores(self, latents: Tensor, prompts: list[str], pessimism: float = 0.0) -> dict[str, Tensor]:
        x = latents.flatten(1).sum(1)
        worst = x == x.max()
        if self.what == "value":
            return {"quality": torch.where(worst, math.nan, x)}
        return {"quality": torch.where(worst, (x - x).sqrt(), x)}  # sqrt has an infinite slope at 0: 0 * inf


@pytest.mark.parametrize("what", ["value", "gradient"])
def test_non_finite_numbers_change_nothing_and_name_the_samples(linear_policy, what):
    policy = linear_policy(dim=2)
    before = copy.deepcopy(policy.state_dict())
    made = DifferentiableRewardTrainer(policy, Broken(what), PROMPTS, config())
    batch = made.samples.update_batch(0, 3, 4)
    worst = int(made._rollout(batch).final.flatten(1).sum(1).argmax())
    message = (
        f"reward not finite at step 0, samples {worst} " if what == "value" else "gradient .* at step 0 .*samples: 0 "
    )
    with pytest.raises(NonFiniteError, match=message):
        made.train()
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_non_finite_latents_are_found_before_the_proxy_sees_them(linear_policy, exact_proxy):
    policy = linear_policy(shift=math.nan)
    with pytest.raises(NonFiniteError, match="latents not finite at step 0, samples 0 "):
        ReinforceTrainer(policy, exact_proxy(), PROMPTS, config()).train()


@pytest.mark.parametrize(("trainer", "estimator"), ALL[1:3])
def test_refresh_raises_the_true_reward_where_a_frozen_proxy_lowers_it(linear_policy, exact_proxy, trainer, estimator):
    def tuned(oracle):
        policy, proxy = linear_policy(gain=0.5), exact_proxy(target=-2.0)  # the truth is at 1
        policy.gain.requires_grad_(False)
        settings = config(
            estimator=estimator, step_counts=[1], num_updates=80, head_std=0.3, refresh_every=10, refresh_queries=32
        )
        result = trainer(policy, proxy, PROMPTS, settings, oracle=oracle).train()
        return float(truth(policy.shift.detach()[None], [])["quality"]), result

    start = float(truth(torch.zeros(1, 1), [])["quality"])
    frozen, frozen_result = tuned(None)
    refreshed, result = tuned(truth)
    assert frozen < start - 1 and refreshed > start + 0.3
    assert frozen_result.num_queries == 0 and frozen_result.true_curve == []
    assert result.num_queries == 7 * 32 and [entry["step"] for entry in result.true_curve] == list(range(10, 80, 10))
    logged = result.history[10]
    assert logged["gap/quality"] == pytest.approx(
        result.true_curve[0]["proxy"]["quality"] - logged["true/quality"], abs=1e-12
    )
    assert abs(result.history[70]["gap/quality"]) < 0.3 * abs(logged["gap/quality"]) and logged["queries"] == 32


def test_the_query_budget_is_kept(linear_policy, exact_proxy):
    settings = config(num_updates=12, refresh_every=3, refresh_queries=16, max_queries=24)
    made = ReinforceTrainer(linear_policy(), exact_proxy(), PROMPTS, settings, oracle=truth)
    with pytest.warns(UserWarning, match="budget of 24"):
        assert made.train().num_queries == 24
    assert [update["fresh"] for update in made.scoring.proxy.updates] == [16, 8]


@pytest.mark.parametrize("acquisition", ["random", "mixed"])
def test_a_proxy_that_chooses_its_queries_costs_no_more_of_them(linear_policy, acquisition):
    draws = torch.randn(64, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    data = RewardDataset.from_tensors(draws, ["a"] * 64, truth(draws, []))
    proxy = train_proxy(data, config=ProxyConfig(width=8, depth=1, ensemble_size=2, num_updates=5, progress=False))
    queried = []

    def counting(latents, prompts):
        queried.append(len(latents))
        return truth(latents, prompts)

    settings = config(
        num_updates=7, refresh_every=3, refresh_queries=10, refresh_steps=2, acquisition=acquisition,
        acquisition_pool=3, replay_half_life=1.0,
    )  # fmt: skip
    made = ReinforceTrainer(linear_policy().float(), proxy, PROMPTS, settings, oracle=counting, dataset=data)
    result = made.train()
    assert sum(queried) == result.num_queries == 20 and len(made.refresher.replay) == 84
    assert len(result.true_curve) == 2


def test_the_first_samples_of_a_pool_are_those_of_a_smaller_draw(linear_policy, exact_proxy):
    made = ReinforceTrainer(linear_policy(), exact_proxy(), PROMPTS, config(step_counts=[1, 2]), oracle=truth)

    def by_id(count):
        parts = list(made._generate("lro/refresh", 3, count))
        ids = torch.tensor([i for batch, _ in parts for i in batch.sample_ids])
        texts = [prompt for batch, _ in parts for prompt in batch.prompts]
        return torch.cat([final for _, final in parts])[ids.argsort()], [texts[i] for i in ids.argsort()]

    (few, few_prompts), (many, many_prompts) = by_id(5), by_id(20)
    assert torch.equal(few, many[:5]) and few_prompts == many_prompts[:5]


def test_holdout_stops_early_and_the_best_policy_remains(linear_policy, exact_proxy):
    policy, shifts = linear_policy(gain=0.0), []
    settings = config(
        step_counts=[1], num_updates=100, learning_rate=0.1, holdout_every=5, holdout_samples=4, patience=2
    )
    result = DifferentiableRewardTrainer(
        policy, exact_proxy(target=5.0), PROMPTS, settings, holdout=truth,
        callbacks=[lambda step, logs: shifts.append(float(policy.shift.detach()))],
    ).train()  # fmt: skip
    best = result.best_step
    assert result.stopped_early and 5 <= best <= 20 and len(result.history) == best + 10
    assert float(policy.shift.detach()) == shifts[best - 1]
    assert [entry["step"] for entry in result.holdout_curve] == list(range(0, best + 11, 5))
    assert result.history[5]["holdout/quality"] == result.holdout_curve[1]["values"]["quality"]


@pytest.mark.parametrize("patience", [2, 100, None])
def test_a_run_that_stopped_early_goes_on_with_more_patience(linear_policy, exact_proxy, tmp_path, patience):
    def run(patience, folder):
        policy = linear_policy(gain=0.0)
        settings = config(
            step_counts=[1], num_updates=60, learning_rate=0.1, holdout_every=5, holdout_samples=4,
            patience=patience, output_dir=str(tmp_path / folder),
        )  # fmt: skip
        trainer = DifferentiableRewardTrainer(policy, exact_proxy(target=5.0), PROMPTS, settings, holdout=truth)
        return trainer.train(), policy.shift.detach()

    stopped, best = run(2, "one")
    assert stopped.stopped_early and len(stopped.history) < 60
    resumed, weight = run(patience, "one")
    assert torch.equal(weight, best) and resumed.best_step == stopped.best_step
    assert resumed.stopped_early is (patience == 2)
    whole, _ = run(patience, "another")
    assert resumed.proxy_curve == whole.proxy_curve and resumed.holdout_curve == whole.holdout_curve
    assert len(resumed.history) == (len(stopped.history) if patience == 2 else 60)


def test_learning_rate_rises_linearly_over_the_warm_up(linear_policy, exact_proxy):
    settings = config(step_counts=[1], num_updates=6, learning_rate=0.1, warmup=4, beta=0.0)
    assert [settings.learning_rate_at(step) for step in range(6)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert config(learning_rate=0.1).learning_rate_at(0) == 0.1
    falling = config(num_updates=4, learning_rate=0.1, learning_rate_floor=0.2)
    assert [falling.learning_rate_at(step) for step in (0, 2, 4)] == pytest.approx([0.1, 0.06, 0.02])
    policy, shifts = linear_policy(gain=0.0), [0.0]
    watch = lambda step, logs: shifts.append(float(policy.shift.detach()))  # noqa: E731
    DifferentiableRewardTrainer(policy, exact_proxy(target=50.0), PROMPTS, settings, callbacks=[watch]).train()
    # The first step of Adam is as long as the learning rate.
    assert shifts[1] - shifts[0] == pytest.approx(0.025, rel=1e-4)
    assert shifts[2] - shifts[1] == pytest.approx(0.05, rel=0.05)


def test_holdout_samples_are_always_the_same(linear_policy, exact_proxy):
    seen: list[Tensor] = []

    def watch(latents: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        seen.append(latents)
        return truth(latents, prompts)

    settings = config(num_updates=4, holdout_every=2, holdout_samples=4, learning_rate=1e-12)
    DifferentiableRewardTrainer(linear_policy(), exact_proxy(), PROMPTS, settings, holdout=watch).train()
    assert len(seen) == 3
    for latents in seen[1:]:
        torch.testing.assert_close(latents, seen[0], rtol=0, atol=1e-9)


def test_the_default_reference_is_a_frozen_copy(linear_policy, exact_proxy):
    policy = linear_policy()
    made = DifferentiableRewardTrainer(policy, exact_proxy(), PROMPTS, config(num_updates=2, beta=0.1))
    made.train()
    assert [float(p.abs().sum()) for p in made.reference.parameters()] == [1.0, 0.0]
    assert not any(p.requires_grad for p in made.reference.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    assert DifferentiableRewardTrainer(policy, exact_proxy(), PROMPTS, config(beta=0.0)).reference is None


def test_holdout_evaluates_the_last_policy_too(linear_policy, exact_proxy):
    settings = config(num_updates=7, holdout_every=5, holdout_samples=4)
    result = DifferentiableRewardTrainer(linear_policy(), exact_proxy(), PROMPTS, settings, holdout=truth).train()
    assert [entry["step"] for entry in result.holdout_curve] == [0, 5, 7] and result.best_step == 7


def test_what_a_metric_draws_depends_on_the_step_alone(linear_policy, exact_proxy):
    def noisy(latents: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return {"quality": torch.rand(len(latents))}

    def curve(seed):
        torch.manual_seed(seed)
        settings = config(num_updates=4, holdout_every=2, holdout_samples=4)
        made = DifferentiableRewardTrainer(linear_policy(), exact_proxy(), PROMPTS, settings, holdout=noisy)
        return made.train().holdout_curve

    assert len(curve(0)) == 3 and curve(0) == curve(1)


class Pull:
    """An anchor that pulls the shift to -1 and counts its own updates."""

    def __init__(self) -> None:
        self.updates = torch.zeros(())

    def loss(self, policy, condition, noise: Tensor) -> Tensor:
        assert noise.shape[:2] == (2, len(condition))
        return ((policy.shift + 1) ** 2).sum() + 0 * noise.sum() + 1e-3 * self.updates * policy.shift.sum()

    def after_step(self) -> None:
        self.updates += 1

    def state_dict(self) -> dict:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"].clone()


def test_anchor_holds_the_policy(linear_policy, exact_proxy):
    def tuned(weight):
        policy, anchor = linear_policy(gain=0.5), Pull()
        settings = config(anchor_weight=weight, anchor_every=2, num_updates=60)
        history = (
            DifferentiableRewardTrainer(policy, exact_proxy(target=2.0), PROMPTS, settings, anchor=anchor)
            .train()
            .history
        )
        assert anchor.updates == 60 and ["anchor" in entry for entry in history[:4]] == [True, False, True, False]
        return float(policy.shift.detach())

    assert tuned(10.0) < tuned(0.0) - 0.5


def replay() -> RewardDataset:
    latents = torch.linspace(-1, 0.5, 6, dtype=torch.float64).view(6, 1, 1, 1, 1)
    return RewardDataset.from_tensors(latents, ["a"] * 6, truth(latents, ["a"] * 6))


@pytest.mark.parametrize(("trainer", "estimator"), ALL[1:3])
def test_an_interrupted_run_continues_to_the_same_bits(linear_policy, exact_proxy, tmp_path, trainer, estimator):
    class Interrupt(Exception):
        pass

    def run(folder, stop_at=None):
        def interrupt(step, logs):
            if step == stop_at:
                raise Interrupt

        policy, proxy, anchor = linear_policy(gain=0.5), exact_proxy(target=-2.0), Pull()
        settings = config(
            estimator=estimator, num_updates=12, beta=0.05, refresh_every=3, refresh_queries=8, holdout_every=4,
            holdout_samples=4, checkpoint_every=5, output_dir=str(tmp_path / folder), pessimism=0.5, last_k=1,
        )  # fmt: skip
        result = trainer(
            policy, proxy, PROMPTS, settings, oracle=truth, dataset=replay(), holdout=truth, anchor=anchor,
            callbacks=[interrupt],
        ).train()  # fmt: skip
        return policy.state_dict(), proxy.state_dict(), result

    with pytest.raises(Interrupt):
        run("interrupted", stop_at=8)
    continued, whole = run("interrupted"), run("whole")
    for mine, theirs in zip(continued[:2], whole[:2], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert json.dumps(continued[2].__dict__) == json.dumps(whole[2].__dict__)
    again = run("whole")  # a finished run has nothing left to do
    assert json.dumps(again[2].__dict__) == json.dumps(whole[2].__dict__)
    policy = linear_policy()
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(ConfigError, match="num_generations=4"):
        trainer(
            policy, exact_proxy(), PROMPTS, oracle=truth, anchor=Pull(),
            config=config(estimator=estimator, output_dir=str(tmp_path / "whole"), num_generations=2),
        ).train()  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_a_trained_proxy_is_refreshed_and_continues_to_the_same_bits(linear_policy, tmp_path):
    from latent_rewards.proxies import ProxyConfig, train_proxy

    latents = torch.randn(64, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dataset = RewardDataset.from_tensors(latents, ["a", "b"] * 32, truth(latents, ["a"] * 64))
    trained = train_proxy(dataset, config=ProxyConfig(trunk="linear", progress=False, device="cpu"))

    def run(folder, num_updates):
        settings = config(
            num_updates=num_updates,
            refresh_every=2,
            refresh_queries=8,
            output_dir=str(tmp_path / folder),
            pessimism=0.5,
        )
        policy, proxy = linear_policy(dim=2), copy.deepcopy(trained)
        made = DifferentiableRewardTrainer(policy, proxy, PROMPTS, settings, oracle=truth, dataset=dataset)
        result = made.train()
        return policy.state_dict(), proxy.state_dict(), result

    run("parts", 3)
    continued, whole = run("parts", 6), run("whole", 6)
    for mine, theirs in zip(continued[:2], whole[:2], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert whole[2].history[4]["proxy/quality/mae_before"] > 0 and whole[2].num_queries == 16


def test_a_weighted_sum_of_two_rewards(linear_policy, exact_proxy):
    proxy = exact_proxy(target=1.0)
    proxy.reward_names = ("good", "bad")
    with pytest.raises(ConfigError, match="WeightedSum"):
        ReinforceTrainer(linear_policy(), proxy, PROMPTS, config())
    reward = WeightedSum({"good": 2.0, "bad": -1.0}, normalize=None)
    result = DifferentiableRewardTrainer(linear_policy(gain=0.2), proxy, PROMPTS, config(), reward=reward).train()
    entry = result.history[-1]
    assert entry["reward"] == pytest.approx(2 * entry["rewards/good/mean"] - entry["rewards/bad/mean"], abs=1e-12)
    assert entry["reward"] > result.history[0]["reward"]


def test_ranks_share_the_groups(linear_policy, exact_proxy, monkeypatch):
    def gradient(rank, ranks):
        monkeypatch.setattr(module_of_loops, "join_launch", lambda name: (Ranks(rank, ranks), torch.device("cpu")))
        policy = linear_policy(gain=0.5)
        made = ReinforceTrainer(policy, exact_proxy(), PROMPTS, config(prompts_per_update=4))
        batch = made._draw_batch(0)
        made._loss(0, 0, batch, made._rollout(batch))[0].backward()
        return policy.gain.grad

    torch.testing.assert_close((gradient(0, 2) + gradient(1, 2)) / 2, gradient(0, 1), rtol=1e-12, atol=0)
    with pytest.raises(ConfigError, match="prompts_per_update=4 cannot be shared by 3 ranks"):
        gradient(0, 3)


def test_risks_are_said_once(linear_policy, exact_proxy):
    with pytest.warns(UserWarning, match="no oracle: the proxy stays frozen"):
        ReinforceTrainer(linear_policy(), exact_proxy(), PROMPTS, config())
    with pytest.warns(UserWarning, match="one reward and no holdout"):
        ReinforceTrainer(linear_policy(), exact_proxy(), PROMPTS, config(), oracle=truth)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReinforceTrainer(linear_policy(), exact_proxy(), PROMPTS, config(), oracle=truth, holdout=truth)


def test_mismatches_are_found_at_construction(linear_policy, exact_proxy):
    class Oracle:
        latent_space = "vae-b"

        def __call__(self, latents, prompts):
            return truth(latents, prompts)

    proxy = exact_proxy()
    proxy.latent_space = "vae-a"
    with pytest.raises(FingerprintMismatchError, match=r"'vae-a'.*'vae-b'"):
        ReinforceTrainer(linear_policy(), proxy, PROMPTS, config(), oracle=Oracle())
    with pytest.raises(ConfigError, match="other trainer"):
        ReinforceTrainer(linear_policy(), exact_proxy(), PROMPTS, config(estimator="pathwise"))

    policy = linear_policy()
    with pytest.raises(ConfigError, match="reference is the policy itself"):
        ReinforceTrainer(policy, exact_proxy(), PROMPTS, config(), reference=policy)
    with pytest.raises(DataError, match="no prompts"):
        ReinforceTrainer(policy, exact_proxy(), [], config())

    class OneStep(linear_policy):
        def timesteps(self, num_steps):
            if num_steps != 1:
                raise ValueError("claims 1 step")
            return [1.0]

    with pytest.raises(ValueError, match="claims 1 step"):
        ReinforceTrainer(OneStep(), exact_proxy(), PROMPTS, config())


class Falling:
    """The true metric as one of which less is better."""

    lower_is_better = frozenset({"quality"})

    def __call__(self, latents: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return {"quality": -truth(latents, prompts)["quality"]}


def test_a_metric_of_which_less_is_better_needs_a_word_and_turns_the_holdout(linear_policy, exact_proxy):
    settings = config(step_counts=[1], num_updates=10, learning_rate=0.1, holdout_every=5, holdout_samples=4)
    with pytest.raises(ConfigError, match=r"less of 'quality' is better.*WeightedSum\(\{'quality': -1.0\}\)"):
        DifferentiableRewardTrainer(linear_policy(), exact_proxy(), PROMPTS, settings, oracle=Falling())
    known = exact_proxy()
    known.metric_fingerprints = {"quality": "quality.blur@1"}
    with pytest.raises(ConfigError, match="less of 'quality' is better"):
        DifferentiableRewardTrainer(linear_policy(), known, PROMPTS, settings)
    reward = WeightedSum({"quality": 1.0})
    DifferentiableRewardTrainer(linear_policy(), exact_proxy(), PROMPTS, settings, reward, oracle=Falling())
    rising, falling = (
        DifferentiableRewardTrainer(linear_policy(gain=0.0), exact_proxy(), PROMPTS, settings, holdout=holdout).train()
        for holdout in (truth, Falling())
    )
    for one, other in zip(rising.holdout_curve, falling.holdout_curve, strict=True):
        assert one["score"] == other["score"] == -other["values"]["quality"]
    assert rising.best_step == falling.best_step > 0


@pytest.mark.parametrize("changed", ["policy", "prompts", "proxy", "reward"])
def test_a_run_does_not_go_on_as_another(linear_policy, exact_proxy, tmp_path, changed):
    def train(**other):
        policy = linear_policy(gain=0.5 if "policy" in other else 1.0)
        prompts = [*PROMPTS[:-1], "another"] if "prompts" in other else PROMPTS
        proxy = exact_proxy(target=2.0 if "proxy" in other else 1.0)
        reward = WeightedSum({"quality": 2.0 if "reward" in other else 1.0})
        settings = config(num_updates=3, output_dir=str(tmp_path))
        return DifferentiableRewardTrainer(policy, proxy, prompts, settings, reward).train().history

    assert train() == train()
    with pytest.raises(ConfigError, match=f"was started with {changed}=.*use the old value to resume"):
        train(**{changed: True})


@pytest.mark.parametrize("estimator", ["pathwise", "hybrid"])
def test_a_reward_without_a_gradient_is_refused_where_one_is_needed(linear_policy, exact_proxy, estimator):
    def flat(rewards):
        return rewards["quality"].detach()

    settings = config(num_updates=1, estimator=estimator)
    with pytest.raises(ConfigError, match="the reward has no gradient at the latents.*ReinforceTrainer"):
        DifferentiableRewardTrainer(linear_policy(), exact_proxy(), PROMPTS, settings, flat).train()
    ReinforceTrainer(linear_policy(), exact_proxy(), PROMPTS, config(num_updates=1), flat).train()
