from __future__ import annotations

import json
import math
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import latent_rewards as lr
from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.dataset import RewardDataset
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.constraints import Lagrangian, relative_floors
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer
from latent_rewards.rewards import WeightedSum

pytestmark = pytest.mark.filterwarnings("ignore:no oracle", "ignore:one reward and no holdout")

NAN = math.nan
TARGET, NORMAL, FLOOR = (2.0, 1.0), (1.0, 0.5), -1.0
# Maximise -|x - target|^2 / 2 with -normal.x >= floor: x = target - multiplier normal, and normal.x = -floor.
MULTIPLIER = (2.0 * 1.0 + 1.0 * 0.5 - 1.0) / (1.0**2 + 0.5**2)
OPTIMUM = (2.0 - MULTIPLIER, 1.0 - 0.5 * MULTIPLIER)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Plane(nn.Module):
    """A quadratic reward and a linear one, which it sees ``bias`` too high; an update teaches it nothing."""

    reward_names = ("quality", "room")

    def __init__(self, bias: float = 0.0, spread: float = 0.0) -> None:
        super().__init__()
        self.bias, self.spread = bias, spread

    def scores(self, latents: Tensor, prompts: list[str], pessimism: float = 0.0) -> dict[str, Tensor]:
        true = truth(latents, prompts)
        return {"quality": true["quality"], "room": true["room"] + self.bias - pessimism * self.spread}

    def update(self, fresh, *, replay=None, num_updates: int = 0, seed: int = 0) -> None:  # noqa: ANN001
        pass


def truth(latents: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    flat = latents.flatten(1)
    return {
        "quality": -0.5 * (flat - flat.new_tensor(TARGET)).square().sum(1),
        "room": -flat @ flat.new_tensor(NORMAL),
    }


def config(**settings) -> LROConfig:
    chosen = {
        "num_updates": 400, "learning_rate": 0.05, "learning_rate_floor": 0.0, "prompts_per_update": 1,
        "num_generations": 2, "step_counts": [1], "beta": 0.0, "pessimism": 0.0, "max_grad_norm": 0.0,
        "refresh_every": 20, "refresh_queries": 8, "device": "cpu", "progress": False,
    }  # fmt: skip
    return LROConfig(**(chosen | settings))


def point(linear_policy):
    policy = linear_policy(dim=2, gain=0.0)
    policy.gain.requires_grad_(False)
    return policy


def lagrangian(floor: float = FLOOR, **settings) -> Lagrangian:
    return Lagrangian(
        WeightedSum({"quality": 1.0}),
        {"room": floor},
        **{"learning_rate": 0.1, "damping": 2.0, "smoothing": 0.0, **settings},
    )


def test_a_run_ends_at_the_kkt_point(linear_policy):
    policy, reward = point(linear_policy), lagrangian()
    result = DifferentiableRewardTrainer(policy, Plane(), ["a"], config(), reward=reward).train()
    torch.testing.assert_close(policy.shift.detach().flatten(), tensor(*OPTIMUM), rtol=0, atol=2e-3)
    assert reward.multipliers["room"] == pytest.approx(MULTIPLIER, abs=5e-3)
    last = result.history[-1]
    assert last["multiplier/room"] == pytest.approx(MULTIPLIER, abs=5e-3)
    assert last["violation/room"] == pytest.approx(0, abs=2e-3)
    first = result.history[0]  # room 0 at the start: one above the floor
    assert first["multiplier/room"] == 0 and first["violation/room"] == FLOOR


def test_an_estimator_without_gradients_ends_there_too(linear_policy):
    policy, reward, path = point(linear_policy), lagrangian(), []
    settings = config(num_generations=8, head_std=0.3, num_draws=8, learning_rate=0.03)
    watch = lambda step, logs: path.append((*policy.shift.detach().flatten(), logs["multiplier/room"]))  # noqa: E731
    ReinforceTrainer(policy, Plane(), ["a"], settings, reward=reward, callbacks=[watch]).train()
    tail = torch.tensor(path[300:]).mean(0)
    torch.testing.assert_close(tail.double(), tensor(*OPTIMUM, MULTIPLIER), rtol=0, atol=0.05)


def test_a_floor_that_does_not_bind_costs_nothing(linear_policy):
    policy, reward = point(linear_policy), lagrangian(floor=-3.0)
    DifferentiableRewardTrainer(policy, Plane(), ["a"], config(), reward=reward).train()
    torch.testing.assert_close(policy.shift.detach().flatten(), tensor(*TARGET), rtol=0, atol=2e-3)
    assert reward.multipliers == {"room": 0.0}


@pytest.mark.parametrize("acquisition", ["random", "uncertain"])
def test_the_true_mean_is_what_keeps_the_floor(linear_policy, acquisition):
    class Choosy(Plane):
        def acquire(self, latents, count, prompts, **settings):  # noqa: ANN001
            return torch.arange(count)

        def update(self, fresh, *, replay=None, num_updates=0, seed=0, num_random=None):  # noqa: ANN001
            pass

    policy, reward = point(linear_policy), lagrangian()
    settings = config(acquisition=acquisition, pessimism=0.5)
    proxy = Choosy(bias=0.7, spread=0.2)
    result = DifferentiableRewardTrainer(policy, proxy, ["a"], settings, reward=reward, oracle=truth).train()
    torch.testing.assert_close(policy.shift.detach().flatten(), tensor(*OPTIMUM), rtol=0, atol=3e-3)
    assert [entry["violation/room"] for entry in result.history[19:21]] == pytest.approx(
        [FLOOR - result.history[19]["rewards/room/mean"], FLOOR - result.history[20]["rewards/room/mean"] + 0.6]
    )


def test_what_a_proxy_learnt_by_heart_corrects_nothing(linear_policy):
    class Memorising(Plane):
        """Right about the samples it was updated on, and about no others."""

        def __init__(self) -> None:
            super().__init__(bias=0.7)
            self.known: list[Tensor] = []

        def scores(self, latents: Tensor, prompts: list[str], pessimism: float = 0.0) -> dict[str, Tensor]:
            scores = super().scores(latents, prompts, pessimism)
            known = any(torch.equal(latents[0], sample) for sample in self.known)
            return {**scores, "room": scores["room"] - (self.bias if known else 0.0)}

        def update(self, fresh, **settings) -> None:  # noqa: ANN001
            self.known.append(fresh.latents()[0])

    policy, reward = point(linear_policy), lagrangian()
    DifferentiableRewardTrainer(policy, Memorising(), ["a"], config(), reward=reward, oracle=truth).train()
    # One update in twenty sees a sample known by heart, whose score is then corrected too much.
    room = float(truth(policy.shift.detach().reshape(1, -1), ["a"])["room"])
    assert room == pytest.approx(FLOOR + 0.7 / 20, abs=0.02)


def test_a_holdout_brings_back_the_best_policy_that_keeps_the_floor(linear_policy):
    def run(reward):
        policy = point(linear_policy)
        settings = config(num_updates=60, holdout_every=5, holdout_samples=4, patience=None)
        parts = {"reward": reward, "oracle": truth, "holdout": truth}
        result = DifferentiableRewardTrainer(policy, Plane(), ["a"], settings, **parts).train()
        return truth(policy.shift.detach().reshape(1, -1), ["a"])["room"].item(), result

    room, result = run(lagrangian(learning_rate=1e-9, damping=0.0))  # a price that comes far too late
    values = {entry["step"]: entry["values"] for entry in result.holdout_curve}
    kept = {step: told["quality"] for step, told in values.items() if told["room"] >= FLOOR}
    assert result.best_step == max(kept, key=kept.get) and 0 < result.best_step < 60
    assert room == pytest.approx(values[result.best_step]["room"]) and room >= FLOOR > values[60]["room"]
    room, _ = run(WeightedSum({"quality": 1.0}))
    assert room < FLOOR


def test_one_update_has_exact_values():
    reward = lagrangian(floor=0.5, learning_rate=0.5, damping=2.0)
    assert reward.after_update({"room": 0.1, "quality": 9.0}) == {"multiplier/room": 0.0, "violation/room": 0.4}
    assert reward.multipliers["room"] == pytest.approx(0.2 + 0.8, abs=1e-15)
    rewards = {"quality": tensor(1, 1, 1), "room": tensor(0.5, 0.75, NAN)}
    torch.testing.assert_close(reward(rewards), tensor(1, 1.25, 1.125), rtol=1e-12, atol=0)
    reward.after_refresh({"room": 0.1}, {"room": 0.3})
    assert reward.after_update({"room": 0.4})["violation/room"] == pytest.approx(-0.1, abs=1e-15)
    assert reward.multipliers["room"] == 0.0  # 0.2 - 0.05 - 0.2, but never below 0
    reward.after_refresh({"room": 0.1}, {"room": NAN})
    kept = reward.state_dict()
    assert kept["corrections"]["room"] == pytest.approx(0.2, abs=1e-15)
    assert math.isnan(reward.after_update({"room": NAN})["violation/room"]) and reward.state_dict() == kept
    bounded = lagrangian(floor=0.5, learning_rate=10.0, maximum=1.5)
    bounded.after_update({"room": 0.0})
    assert bounded.multipliers["room"] == 1.5
    early = lagrangian(floor=0.5, initial=1.0, learning_rate=0.5, damping=2.0)
    torch.testing.assert_close(early(rewards), tensor(1, 1.25, 1.125), rtol=1e-12, atol=0)
    assert early.after_update({"room": 0.9}) == {"multiplier/room": 1.0, "violation/room": -0.4}
    assert early.multipliers["room"] == pytest.approx(1.0 - 0.2 - 0.8, abs=1e-15)
    assert lagrangian(initial=2.0, maximum=1.5).multipliers["room"] == 1.5
    assert reward.weights == {"room": 0.0, "quality": 1.0}
    scaled = lagrangian(floor=5.0, learning_rate=0.5, damping=2.0, units={"room": 10.0})  # the first case times 10
    assert scaled.after_update({"room": 1.0}) == {"multiplier/room": 0.0, "violation/room": 4.0}
    assert scaled.multipliers["room"] == pytest.approx(1.0, abs=1e-15)
    total = scaled({"quality": tensor(1, 1, 1), "room": tensor(5, 7.5, NAN)})
    torch.testing.assert_close(total, tensor(1, 1.25, 1.125), rtol=1e-12, atol=0)
    with pytest.raises(DataError, match="'room'"):
        reward.after_update({"quality": 1.0})


class Uneven(Plane):
    """Prompts differ far more in room than any policy can change."""

    def scores(self, latents: Tensor, prompts: list[str], pessimism: float = 0.0) -> dict[str, Tensor]:
        scores = super().scores(latents, prompts, pessimism)
        return {**scores, "room": scores["room"] + tensor(*(5.0 if prompt == "wide" else -5.0 for prompt in prompts))}


def test_baselines_take_out_what_the_prompts_make_of_a_mean(linear_policy):
    def run(**settings):
        policy, reward = point(linear_policy), lagrangian(**settings)
        trainer = DifferentiableRewardTrainer(policy, Uneven(), ["wide", "narrow"], config(), reward=reward)
        history = trainer.train().history
        return policy.shift.detach().flatten(), reward.multipliers["room"], history

    # One prompt an update; over both prompts the starting policy's mean is 0.
    shift, multiplier, history = run(baselines={"room": 0.0})
    torch.testing.assert_close(shift, tensor(*OPTIMUM), rtol=0, atol=2e-3)
    assert multiplier == pytest.approx(MULTIPLIER, abs=5e-3)
    assert {entry["reference/room/mean"] for entry in history} == {5.0, -5.0}
    assert max(abs(entry["violation/room"]) for entry in history[-20:]) < 2e-3
    told = history[0]
    assert told["policy/room/mean"] == told["rewards/room/mean"]
    shift, _, history = run()
    assert max(abs(entry["violation/room"]) for entry in history[-20:]) > 4


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_reference_that_is_there_to_compare_with_is_charged_by_beta_alone(linear_policy, beta):
    reward = lagrangian(baselines={"room": 0.0})
    trainer = DifferentiableRewardTrainer(point(linear_policy), Plane(), ["a"], config(beta=beta), reward=reward)
    assert trainer.reference is not None
    assert (trainer.penalty is not None) is (beta > 0)


@pytest.mark.parametrize("wrong", [{"bias": 0.7}, {"spread": 0.7}])
def test_what_a_proxy_is_wrong_by_everywhere_moves_no_floor(linear_policy, wrong):
    start = torch.zeros(16, 2, 1, 1, 1, dtype=torch.float64)
    known = RewardDataset.from_tensors(start, ["a"] * 16, truth(start, ["a"] * 16))
    policy, reward = point(linear_policy), lagrangian(baselines={"room": 0.0})
    parts = {"reward": reward, "oracle": truth, "dataset": known}
    settings = config(pessimism=1.0)
    DifferentiableRewardTrainer(policy, Plane(**wrong), ["a"], settings, **parts).train()
    torch.testing.assert_close(policy.shift.detach().flatten(), tensor(*OPTIMUM), rtol=0, atol=3e-3)


def test_an_untouched_policy_keeps_its_floor_whatever_the_estimator_adds(linear_policy):
    class Bent(Plane):
        def scores(self, latents: Tensor, prompts: list[str], pessimism: float = 0.0) -> dict[str, Tensor]:
            scores = super().scores(latents, prompts, pessimism)
            return {**scores, "room": -latents.flatten(1).square().sum(1)}

    reward = lagrangian(floor=0.0, baselines={"room": 0.0})
    settings = config(num_updates=1, head_std=0.3, num_draws=8)
    result = ReinforceTrainer(point(linear_policy), Bent(), ["a"], settings, reward=reward).train()
    assert result.history[0]["rewards/room/mean"] < -0.05
    assert result.history[0]["violation/room"] == 0.0


def test_baselines_have_exact_values_and_need_a_reference(linear_policy):
    reward = lagrangian(floor=0.5, baselines={"room": 0.9})
    assert reward.after_update({"room": 0.4}, {"room": 0.6})["violation/room"] == pytest.approx(-0.2, abs=1e-15)
    reward.after_refresh({"room": 0.1}, {"room": 0.3})
    assert reward.after_update({"room": 0.4}, {"room": 0.6})["violation/room"] == pytest.approx(-0.4, abs=1e-15)
    reward.after_refresh({"room": 0.1}, {"room": 0.3}, {"room": 0.15})
    assert reward.after_update({"room": 0.4}, {"room": 0.6})["violation/room"] == pytest.approx(-0.25, abs=1e-15)
    kept = reward.state_dict()
    assert math.isnan(reward.after_update({"room": 0.4}, {"room": NAN})["violation/room"])
    assert reward.state_dict() == kept
    with pytest.raises(DataError, match="needs the means of the reference's samples"):
        reward.after_update({"room": 0.4})
    with pytest.raises(DataError, match="'room'"):
        reward.after_update({"room": 0.4}, {"rom": 0.6})
    with pytest.raises(ConfigError, match="baselines are of rom, floors of room"):
        lagrangian(baselines={"rom": 0.0})
    with pytest.raises(ConfigError, match="baseline of 'room' must be finite"):
        lagrangian(baselines={"room": NAN})
    settings = config(beta=0.1, sync_ref_model=True)
    with pytest.raises(ConfigError, match="sync_ref_model moves the reference"):
        DifferentiableRewardTrainer(point(linear_policy), Plane(), ["a"], settings, reward=reward)


def test_the_mean_is_a_moving_average_of_what_is_thought_true():
    reward = lagrangian(floor=0.5, learning_rate=0.5, smoothing=0.75)
    assert reward.after_update({"room": 0.1})["violation/room"] == pytest.approx(0.4, abs=1e-15)
    reward.after_refresh({"room": 0.1}, {"room": 0.3})
    # 3/4 of 0.1 and 1/4 of 0.4, and 0.2
    assert reward.after_update({"room": 0.4})["violation/room"] == pytest.approx(0.5 - 0.375, abs=1e-15)
    reward.after_refresh({"room": 0.1}, {"room": 0.5})
    assert reward.state_dict()["corrections"]["room"] == pytest.approx(0.75 * 0.2 + 0.25 * 0.4, abs=1e-15)
    kept = reward.state_dict()
    assert math.isnan(reward.after_update({"room": NAN})["violation/room"]) and reward.state_dict() == kept
    noisy = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward = lagrangian(floor=0.0, smoothing=0.9)
    told = torch.tensor([reward.after_update({"room": float(mean)})["violation/room"] for mean in noisy])
    assert float(told[100:].std()) == pytest.approx((0.1 / 1.9) ** 0.5, rel=0.1)


def test_an_interrupted_run_continues_to_the_same_bits(linear_policy, tmp_path):
    def run(folder, num_updates, floor=FLOOR, policy=None):
        settings = config(
            num_updates=num_updates, output_dir=str(tmp_path / folder), learning_rate_floor=1.0, refresh_every=3
        )
        policy, reward = policy or point(linear_policy), lagrangian(floor, smoothing=0.5)
        result = DifferentiableRewardTrainer(policy, Plane(0.3), ["a"], settings, reward=reward, oracle=truth).train()
        return policy.shift.tolist(), reward.state_dict(), json.dumps(result.__dict__)

    run("parts", 41)
    parts, whole = run("parts", 60), run("whole", 60)
    assert parts == whole and whole[1]["multipliers"]["room"] > 0
    policy = point(linear_policy)
    before = policy.shift.tolist()
    with pytest.raises(ConfigError, match=r"floors=\{'room': -1.0\} of its constraint, this one has \{'room': 0.0\}"):
        run("whole", 60, floor=0.0, policy=policy)
    assert policy.shift.tolist() == before != whole[0]


def test_floors_relative_to_the_start():
    latents = torch.zeros(3, 1, 1, 1, 1)
    rewards = {"motion": tensor(1, NAN, 3), "smoothness": tensor(-1, -2, -3), "never": tensor(NAN, NAN, NAN)}
    dataset = RewardDataset.from_tensors(latents, ["a"] * 3, rewards)
    floors = lr.relative_floors(dataset, {"motion": 0.98, "smoothness": 0.98})
    assert floors == pytest.approx({"motion": 1.96, "smoothness": -2.04}, abs=1e-12)
    with pytest.raises(DataError, match=r"'motoin'.*'motion'"):
        relative_floors(dataset, {"motoin": 0.98})
    with pytest.raises(DataError, match="'never' applies to no sample"):
        relative_floors(dataset, {"never": 0.98})
    with pytest.raises(ConfigError, match="share of 'motion' must be finite"):
        relative_floors(dataset, {"motion": NAN})


def test_mistakes_are_named():
    for settings, message in (
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"initial": -1.0}, "initial must be finite"),
        ({"damping": -1.0}, "damping must be"),
        ({"maximum": 0.0}, "maximum must be positive"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\)"),
        ({"floor": NAN}, "floor of 'room' must be finite"),
        ({"units": {"room": 0.0}}, "unit of 'room' must be positive"),
        ({"units": {"rom": 1.0}}, "units: unknown floor 'rom'.*'room'"),
    ):
        with pytest.raises(ConfigError, match=message):
            lagrangian(**settings)
    with pytest.raises(ConfigError, match="floors are empty"):
        Lagrangian(WeightedSum({"quality": 1.0}), {})
    with pytest.raises(DataError, match="'room'"):
        lagrangian()({"quality": tensor(1)})


SCRIPT = """
import json, os, sys, warnings
from pathlib import Path
from runpy import run_path
from latent_rewards.training.ranks import current_ranks

def tuned(toys, here):
    warnings.simplefilter("ignore")
    policy = toys["LinearPolicy"](dim=2, gain=0.5)
    reward = here["lagrangian"](0.5, learning_rate=1.0, baselines={"room": 0.2})
    settings = here["config"](num_updates=6, prompts_per_update=4, step_counts=[2], refresh_every=2)
    trainer = here["DifferentiableRewardTrainer"]
    trainer(policy, here["Plane"](0.3), ["a", "b"], settings, reward=reward, oracle=here["truth"]).train()
    return {"policy": policy.shift.flatten().tolist(), "reward": reward.state_dict()}

if __name__ == "__main__":
    Path(sys.argv[3], f"rank{os.environ['RANK']}.json").write_text(
        json.dumps(tuned(run_path(sys.argv[1]), run_path(sys.argv[2])))
    )
    current_ranks().leave()
"""


def test_all_ranks_have_the_multipliers_of_one_process(launch, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    toys = Path(__file__).with_name("conftest.py")
    done = launch(tmp_path / "script.py", toys, Path(__file__), tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    with warnings.catch_warnings():
        alone = runpy.run_path(str(tmp_path / "script.py"))["tuned"](runpy.run_path(str(toys)), globals())
    assert first["policy"] == pytest.approx(alone["policy"], rel=1e-9)
    for kind in ("multipliers", "corrections"):
        assert first["reward"][kind] == pytest.approx(alone["reward"][kind], rel=1e-9)
    assert alone["reward"]["multipliers"]["room"] > 0
