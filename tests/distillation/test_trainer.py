import copy
import math
import subprocess
import sys
import traceback
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode

import distillation
import distillation.sampler as sampler_module
import distillation.trainer as trainer_module
from distillation.config import DistillationConfig
from distillation.errors import DistillationConfigError, MissingPartError, StepCountError
from distillation.monitors import channel_std
from distillation.schedule import RectifiedFlow, VariancePreserving
from distillation.student import FewStepStudent
from distillation.trainer import DistillationStage, DistillationTrainer
from distillation.vsd import backward_simulation
from latent_rewards.training.ranks import Ranks

M, S = 0.3, 0.7
SHAPE = (1, 3, 3, 3)
PROMPTS = ["one", "two"]


@pytest.fixture
def world(affine, learnable_gaussian, numbers):
    """A teacher N(M, S^2) and a student far from it, as (teacher, student)."""

    def build(gain=1.2, shift=-0.3, schedule=None, **options):
        schedule = schedule or RectifiedFlow()
        teacher = SimpleNamespace(
            denoiser=learnable_gaussian(schedule, M, S), encode=lambda prompts: numbers(torch.zeros(len(prompts)))
        )
        return teacher, FewStepStudent(affine(schedule, gain, shift), latent_shape=SHAPE, **options)

    return build


def settings(**changes):
    base = {
        "vsd_steps": 4,
        "cd_steps": 4,
        "batch_size": 4,
        "guidance_scale": 1.0,
        "learning_rate": 0.01,
        "fake_learning_rate": 0.01,
        "fake_updates": 2,
        "num_timesteps": 10,
        "ema_decay": 0.5,
        "progress": False,
        "device": "cpu",
    }
    return DistillationConfig(**(base | changes))


def train(world, config, data=PROMPTS, **options):
    teacher, student = world(**options)
    before = copy.deepcopy(teacher.denoiser.state_dict())
    result = DistillationTrainer(teacher, student, data, config).train()
    assert all(torch.equal(before[name], value) for name, value in teacher.denoiser.state_dict().items())
    return result


def weights(student):
    return torch.stack([parameter.detach() for parameter in student.parameters()])


def test_vsd_brings_a_one_step_student_to_the_data(world):
    config = settings(
        vsd_steps=150, cd_steps=0, step_counts=[1], learning_rate=0.01, fake_learning_rate=0.02, ema_decay=0.95
    )
    student = train(world, config).student
    network = student.denoiser
    assert float((network.gain + network.slope).detach()) == pytest.approx(S, abs=0.05)
    assert float(network.shift.detach()) == pytest.approx(M, abs=0.05)


def test_cd_brings_the_student_to_the_teachers_sampler(world, randn):
    # One interval: f(x, 1) is trained towards the teacher's single step, whose gain is 0 and whose value is M.
    config = settings(vsd_steps=0, cd_steps=150, num_timesteps=1, learning_rate=0.02, huber_c=0.1)
    data = (M + S * randn(6, *SHAPE), PROMPTS * 3)
    result = train(world, config, data, gain=0.5)
    network = result.student.denoiser
    assert float((network.gain + network.slope).detach()) == pytest.approx(0, abs=0.05)
    assert float(network.shift.detach()) == pytest.approx(M, abs=0.05)
    assert result.history["cd"][-1]["cd_loss"] < 0.05 * result.history["cd"][0]["cd_loss"]


@pytest.mark.parametrize("schedule", [RectifiedFlow(shift=3.0), VariancePreserving()])
@pytest.mark.parametrize("name", ["sequential", "joint"])
@pytest.mark.parametrize("with_latents", [True, False])
def test_every_schedule_and_kind_of_data_trains(world, randn, schedule, name, with_latents):
    config = settings(schedule=name, vsd_steps=2, cd_steps=2, temporal_weight=0.5, causal_first_frame=True)
    data = (randn(2, *SHAPE), PROMPTS) if with_latents else PROMPTS
    result = train(world, config, data, schedule=schedule)
    assert list(result.history) == (["joint"] if name == "joint" else ["vsd", "cd"])
    first = next(iter(result.history.values()))[0]
    expected = {"vsd_loss", "fake_loss", "temporal_loss", "grad_norm", "fake_grad_norm", "num_steps", "x_std"}
    assert expected <= set(first)
    assert ("cd_loss" in first) is (name == "joint")
    assert bool(torch.isfinite(weights(result.student)).all())


def test_every_call_the_student_can_make_is_trained_equally_often(world, monkeypatch):
    calls = []

    def record(student, condition, noise, num_steps, exit_step):
        calls.append((num_steps, exit_step))
        return backward_simulation(student, condition, noise, num_steps, exit_step)

    monkeypatch.setattr("distillation.trainer.backward_simulation", record)
    train(world, settings(vsd_steps=350, cd_steps=0, step_counts=[1, 2, 4], batch_size=1))
    possible = [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]
    counts = Counter(calls)
    assert sorted(counts) == possible
    assert chisquare([counts[call] for call in possible]).pvalue > 1e-3  # 700 draws: student and fake score


def test_guidance_reaches_the_student(world, numbers):
    # The teacher's mean is M + 1 for the prompts and M for the empty one: guidance 3 pulls the student's mean to M + 3.
    def run(scale, start=0.0):
        teacher, student = world(gain=S, shift=M + 1)
        teacher.denoiser.reach = 1.0
        teacher.encode = lambda prompts: numbers(torch.tensor([float(bool(text)) for text in prompts]))
        chosen = {"guidance_scale": scale, "guidance_start": start, "ema_decay": 0.0, "learning_rate": 0.02}
        config = settings(vsd_steps=10, cd_steps=0, **chosen)
        return float(DistillationTrainer(teacher, student, PROMPTS, config).train().student.denoiser.shift.detach())

    assert run(3.0) > M + 1.1
    assert run(1.0) < M + 1.05
    assert run(3.0, start=1.0) < M + 1.05, "times end below 1: none is guided"


def test_calls_that_refine_have_a_guidance_of_their_own(world, numbers, monkeypatch):
    seen = {"vsd": [], "cd": []}

    def record(name, function):
        def recorded(*args, **options):
            seen[name].append(options["guidance_scale"] if name == "cd" else args[6])
            return function(*args, **options)

        monkeypatch.setattr(trainer_module, function.__name__, recorded)

    record("vsd", trainer_module.score_difference)
    record("cd", trainer_module.consistency_pair)
    teacher, student = world()
    teacher.encode = lambda prompts: numbers(torch.zeros(len(prompts)))
    config = settings(vsd_steps=40, cd_steps=2, step_counts=[1, 2], guidance_scale=3.0, refine_guidance_scale=1.5)
    history = DistillationTrainer(teacher, student, PROMPTS, config).train().history
    wanted = [1.5 if entry["exit_step"] else 3.0 for entry in history["vsd"]]
    assert seen == {"vsd": wanted, "cd": [1.5, 1.5]}
    assert set(wanted) == {1.5, 3.0}
    for calls in seen.values():
        calls.clear()
    alone = settings(vsd_steps=0, cd_steps=2, cd_guidance_scale=4.0)
    DistillationTrainer(teacher, world()[1], PROMPTS, alone).train()
    assert seen == {"vsd": [], "cd": [4.0, 4.0]}


def test_student_ends_on_the_average_of_its_weights(world):
    def run(decay):
        return weights(train(world, settings(vsd_steps=2, cd_steps=0, ema_decay=decay)).student)

    # The first update is empty: the fake score starts as the teacher, so the two agree. Then the average moves once.
    start, raw = weights(world()[1]), run(0.0)
    assert torch.allclose(run(0.75), 0.75 * start + 0.25 * raw, rtol=0, atol=1e-14)
    assert not torch.equal(raw, start)


def test_cd_has_its_own_learning_rate_and_average(world):
    def run(**changes):
        return weights(train(world, settings(cd_steps=3, **changes)).student)

    alone = run(vsd_steps=0, learning_rate=0.003, ema_decay=0.7)
    assert torch.equal(run(vsd_steps=0, cd_learning_rate=0.003, cd_ema_decay=0.7), alone)
    assert not torch.equal(run(vsd_steps=0), alone)
    slow = run(vsd_steps=2, cd_learning_rate=1e-12)
    only_vsd = weights(train(world, settings(vsd_steps=2, cd_steps=0)).student)
    assert torch.allclose(slow, only_vsd, rtol=0, atol=1e-9)


def test_learning_rate_falls_along_half_a_cosine_in_each_stage(world):
    history = train(world, settings(vsd_steps=4, cd_steps=2, learning_rate=0.01, learning_rate_floor=0.2)).history
    rates = [0.01 * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * k / 4))) for k in range(4)]
    assert [entry["learning_rate"] for entry in history["vsd"]] == pytest.approx(rates, rel=1e-12)
    assert [entry["learning_rate"] for entry in history["cd"]] == pytest.approx([0.01, 0.006], rel=1e-12)
    still = weights(train(world, settings(vsd_steps=3, cd_steps=0, learning_rate=0.0024)).student)
    constant = settings(vsd_steps=3, cd_steps=0, learning_rate=0.0024, learning_rate_floor=1.0)
    assert torch.equal(weights(train(world, constant).student), still)
    falling = settings(vsd_steps=3, cd_steps=0, learning_rate=0.0024, learning_rate_floor=0.0)
    assert not torch.equal(weights(train(world, falling).student), still)


def test_fake_score_sees_the_students_samples_and_then_fresh_ones(world, monkeypatch):
    from distillation import trainer as module

    steered, seen = [], []
    gradient, loss = module.score_difference, module.fake_score_loss
    monkeypatch.setattr(
        module, "score_difference", lambda x, *rest: (steered.append(x.detach()), gradient(x, *rest))[1]
    )
    monkeypatch.setattr(module, "fake_score_loss", lambda x, *rest: (seen.append(x), loss(x, *rest))[1])
    train(world, settings(vsd_steps=2, cd_steps=0, fake_updates=3))
    assert len(steered) == 2
    assert len(seen) == 6
    assert torch.equal(seen[0], steered[0])
    assert torch.equal(seen[3], steered[1])
    assert not any(torch.equal(seen[i], seen[j]) for i in range(6) for j in range(i))
    assert not any(x.requires_grad for x in seen)


def test_cd_target_is_the_average_and_not_the_student(world, monkeypatch):
    from distillation import trainer as module

    distances = []
    pair = module.consistency_pair

    def recorded(student, target, *rest, **options):
        distances.append(float((student.gain - target.gain).detach().abs()))
        return pair(student, target, *rest, **options)

    monkeypatch.setattr(module, "consistency_pair", recorded)
    train(world, settings(vsd_steps=0, cd_steps=3))
    assert distances[0] == 0
    assert all(distance > 0 for distance in distances[1:])


def cd_stage(world, data=PROMPTS, **changes):
    teacher, student = world()
    setup = DistillationTrainer(teacher, student, data, settings(vsd_steps=0, **changes)).setup
    return DistillationStage(setup, "cd", 4, ("cd",))


def test_cd_noises_data_where_there_are_some_or_the_students_own_samples_if_asked(world, randn):
    data = (randn(2, *SHAPE), PROMPTS)
    for options, own in (({"data": data}, False), ({"data": data, "cd_on_samples": True}, True), ({}, True)):
        stage = cd_stage(world, **options, step_counts=[1, 2])
        batch = stage.draw_batch(3, "student")
        given = stage.cd_data(3, batch)
        made = stage.student.sample(batch.condition, stage.draw_stack(3, "data", 2), 2).detach()
        assert torch.equal(given, made if own else batch.latents) and not given.requires_grad


@pytest.mark.parametrize("curriculum", [False, True])
def test_cd_asks_nothing_above_its_times(world, curriculum):
    stage = cd_stage(world, cd_max_time=0.3, num_timesteps=10, curriculum=curriculum, batch_size=50)
    t, s = (torch.cat(ends) for ends in zip(*(stage.interval(step) for step in range(4)), strict=True))
    assert bool((s < t).all()) and float(s.min()) < 0.1
    assert 0.25 < float(t.max()) <= 0.3
    if not curriculum:
        assert sorted({round(time, 12) for time in t.tolist()}) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(("cd_max_time", "num_timesteps", "intervals"), [(0.25, 16, 4), (0.29, 100, 29), (0.28, 10, 2)])
def test_no_interval_of_cd_ends_above_its_times(cd_max_time, num_timesteps, intervals):
    assert settings(cd_max_time=cd_max_time, num_timesteps=num_timesteps).num_cd_intervals == intervals


def test_what_is_kept_is_how_far_the_calls_above_have_moved(world, randn):
    stage = cd_stage(world, **KEEPING, huber_c=0.3)
    assert stage.kept_times.tolist() == [1.0, 1.0, 1.0, 0.75], "the first calls of 1, 2 and 4 steps, and one more"
    logs = {}
    assert float(stage.kept(0, randn(4, *SHAPE), stage.draw_batch(0, "student"), logs)) == 0
    with torch.no_grad():
        stage.student.denoiser.shift += 0.4  # all that the student says, at every call
    kept = stage.kept(0, randn(4, *SHAPE), stage.draw_batch(0, "student"), logs)
    assert float(kept) == pytest.approx(0.5 - 0.3, rel=1e-12)  # sqrt(0.4^2 + 0.3^2) - 0.3
    assert float(logs["keep_loss"]) == float(kept)


def test_calls_that_are_kept_stay_while_cd_trains_the_others(world, randn):
    def run(**changes):
        config = settings(vsd_steps=0, cd_steps=80, num_timesteps=2, huber_c=0.1, cd_max_time=0.5, **changes)
        result = train(world, config, (M + S * randn(6, *SHAPE), PROMPTS * 3))
        return result.student.denoiser, result.history["cd"]

    def at_noise(network):
        return torch.stack([network.gain + network.slope, network.shift]).detach()

    start = torch.tensor([1.2, -0.3], dtype=torch.float64)
    (free, free_history), (kept, history) = run(step_counts=[1]), run(step_counts=[1], cd_keep_weight=3.0)
    assert float((at_noise(free) - start).abs().max()) > 5 * float((at_noise(kept) - start).abs().max())
    for network in (free, kept):
        assert abs(float((network.gain + 0.5 * network.slope).detach()) - 1.2) > 0.05
    assert "keep_loss" not in free_history[0] and history[0]["keep_loss"] == 0


def test_same_seed_gives_the_same_weights_and_another_seed_others(world):
    once, again = (weights(train(world, settings()).student) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, weights(train(world, settings(seed=1)).student))


KEEPING = {"cd_max_time": 0.5, "cd_keep_weight": 2.0}


@pytest.mark.parametrize(
    ("stage", "at", "changes"),
    [("vsd", 3, {}), ("cd", 3, {}), ("cd", 3, KEEPING), ("joint", 2, {"schedule": "joint"})],
)
def test_a_killed_run_continues_to_identical_weights(world, tmp_path, monkeypatch, stage, at, changes):
    from distillation import trainer as module

    config = settings(output_dir=str(tmp_path), checkpoint_every=2, **changes)
    original = module.DistillationStage.step

    def interrupted(self, step):
        if (self.name, step) == (stage, at):
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(module.DistillationStage, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(world, config)
    monkeypatch.setattr(module.DistillationStage, "step", original)
    resumed = train(world, config)
    straight = train(world, settings(**changes))
    assert torch.equal(weights(resumed.student), weights(straight.student))
    assert resumed.history == straight.history
    assert (tmp_path / stage / "history.jsonl").is_file()


def test_a_finished_run_under_other_settings_is_refused_and_leaves_the_student_alone(world, tmp_path):
    train(world, settings(cd_steps=0, output_dir=str(tmp_path)))
    (teacher, student), config = world(), settings(cd_steps=0, output_dir=str(tmp_path), fake_updates=3)
    before = weights(student).clone()
    with pytest.raises(DistillationConfigError, match="fake_updates = 2, this run has 3"):
        DistillationTrainer(teacher, student, PROMPTS, config).train()
    assert torch.equal(weights(student), before)


def test_a_stage_is_not_lengthened_under_one_that_would_refuse(world, tmp_path):
    train(world, settings(output_dir=str(tmp_path)))
    kept = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(DistillationConfigError, match="trained with vsd_steps = 4, this run has 9"):
        train(world, settings(vsd_steps=9, output_dir=str(tmp_path)))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == kept


@pytest.mark.parametrize(
    "changed", ["teacher", "eta", "timesteps", "prompts", "number of prompts", "number of latents"]
)
def test_a_run_does_not_go_on_with_another_chain_or_other_data(world, tmp_path, randn, changed):
    config = settings(cd_steps=0, output_dir=str(tmp_path))
    train(world, config)
    teacher, student = world(
        eta=0.0 if changed == "eta" else 1.0,
        timesteps={1: [1.0], 2: [1.0, 0.4], 4: [1.0, 0.75, 0.5, 0.25]} if changed == "timesteps" else None,
    )
    if changed == "teacher":
        teacher.denoiser = type(teacher.denoiser)(RectifiedFlow(), M + 1, S)
    prompts = {"prompts": ["one", "three"], "number of prompts": [*PROMPTS, "three"]}.get(changed, PROMPTS)
    data = (randn(2, *SHAPE), prompts) if changed == "number of latents" else prompts
    with pytest.raises(DistillationConfigError, match=f"trained with {changed} = "):
        DistillationTrainer(teacher, student, data, config).train()


def test_guidance_ends_where_it_should_within_an_interval_of_cd(world, numbers, monkeypatch):
    seen = []
    original = sampler_module.guided

    def recorded(denoiser, x_t, t, condition, negative, scale):
        seen.append([float(value) for value in torch.as_tensor(scale, dtype=torch.float64).expand(len(x_t))])
        return original(denoiser, x_t, t, condition, negative, scale)

    monkeypatch.setattr(sampler_module, "guided", recorded)
    teacher, student = world()
    teacher.encode = lambda prompts: numbers(torch.zeros(len(prompts)))
    options = {"num_timesteps": 1, "solver_steps": 4, "guidance_scale": 3.0, "guidance_start": 0.5, "batch_size": 1}
    DistillationTrainer(teacher, student, PROMPTS, settings(vsd_steps=0, cd_steps=1, **options)).train()
    assert seen == [[3.0], [3.0], [3.0], [1.0]], "at t = 1, .75, .5 and .25"


def test_mistakes_are_found_before_training(world):
    teacher, student = world(timesteps={1: [1.0]})
    with pytest.raises(StepCountError, match="samples in 1 steps; got 2"):
        DistillationTrainer(teacher, student, PROMPTS, settings())
    with pytest.raises(DistillationConfigError, match="share weights"):
        DistillationTrainer(teacher, FewStepStudent(teacher.denoiser, latent_shape=SHAPE), PROMPTS, settings())
    _, other = world(schedule=RectifiedFlow(shift=3.0))
    with pytest.raises(DistillationConfigError, match="different schedules"):
        DistillationTrainer(teacher, other, PROMPTS, settings())
    with pytest.raises(MissingPartError, match="latent_shape"):
        DistillationTrainer(teacher, FewStepStudent(student.denoiser), PROMPTS, settings(step_counts=[1]))


def test_a_batch_that_the_processes_cannot_share_is_refused_before_a_prompt_is_encoded(world, monkeypatch):
    monkeypatch.setattr("distillation.stage.join_launch", lambda name: (Ranks(0, 3), torch.device("cpu")))
    teacher, student = world()
    teacher.encode = lambda prompts: pytest.fail("the work began")
    with pytest.raises(DistillationConfigError, match="batch_size=4 cannot be shared by 3 ranks; use a multiple"):
        DistillationTrainer(teacher, student, PROMPTS, settings())


def test_a_teacher_that_needs_no_prompts_serves(world):
    assert len(train(world, settings(cd_steps=0), None).history["vsd"]) == 4


def test_public_names_exist_and_the_package_is_cheap_to_import():
    for name in distillation.__all__:
        assert getattr(distillation, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = distillation.nothing
    code = "import sys, distillation; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_datas_spread_is_of_so_many_numbers_that_they_fit_into_memory(world, randn, monkeypatch):
    latents = randn(6, *SHAPE)
    monkeypatch.setattr(trainer_module, "_STD_VALUES", 2 * latents[0].numel() + 1)
    told = []
    monkeypatch.setattr(trainer_module, "channel_std", lambda few: told.append(len(few)) or channel_std(few))
    history = train(world, settings(vsd_steps=1, cd_steps=1), (latents, PROMPTS * 3)).history
    assert told == [2], "once, for VSD alone"
    assert history["vsd"][0]["saturation"] > 0


class Readings(TorchDispatchMode):
    """Notes where Python asks for a number of a floating tensor, or which rows of a tensor are not zero.

    A GPU must have done all it was told before it can answer, and has nothing to do until it is told more.
    """

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        asks_number = operator == torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
        if asks_number or operator == torch.ops.aten.nonzero.default:
            self.lines.append(traceback.format_stack(limit=2)[0])
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("objectives", [("vsd",), ("cd",), ("vsd", "cd")])
def test_nothing_is_read_before_the_backward_passes_of_an_update(
    world, learnable_gaussian, objectives, randn, monkeypatch
):
    changes = {"guidance_scale": 3.0, "temporal_weight": 0.5, "correspondence_weight": 0.5, "fake_updates": 3}
    teacher, _ = world()
    student = FewStepStudent(learnable_gaussian(RectifiedFlow(), 0.1, 0.5), latent_shape=SHAPE)
    setup = DistillationTrainer(teacher, student, (randn(4, *SHAPE), ["a", "b", "c", "d"]), settings(**changes)).setup
    stage = DistillationStage(setup, objectives[0], 4, objectives)
    stage.step(0)
    update, before = stage.loop.update, []

    def noted(*of):
        before.append([*readings.lines])
        norm = update(*of)
        readings.lines.clear()
        return norm

    with Readings() as readings:
        monkeypatch.setattr(stage.loop, "update", noted)
        logs = stage.step(1)
    assert before == [[]] * (4 if "vsd" in objectives else 1)
    assert all(type(value) in (int, float) for value in logs.values())
