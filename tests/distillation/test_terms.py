import math
from types import SimpleNamespace

import pytest
import torch

import distillation as ds
from distillation.adversarial import approximate_r1
from distillation.condition import TextCondition
from distillation.config import DistillationConfig
from distillation.correspondence import correspondence_loss
from distillation.errors import DistillationConfigError
from distillation.features import BlockFeatures
from distillation.temporal import feature_similarity_loss, temporal_consistency_loss, temporal_vsd_loss
from distillation.terms import Discriminator, TemporalTerms
from distillation.trainer import start_student
from distillation.vsd import trainable
from latent_rewards.training.devices import DeviceError
from latent_rewards.training.loop import read_logs

SHAPE = (4, 3, 4, 4)
WAN_SHAPE = (4, 2, 4, 4)


def settings(**changes):
    base = {
        "vsd_steps": 2,
        "cd_steps": 2,
        "batch_size": 2,
        "step_counts": [1, 2],
        "guidance_scale": 1.0,
        "learning_rate": 0.01,
        "fake_learning_rate": 0.01,
        "fake_updates": 1,
        "num_timesteps": 4,
        "progress": False,
        "device": "cpu",
    }
    return DistillationConfig(**(base | changes))


@pytest.fixture
def condition(randn):
    return TextCondition(randn(2, 3, 8, seed=9))


@pytest.mark.parametrize("masked", [False, True])
def test_temporal_terms_are_weighted_sums_and_are_logged_unweighted(tiny_wan, randn, condition, masked):
    teacher = tiny_wan().requires_grad_(False)
    weights = {"temporal_weight": 0.5, "feature_weight": 2.0, "correspondence_weight": 3.0}
    terms = TemporalTerms(settings(**weights, causal_first_frame=masked), teacher)
    x, gradient, difference = randn(2, *SHAPE), randn(2, *SHAPE, seed=1), randn(2, *SHAPE, seed=2)
    block = BlockFeatures(teacher, 1)

    def features(latents):
        return block(latents, torch.full((2,), 0.02, dtype=torch.float64), condition)

    logs = {}
    total = terms.of_vsd(x, gradient, difference, condition, logs)
    parts = {
        "temporal_loss": temporal_vsd_loss(x, gradient, mask_first=masked),
        "feature_loss": feature_similarity_loss(x, x - difference, features, mask_first=masked),
        "correspondence_loss": correspondence_loss(x, x - difference, mask_first=masked),
    }
    assert read_logs(logs) == {name: pytest.approx(float(value), rel=1e-10) for name, value in parts.items()}
    assert float(total) == pytest.approx(
        sum(w * v for w, v in zip((0.5, 2.0, 3.0), read_logs(logs).values(), strict=True))
    )
    before = read_logs(logs)
    terms.of_cd(x, gradient, condition, logs)
    added = temporal_consistency_loss(x, gradient, mask_first=masked)
    assert float(logs["temporal_loss"]) == pytest.approx(before["temporal_loss"] + float(added), rel=1e-10)
    assert all(logs[name] > before[name] for name in logs)


def test_terms_of_weight_zero_are_not_computed(randn):
    logs = {}
    total = TemporalTerms(settings(), torch.nn.Identity()).of_cd(randn(2, *SHAPE), randn(2, *SHAPE), None, logs)
    assert float(total) == 0 and logs == {}


def test_a_target_that_moves_like_the_prediction_costs_nothing(tiny_wan, randn, condition):
    terms = TemporalTerms(settings(feature_weight=1.0, correspondence_weight=1.0, temporal_weight=1.0), tiny_wan())
    x = randn(2, *SHAPE)
    assert float(terms.of_cd(x, x.clone(), condition, {}).detach()) == 0
    still = x[:, :, :1].expand(-1, -1, 3, -1, -1)
    logs = {}
    terms.of_cd(still, x, condition, logs)
    assert min(logs.values()) > 0


@pytest.fixture
def discriminator(tiny_wan):
    return Discriminator(tiny_wan().requires_grad_(True), -1, seed=0)


def test_the_first_verdict_is_that_it_cannot_tell(randn, condition, discriminator):
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    real, fake = randn(2, *WAN_SHAPE), randn(2, *WAN_SHAPE, seed=1).requires_grad_(True)
    loss = discriminator.loss(real, fake, condition, t, randn(2, *WAN_SHAPE, seed=2), randn(2, *WAN_SHAPE, seed=3))
    assert float(loss) == pytest.approx(2 * math.log(2), rel=1e-12)
    assert float(discriminator.students_loss(fake, condition, t, torch.zeros_like(fake))) == pytest.approx(math.log(2))
    loss.backward()
    assert fake.grad is None
    assert discriminator.head.judge.weight.grad is not None


def test_what_it_learns_pushes_samples_towards_data(randn, condition, discriminator):
    t = torch.tensor([0.2, 0.4], dtype=torch.float64)
    real, fake = 1 + 0.1 * randn(2, *WAN_SHAPE), (-1 + 0.1 * randn(2, *WAN_SHAPE, seed=1)).requires_grad_(True)
    parameters = [*discriminator.fake_score.parameters(), *discriminator.head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for update in range(30):
        noise = [randn(2, *WAN_SHAPE, seed=10 + 2 * update + k) for k in range(2)]
        loss = discriminator.loss(real, fake, condition, t, *noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.5
    discriminator.students_loss(fake, condition, t, randn(2, *WAN_SHAPE, seed=99)).backward()
    assert float(fake.grad.sum()) < 0, "downhill is up, where the data are"


def test_the_penalty_is_the_squared_gradient_at_what_is_read_of_the_data(randn, condition, tiny_wan):
    judge, t = Discriminator(tiny_wan(), -1, seed=0, r1_weight=3.0, r1_sigma=0.1), torch.tensor([0.3, 0.8]).double()
    gradient, eps = randn(1, *WAN_SHAPE, seed=4), randn(2, *WAN_SHAPE, seed=5)
    judge.features, judge.head = lambda x_t, t, condition: x_t, lambda x_t: (gradient * x_t).sum(dim=(1, 2, 3, 4))
    given = [randn(2, *WAN_SHAPE), randn(2, *WAN_SHAPE, seed=1), condition, t]
    given += [randn(2, *WAN_SHAPE, seed=2), randn(2, *WAN_SHAPE, seed=3)]
    penalty = float(judge.loss(*given, eps) - judge.loss(*given))
    slopes = (gradient * eps).sum(dim=(1, 2, 3, 4))
    assert penalty == pytest.approx(3.0 * float(slopes.square().mean()), rel=1e-9), "whatever t is"


def test_the_penalty_is_a_setting(world, monkeypatch):
    judging, stds = Discriminator.__init__, []

    def opinionated(self, *args, **options):
        judging(self, *args, **options)
        torch.nn.init.constant_(self.head.judge.weight, 0.1)  # at 0 it has no gradient

    def recorded(logits, perturbed, std):
        stds.append(std)
        return approximate_r1(logits, perturbed, std)

    monkeypatch.setattr(Discriminator, "__init__", opinionated)
    monkeypatch.setattr("distillation.terms.approximate_r1", recorded)

    def first_loss(**changes):
        teacher, data = world()
        config = settings(vsd_steps=1, cd_steps=0, adversarial_weight=0.1, **changes)
        history = ds.DistillationTrainer(teacher, start_student(teacher, config), data, config).train().history
        return history["vsd"][0]["discriminator_loss"]

    none = first_loss()
    assert not stds
    once, twice = (first_loss(r1_weight=weight, r1_sigma=0.2) - none for weight in (1.0, 2.0))
    assert once > 0 and twice == pytest.approx(2 * once, rel=1e-9) and stds == [0.2, 0.2]


def test_heads_of_one_seed_are_equal_and_leave_the_global_generator_alone(tiny_wan):
    denoiser, state = tiny_wan(), torch.random.get_rng_state()
    one, same, other = (Discriminator(denoiser, 0, seed=seed).head.project[1].weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.fixture
def world(tiny_wan, randn):
    def build():
        def encode(prompts):
            return TextCondition(torch.stack([randn(3, 8, seed=len(text)) for text in prompts]))

        teacher = SimpleNamespace(denoiser=tiny_wan(), encode=encode, latent_shape=WAN_SHAPE)
        return teacher, (randn(4, *WAN_SHAPE, seed=5), ["a", "bb"] * 2)

    return build


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_students_adversarial_loss_leaves_no_gradient_in_the_fake_score(world, monkeypatch, rank, checkpointed):
    judging, trained = Discriminator.__init__, []

    def opinionated(self, *args, **options):
        judging(self, *args, **options)
        torch.nn.init.constant_(self.head.judge.weight, 0.1)  # at 0 no gradient would go through the head

    monkeypatch.setattr(Discriminator, "__init__", opinionated)
    monkeypatch.setattr(ds.trainer, "trainable", lambda module: trained.append(module) or trainable(module))

    def fake_score_after(**changes):
        teacher, data = world()
        config = settings(vsd_steps=1, cd_steps=0, adapter_rank=rank, gradient_checkpointing=checkpointed, **changes)
        trained.clear()
        history = ds.DistillationTrainer(teacher, start_student(teacher, config), data, config).train().history
        return torch.cat([parameter.detach().flatten() for parameter in trained[0].parameters()]), history["vsd"][0]

    plain, alone = fake_score_after()
    with_head, entry = fake_score_after(adversarial_weight=5.0, discriminator_weight=0.0)
    torch.testing.assert_close(with_head, plain, rtol=1e-6, atol=1e-9)
    assert entry["adversarial_loss"] > 0 and "adversarial_loss" not in alone
    taught, entry = fake_score_after(adversarial_weight=5.0, discriminator_weight=1.0)
    assert entry["discriminator_loss"] > 0
    assert float((taught - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("rank", [None, 3])
def test_everything_together_trains_and_continues_to_identical_weights(world, tmp_path, rank):
    everything = {
        "temporal_weight": 0.1,
        "feature_weight": 0.1,
        "correspondence_weight": 0.1,
        "adversarial_weight": 0.1,
        "discriminator_weight": 0.1,
        "curriculum": True,
        "schedule": "joint",
        "vsd_steps": 4,
        "log_every": 2,
        "checkpoint_every": 2,
        "adapter_rank": rank,
    }

    def run(stop=None, **changes):
        teacher, data = world()
        config = settings(**{**everything, **changes})
        student = start_student(teacher, config)
        if stop is not None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ds.trainer.DistillationStage, "loss", _stopping(stop))
                with pytest.raises(KeyboardInterrupt):
                    ds.DistillationTrainer(teacher, student, data, config).train()
            return None, None
        history = ds.DistillationTrainer(teacher, student, data, config).train().history["joint"]
        return torch.cat([p.detach().flatten() for p in student.parameters()]), history

    straight, history = run()
    run(stop=3, output_dir=str(tmp_path))
    resumed, again = run(output_dir=str(tmp_path))
    assert torch.equal(straight, resumed) and history == again
    logged = {"temporal_loss", "feature_loss", "correspondence_loss", "adversarial_loss", "discriminator_loss"}
    assert logged | {"saturation", "vsd_loss", "cd_loss"} <= set(history[0])
    assert ["fake_score_lag" in entry for entry in history] == [True, False, True, False]
    with pytest.raises(DistillationConfigError, match="vsd_steps = 4, this run has 5"):
        run(output_dir=str(tmp_path), vsd_steps=5)


def _stopping(at):
    original = ds.trainer.DistillationStage.loss

    def loss(self, step, batch, logs):
        if step == at:
            raise KeyboardInterrupt
        return original(self, step, batch, logs)

    return loss


def test_the_curriculums_gap_shrinks_and_the_grids_does_not(world):
    def gaps(curriculum):
        seen = []
        original = ds.trainer.consistency_pair

        def recorded(student, target, teacher, x0, condition, noise, t, s, **options):
            seen.append(((t - s) / t).mean())
            return original(student, target, teacher, x0, condition, noise, t, s, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ds.trainer, "consistency_pair", recorded)
            teacher, data = world()
            config = settings(vsd_steps=0, cd_steps=8, curriculum=curriculum, num_timesteps=1)
            ds.DistillationTrainer(teacher, start_student(teacher, config), data, config).train()
        return [float(gap) for gap in seen]

    assert gaps(False) == [1.0] * 8
    shrinking = gaps(True)
    assert shrinking[0] == 1.0 and shrinking[-1] < 0.1
    assert all(later <= earlier for earlier, later in zip(shrinking, shrinking[1:], strict=False))


def test_mistakes_are_found_before_training(world):
    teacher, data = world()
    own = start_student(teacher, settings())
    with pytest.raises(DistillationConfigError, match="needs data to tell samples from"):
        ds.DistillationTrainer(teacher, own, data[1], settings(adversarial_weight=1.0))
    with pytest.raises(DeviceError, match="cuda:99"):
        ds.DistillationTrainer(teacher, own, data, settings(device="cuda:99"))
    with pytest.raises(DistillationConfigError, match="block must lie in 0..1"):
        ds.DistillationTrainer(teacher, own, data, settings(feature_weight=1.0, feature_block=7)).train()
    for name in ("feature_weight", "correspondence_weight", "adversarial_weight", "discriminator_weight"):
        with pytest.raises(DistillationConfigError, match=f"{name} must be at least 0; got -1"):
            settings(**{name: -1.0})


def test_vsd_hands_over_its_direction_and_its_difference(world, monkeypatch):
    seen, difference = [], []
    of_vsd, score_difference = TemporalTerms.of_vsd, ds.trainer.score_difference

    def recorded(self, *args):
        seen.append(args[1:3])
        return of_vsd(self, *args)

    def known(*args):
        difference.append(score_difference(*args))
        return difference[-1]

    monkeypatch.setattr(TemporalTerms, "of_vsd", recorded)
    monkeypatch.setattr(ds.trainer, "score_difference", known)
    teacher, data = world()
    config = settings(cd_steps=0)
    ds.DistillationTrainer(teacher, start_student(teacher, config), data, config).train()
    for (direction, moved), (wanted, distance) in zip(seen, difference, strict=True):
        assert torch.equal(moved, wanted)
        torch.testing.assert_close(direction, wanted / (distance + 1e-6), rtol=1e-12, atol=0)
    assert float(seen[-1][1].abs().max()) > 0


def test_a_channel_of_the_data_that_never_varies_stops_no_training(world):
    def saturations(constant):
        teacher, (latents, prompts) = world()
        latents = latents.clone()
        latents[:, constant] = 1.0
        config = settings(cd_steps=0)
        trainer = ds.DistillationTrainer(teacher, start_student(teacher, config), (latents, prompts), config)
        return [entry.get("saturation") for entry in trainer.train().history["vsd"]]

    assert all(value > 0 for value in saturations([1]))
    assert saturations([0, 1, 2, 3]) == [None, None]
