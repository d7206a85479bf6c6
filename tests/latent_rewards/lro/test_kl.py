from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.kl import AdaptiveBeta, uncertainty_gate
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer
from latent_rewards.proxies import ProxyConfig, train_proxy
from latent_rewards.training.checkpoint import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:no oracle", "ignore:one reward and no holdout")

ALL = [
    (ReinforceTrainer, "reinforce", "score"),
    (ReinforceTrainer, "smoothed", "score"),
    (ReinforceTrainer, "smoothed", "path"),
    (DifferentiableRewardTrainer, "hybrid", "path"),
    (DifferentiableRewardTrainer, "pathwise", "path"),
]
PATHS = [ALL[2], ALL[4]]
SIGMA, HEAD, DIM = 0.6, 0.5, 2
GAIN, SHIFT, FIRST_GAIN, FIRST_SHIFT = 1.2, 0.3, 0.5, -0.2
PROMPTS = ["a", "b", "c"]


def config(**settings) -> LROConfig:
    chosen = {
        "num_updates": 40,
        "learning_rate": 1e-30,
        "prompts_per_update": 32,
        "num_generations": 8,
        "step_counts": [2],
        "head_std": HEAD,
        "num_draws": 2,
        "beta": 1.0,
        "pessimism": 0.0,
        "max_grad_norm": 0.0,
        "device": "cpu",
        "progress": False,
    }
    return LROConfig(**chosen | settings)


def small(**settings) -> LROConfig:
    return config(**{"num_updates": 2, "prompts_per_update": 2, "num_generations": 4, **settings})


def made(case, linear_policy, proxy, settings, **parts):
    """A trainer of one of :data:`ALL` whose policy and reference are chains of known gain and shift."""
    trainer, estimator, chain = case
    settings.estimator, settings.chain = estimator, chain
    reference = linear_policy(dim=DIM, gain=FIRST_GAIN, shift=FIRST_SHIFT, sigma=SIGMA)
    policy = linear_policy(dim=DIM, gain=GAIN, shift=SHIFT, sigma=SIGMA)
    return trainer(policy, proxy, PROMPTS, settings, **{"reference": reference, **parts})


def exact_gradient(num_steps: int, *, per_state: bool) -> Tensor:
    """d E[sum_k KL_k] / d(gain, shift) of one latent dimension; the states are N(m_k, v_k) with x_0 ~ N(0, 1).

    KL_k = ((gain - gain_0) x_k + shift - shift_0)^2 / (2 s_k^2), s_k = SIGMA, HEAD for the last.
    """
    gain, shift = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (GAIN, SHIFT))
    mean, variance, total = torch.zeros(()), torch.ones(()), torch.zeros(())
    for step in range(num_steps):
        if per_state:
            mean, variance = mean.detach(), variance.detach()
        away, constant = gain - FIRST_GAIN, shift - FIRST_SHIFT
        squared = away**2 * (mean**2 + variance) + 2 * away * constant * mean + constant**2
        total = total + squared / (2 * (HEAD if step + 1 == num_steps else SIGMA) ** 2)
        mean, variance = gain * mean + shift, gain**2 * variance + SIGMA**2
    return torch.stack(torch.autograd.grad(total, (gain, shift)))


def test_the_closed_form_of_two_steps():
    away, constant = GAIN - FIRST_GAIN, SHIFT - FIRST_SHIFT
    second_moment = GAIN**2 + SHIFT**2 + SIGMA**2
    per_state = torch.tensor(
        [
            away / SIGMA**2 + (away * second_moment + constant * SHIFT) / HEAD**2,
            constant / SIGMA**2 + (away * SHIFT + constant) / HEAD**2,
        ],
        dtype=torch.float64,
    )
    through_states = torch.tensor([away**2 * GAIN, away * (away * SHIFT + constant)], dtype=torch.float64) / HEAD**2
    torch.testing.assert_close(exact_gradient(2, per_state=True), per_state, rtol=1e-6, atol=0)
    torch.testing.assert_close(exact_gradient(2, per_state=False), per_state + through_states, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize(("kl", "num_steps"), [("per_state", 2), ("return", 2), ("return", 3)])
def test_the_gradient_of_the_kl_is_what_its_name_says(
    linear_policy, exact_proxy, gradient_estimates, assert_mean, case, kl, num_steps
):
    trainer = made(case, linear_policy, exact_proxy(curvature=0.0), config(kl=kl, step_counts=[num_steps]))
    found = gradient_estimates(trainer)
    values = torch.stack([found["gain"], found["shift"].flatten(1).sum(1)], dim=1)
    exact, other = (exact_gradient(num_steps, per_state=kl == form) for form in ("per_state", "return"))
    assert_mean(values, exact)
    assert float((values.mean(0) - other).abs()[0]) > 9 * float(values[:, 0].std()) / len(values) ** 0.5


@pytest.mark.parametrize("case", ALL)
def test_one_step_cannot_tell_the_two_apart(linear_policy, exact_proxy, gradient_estimates, case):
    forms = [
        gradient_estimates(made(case, linear_policy, exact_proxy(), small(kl=kl, step_counts=[1])))["gain"]
        for kl in ("per_state", "return")
    ]
    torch.testing.assert_close(forms[1], forms[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", PATHS)
def test_a_path_of_one_step_leaves_the_states_alone(linear_policy, exact_proxy, gradient_estimates, case):
    forms = [
        gradient_estimates(made(case, linear_policy, exact_proxy(), small(kl=kl, step_counts=[3], last_k=1)))["gain"]
        for kl in ("per_state", "return")
    ]
    torch.testing.assert_close(forms[1], forms[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", ALL)
def test_each_transition_of_the_return_is_evaluated_once(linear_policy, exact_proxy, case):
    trainer = made(case, linear_policy, exact_proxy(), small(kl="return", step_counts=[3]))
    trainer.train()
    assert trainer.policy.calls == 2 * 3
    assert trainer.reference.calls == (2 * 3 if case in PATHS else 0)  # with gradient, to the states


def test_the_kl_of_later_steps_is_not_scaled_like_the_reward(linear_policy, exact_proxy, gradient_estimates):
    def gradient(**settings):
        proxy = exact_proxy(curvature=0.0, slope=settings.pop("slope"))
        return gradient_estimates(made(ALL[3], linear_policy, proxy, small(kl="return", **settings)))["gain"]

    scaled = gradient(slope=2.0, scale_rewards="batch") - gradient(slope=2.0, scale_rewards="batch", beta=1e-12)
    plain = gradient(slope=0.0) - gradient(slope=0.0, beta=1e-12)
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", [ALL[0], ALL[1], ALL[3]])
def test_several_iterations_measure_the_kl_anew(linear_policy, exact_proxy, case):
    settings = small(kl="return", num_iterations=3, learning_rate=0.02, num_updates=15, epsilon=0.1)
    history = made(case, linear_policy, exact_proxy(curvature=0.0), settings).train().history
    assert history[-1]["kl"] < 0.7 * history[0]["kl"]


def test_beta_follows_the_clipped_relative_error():
    price = AdaptiveBeta(0.1, 0.5)
    factors = {0.5: 1.0, 0.55: 1.01, 0.42: 0.984, 0.6: 1.02, 50.0: 1.02, 0.0: 0.98}
    for kl, factor in factors.items():
        before = price.beta
        price.observe(kl)
        assert price.beta == pytest.approx(before * factor, rel=1e-12)


@pytest.mark.parametrize("case", ALL)
def test_the_price_of_an_update_is_that_of_the_updates_before(linear_policy, exact_proxy, case):
    settings = small(num_updates=25, kl_target=1.2, beta=0.5, learning_rate=0.1, num_draws=8)
    history = made(case, linear_policy, exact_proxy(curvature=0.0), settings).train().history
    betas, kls = [entry["beta"] for entry in history], [entry["kl"] for entry in history]
    assert betas[0] == 0.5
    for before, kl, after in zip(betas, kls, betas[1:], strict=False):
        assert after == pytest.approx(before * (1 + 0.1 * min(max(kl / 1.2 - 1, -0.2), 0.2)), rel=1e-12)
    assert min(betas) < max(betas)
    if case == ALL[4]:
        assert all(entry["loss"] == entry["beta"] * entry["kl"] for entry in history)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("kl", ["per_state", "return"])
def test_the_price_multiplies_the_whole_gradient(linear_policy, exact_proxy, gradient_estimates, case, kl):
    fixed, adaptive = (
        gradient_estimates(made(case, linear_policy, exact_proxy(curvature=0.0), small(kl=kl, kl_target=target)))[
            "gain"
        ]
        for target in (None, 1e-3)
    )
    torch.testing.assert_close(adaptive[0], fixed[0], rtol=0, atol=0)
    torch.testing.assert_close(adaptive[1], 1.02 * fixed[1], rtol=1e-12, atol=0)


def test_only_chains_of_the_policys_own_move_the_price(linear_policy, exact_proxy):
    settings = small(num_iterations=2, learning_rate=0.5, kl_target=0.01)
    history = made(ALL[3], linear_policy, exact_proxy(), settings, reference=None).train().history
    assert history[0]["kl"] > 0.1  # of the second iteration, after a long step; the first one's was 0
    assert history[1]["beta"] == pytest.approx(0.98, rel=1e-12)


@pytest.mark.parametrize("case", [ALL[0], ALL[4]])
def test_a_killed_run_resumes_with_the_same_betas_and_reference(linear_policy, exact_proxy, tmp_path, case):
    class Killed(Exception):
        pass

    def run(folder, stop_at=None, **changes):
        def kill(step, logs):
            if step == stop_at:
                raise Killed

        settings = small(
            num_updates=9, learning_rate=0.05, output_dir=str(tmp_path / folder), checkpoint_every=4, kl="return",
            sync_ref_model=True, ref_model_sync_steps=3, **{"kl_target": 0.05, **changes},
        )  # fmt: skip
        trainer = made(case, linear_policy, exact_proxy(), settings, reference=None, callbacks=[kill])
        return trainer.train().history, trainer.policy.state_dict(), trainer.reference.state_dict()

    with pytest.raises(Killed):
        run("killed", stop_at=6)
    continued, whole = run("killed"), run("whole")
    assert json.dumps(continued[0]) == json.dumps(whole[0]) and len({entry["beta"] for entry in whole[0]}) == 9
    for mine, theirs in zip(continued[1:], whole[1:], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(ConfigError, match=r"kl_target=0.05.*0.1"):
        run("whole", kl_target=0.1)
    with pytest.raises(CheckpointError, match=r"stateful.beta.*another output_dir"):
        run("whole", kl_target=None)


def strange(exact_proxy, ood):
    """An exact proxy whose samples have the strangeness ``ood(latents, prompts)``."""

    class Strange(exact_proxy):
        def predict(self, latents: Tensor, prompts: list[str]) -> SimpleNamespace:
            return SimpleNamespace(ood={name: ood(latents, prompts) for name in self.reward_names})

    return Strange(curvature=0.0)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("kl", ["per_state", "return"])
def test_a_gate_of_a_constant_is_that_share_of_the_kl(linear_policy, exact_proxy, gradient_estimates, case, kl):
    def run(gate, share):
        proxy = strange(exact_proxy, lambda latents, prompts: torch.full((len(latents),), share, dtype=torch.float64))
        trainer = made(case, linear_policy, proxy, small(kl=kl, kl_gate=gate))
        return gradient_estimates(trainer)["gain"], trainer.loop.history[0]

    plain, logs = run("none", 1.0)
    quarter, gated = run("uncertain", 0.25)
    torch.testing.assert_close(quarter, 0.25 * plain, rtol=1e-12, atol=0)
    assert float(run("uncertain", 0.0)[0].abs().max()) == 0.0
    assert (gated["kl"], gated["kl_gate"], gated["kl_gated"]) == (logs["kl"], 0.25, pytest.approx(0.25 * logs["kl"]))
    assert "kl_gate" not in logs and "kl_gated" not in logs


@pytest.mark.parametrize("case", ALL)
def test_each_sample_is_held_by_its_own_strangeness(linear_policy, exact_proxy, gradient_estimates, case):
    def ood(latents, prompts):
        return latents.flatten(1).sum(1).sigmoid()

    trainer = made(case, linear_policy, strange(exact_proxy, ood), small(kl_gate="uncertain", step_counts=[1]))
    x = trainer.samples.update_batch(0, 2, 4).noise[0].flatten(1)
    found = gradient_estimates(trainer)
    gate = ood(GAIN * x + SHIFT, [])
    deviation = (GAIN - FIRST_GAIN) * x + SHIFT - FIRST_SHIFT
    expected = (gate[:, None] * deviation * x / HEAD**2).sum(1).mean() / DIM
    torch.testing.assert_close(found["gain"][0], expected, rtol=1e-12, atol=0)
    kl = (gate * (deviation**2).sum(1)).mean() / (2 * HEAD**2 * DIM)
    assert trainer.loop.history[0]["kl_gated"] == pytest.approx(float(kl), rel=1e-12)


def test_the_gated_kl_is_what_the_target_is_compared_with(linear_policy, exact_proxy):
    proxy = strange(exact_proxy, lambda latents, prompts: torch.full((len(latents),), 1e-3))
    history = made(ALL[4], linear_policy, proxy, small(kl_gate="uncertain", kl_target=0.1)).train().history
    assert history[0]["kl"] > 0.12 > 0.08 > history[0]["kl_gated"]
    assert history[1]["beta"] == pytest.approx(0.98, rel=1e-12)


def test_the_gate_is_the_largest_score_in_chunks(exact_proxy):
    seen = []

    def predict(latents, prompts):
        seen.append(list(prompts))
        first = latents.flatten(1)[:, 0]
        return SimpleNamespace(ood={"a": first, "b": 1 - first})

    latents = torch.tensor([0.1, 0.5, 0.8]).view(3, 1, 1, 1, 1)
    gate = uncertainty_gate(SimpleNamespace(predict=predict), latents, PROMPTS, micro_batch=2)
    torch.testing.assert_close(gate, torch.tensor([0.9, 0.5, 0.8]))
    assert seen == [["a", "b"], ["c"]]
    for bad in (1.5, -0.1, float("nan")):
        latents[1] = bad
        with pytest.raises(DataError, match=r"prompt 'b' is .*\[0, 1\]"):
            uncertainty_gate(strange(exact_proxy, lambda x, p: x.flatten(1)[:, 0]), latents, PROMPTS)


def test_a_trained_proxy_holds_what_it_does_not_know(linear_policy):
    latents = torch.randn(96, DIM, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = latents.flatten(1).sum(1)
    proxy = train_proxy(latents, rewards, config=ProxyConfig(trunk="linear", progress=False, device="cpu"))

    def gate(shift):
        settings = small(kl_gate="uncertain", step_counts=[1])
        policy = linear_policy(dim=DIM, gain=1.0, shift=shift)
        trainer = DifferentiableRewardTrainer(policy, proxy, PROMPTS, settings, reference=copy.deepcopy(policy))
        batch = trainer.samples.update_batch(0, 2, 4)
        exact = proxy.predict(batch.noise[0] + shift, batch.prompts).ood["reward"].mean()
        assert trainer.train().history[0]["kl_gate"] == pytest.approx(float(exact), rel=1e-12)
        return float(exact)

    assert 0.2 < gate(0.0) < 0.8 and gate(50.0) > 0.98


def test_a_proxy_without_predict_cannot_gate(linear_policy, exact_proxy):
    with pytest.raises(ConfigError, match=r"ExactProxy has no predict.*RewardProxy, or kl_gate='none'"):
        made(ALL[4], linear_policy, exact_proxy(), small(kl_gate="uncertain"))
