import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from latent_rewards.training import loop as module_of_loops
from latent_rewards.training.checkpoint import CheckpointError, latest_checkpoint
from latent_rewards.training.devices import DeviceError
from latent_rewards.training.folder_lock import FolderLockedError
from latent_rewards.training.loop import (
    Ema,
    LoopConfig,
    NonFiniteError,
    StopTraining,
    TrainingLoop,
    read_logs,
    set_learning_rate,
    warmup_cosine,
)
from latent_rewards.training.randomness import sample_noise
from latent_rewards.training.ranks import Ranks


def build(output_dir=None, num_steps=7, **settings):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    ema = Ema(module, 0.5)
    settings = {"checkpoint_every": 2, "device": "cpu", "progress": False, **settings}
    config = LoopConfig(num_steps, output_dir=output_dir, **settings)
    loop = TrainingLoop(config, name="t", modules={"m": module}, optimizers={"m": optimizer}, stateful={"ema": ema})
    return loop, module, ema


def train(loop, module, ema, fail_at=None):
    def step(index):
        if index == fail_at:
            raise KeyboardInterrupt
        loss = (module(sample_noise(0, "x", index, range(4), (3,))) - 1).square().mean()
        loop.update("m", loss)
        ema.update()
        return {"loss": float(loss.detach())}

    return loop.run(step)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    loop, module, ema = build()
    history = train(loop, module, ema)
    first = build(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        train(*first, fail_at=5)
    again_loop, again_module, again_ema = build(str(tmp_path))
    assert train(again_loop, again_module, again_ema) == history
    assert torch.equal(module.weight, again_module.weight)
    assert torch.equal(ema.module.weight, again_ema.module.weight)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize("left", [None, '{"step": 0, "lo'])
def test_a_history_that_is_missing_or_cut_off_is_written_again(tmp_path, left):
    history = train(*build(str(tmp_path)))
    file = tmp_path / "history.jsonl"
    whole = file.read_text()
    file.unlink() if left is None else file.write_text(left)
    assert train(*build(str(tmp_path))) == history
    assert file.read_text() == whole


def test_a_finished_run_does_nothing_more(tmp_path):
    loop, module, ema = build(str(tmp_path))
    train(loop, module, ema)
    weight = module.weight.clone()
    again = build(str(tmp_path))
    train(*again, fail_at=0)
    assert torch.equal(again[1].weight, weight)


def test_other_parts_are_refused(tmp_path):
    train(*build(str(tmp_path)))
    other, *_ = build(str(tmp_path))
    other.stateful = {}
    with pytest.raises(CheckpointError, match="holds .*ema.*; use another output_dir"):
        other.resume()


@pytest.mark.parametrize("part", ["module.m", "optimizer.m"])
def test_parts_of_other_shapes_are_refused(tmp_path, part):
    train(*build(str(tmp_path)))
    other, module, _ = build(str(tmp_path))
    other.modules["m"] = torch.nn.Linear(2, 1) if part == "module.m" else module
    other.optimizers["m"] = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    with pytest.raises(CheckpointError, match=f"holds another {part} than this run has; use another output_dir"):
        other.resume()


def test_a_checkpoint_of_a_later_step_is_refused(tmp_path):
    train(*build(str(tmp_path)))
    shorter, module, _ = build(str(tmp_path), num_steps=4)
    before = module.weight.clone()
    with pytest.raises(
        CheckpointError,
        match="step-00000007 .* after 7 updates, this run is to make 4; .* output_dir, or .* at least 7",
    ):
        shorter.resume()
    assert torch.equal(module.weight, before) and shorter.step == 0


@pytest.mark.parametrize(("at_hand", "remedy"), [(7, "continue from the one before, step-00000006"), (1, "begin anew")])
def test_a_damaged_checkpoint_says_how_to_go_on_without_it(tmp_path, at_hand, remedy):
    train(*build(str(tmp_path), num_steps=at_hand))
    newest = tmp_path / f"step-{at_hand:08d}"
    (newest / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{newest.name} is damaged: remove this folder to {remedy} .*state.json"):
        train(*build(str(tmp_path), num_steps=at_hand))
    shutil.rmtree(newest)
    assert len(train(*build(str(tmp_path), num_steps=at_hand))) == at_hand


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux tells what is mapped")
def test_a_resumed_run_lets_go_of_the_file(tmp_path):
    train(*build(str(tmp_path), num_steps=2))
    resumed = build(str(tmp_path), num_steps=2)
    assert resumed[0].resume()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_two_runs_cannot_train_in_one_folder(tmp_path):
    def refused(step):
        inner, *_ = build(str(tmp_path / "inner"))
        inner.run(lambda step: {})  # a stage within a stage has its own
        other, *_ = build(str(tmp_path))
        with pytest.raises(FolderLockedError, match=f"another run is training in {tmp_path}"):
            other.run(lambda step: {})
        return {}

    for _ in range(2):
        loop, *_ = build(str(tmp_path), num_steps=1)
        loop.run(refused)
    with pytest.raises(KeyboardInterrupt):
        train(*build(str(tmp_path / "inner"), num_steps=9), fail_at=8)
    assert len(train(*build(str(tmp_path / "inner"), num_steps=9))) == 9


def test_a_checkpoint_that_was_put_aside_is_resumed(tmp_path):
    history = train(*build(str(tmp_path)))
    (tmp_path / "step-00000007").rename(tmp_path / ".tmp-old-step-00000007-0123abcd")
    assert train(*build(str(tmp_path)), fail_at=6) == history


def test_a_part_that_refuses_is_asked_before_any_is_loaded(tmp_path):
    class Refusing:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise OSError("other settings")

    first, *_ = build(str(tmp_path))
    first.loaded_first["settings"] = Refusing()
    first.save()
    again, module, ema = build(str(tmp_path))
    torch.nn.init.constant_(module.weight, 5.0)
    again.loaded_first["settings"] = Refusing()
    with pytest.raises(OSError, match="other settings"):
        again.resume()
    assert bool((module.weight == 5.0).all())


def test_a_part_says_itself_what_is_wrong(tmp_path):
    train(*build(str(tmp_path)))
    other, *_ = build(str(tmp_path))

    class Refusal(ValueError):
        pass

    def refuse(state):
        raise Refusal

    other.stateful["ema"].load_state_dict = refuse
    with pytest.raises(Refusal):
        other.resume()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_is_raised_before_the_step(where):
    loop, module, _ = build()
    before = module.weight.clone()
    x = torch.zeros(1, 3)
    loss = module(x).sum() * math.nan if where == "loss" else (module(x).sum() - module(x).sum().detach()).sqrt()
    with pytest.raises(NonFiniteError, match="step 0"):
        loop.update("m", loss)
    assert torch.equal(module.weight, before)
    assert module.weight.grad is None


def test_what_an_update_tells_is_read_as_numbers():
    told = read_logs({"loss": torch.tensor(1.5, requires_grad=True), "rate": 0.25, "exit_step": 3})
    assert told == {"loss": 1.5, "rate": 0.25, "exit_step": 3}
    assert [type(value) for value in told.values()] == [float, float, int]


def test_gradients_are_what_they_are_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    loop, module, _ = build(max_grad_norm=0)
    assert loop.update("m", module(torch.ones(1, 3)).sum()) == pytest.approx(2.0)


def test_clipping_bounds_the_update():
    loop, module, _ = build(max_grad_norm=0.5)
    loop.optimizers["m"] = torch.optim.SGD(module.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    assert loop.update("m", 100 * module(torch.ones(1, 3)).sum()) == pytest.approx(200.0)
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.5, rel=1e-4)


def test_stop_training_ends_early_and_keeps_the_history(tmp_path):
    def step(index):
        if index == 3:
            raise StopTraining
        return {"loss": 0.0}

    assert len(build(str(tmp_path))[0].run(step)) == 3
    assert latest_checkpoint(tmp_path).name == "step-00000003"
    assert len(build(str(tmp_path))[0].run(step)) == 3


def test_a_stop_iteration_that_nobody_meant_ends_nothing_silently():
    loop, *_ = build()
    with pytest.raises(RuntimeError, match="t: step 0 let a StopIteration out; .* StopTraining") as caught:
        loop.run(lambda step: {"first": next(iter(()))})
    assert isinstance(caught.value.__cause__, StopIteration)


def drawn(loop, fail_at=None):
    """Return the history of a loop whose steps draw from the global generator."""

    def step(index):
        if index == fail_at:
            raise KeyboardInterrupt
        return {"drawn": float(torch.rand(()))}

    return loop.run(step)


def test_what_a_step_draws_globally_depends_on_the_step_alone(tmp_path):
    torch.manual_seed(1)
    history = drawn(build()[0])
    assert len({entry["drawn"] for entry in history}) == 7
    assert drawn(build(seed=1)[0]) != history
    with pytest.raises(KeyboardInterrupt):
        drawn(build(str(tmp_path))[0], fail_at=5)
    again, *_ = build(str(tmp_path))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert drawn(again) == history
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gradient_from_before_the_run_enters_no_update():
    (loop, module, _), (other, clean, _) = build(), build()
    module.weight.grad = torch.full_like(module.weight, 1000.0)
    assert [
        run.run(lambda _, run=run, net=net: {"norm": run.update("m", net(torch.ones(1, 3)).sum())})[0]["norm"]
        for run, net in ((loop, module), (other, clean))
    ] == [2.0, 2.0]


def test_ema_is_the_exact_average():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 0.0)
    ema = Ema(module, 0.75)
    torch.nn.init.constant_(module.weight, 1.0)
    ema.update()
    ema.update()
    assert float(ema.module.weight.detach()) == pytest.approx(1 - 0.75**2)
    with pytest.raises(ValueError, match="1.0"):
        Ema(module, 1.0)


def test_learning_rate_schedule():
    assert warmup_cosine(0, 110, warmup=10) == pytest.approx(0.1)
    assert warmup_cosine(10, 110, warmup=10) == pytest.approx(1.0)
    assert warmup_cosine(60, 110, warmup=10) == pytest.approx(0.5)
    assert warmup_cosine(110, 110, warmup=10, floor=0.2) == pytest.approx(0.2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    set_learning_rate(optimizer, 0.3)
    assert optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("field", ["num_steps", "checkpoint_every", "log_every"])
def test_bad_settings_are_named(field):
    with pytest.raises(ValueError, match=field):
        LoopConfig(**{"num_steps": 1, field: 0})


@pytest.mark.parametrize("order", [("no", "bf16", "no"), ("bf16", "no", "bf16")])
def test_stages_of_one_process_may_differ_in_precision(order):
    for precision in order:
        loop, module, _ = build(mixed_precision=precision)
        with loop.accelerator.autocast():
            computed = module(torch.zeros(1, 3)).dtype
        assert computed == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_a_weight_used_without_gradient_first_gets_its_gradient_in_bf16():
    loop, module, _ = build(mixed_precision="bf16")
    with loop.accelerator.autocast():
        assert not torch.is_autocast_cache_enabled(), "older torch would keep the weight that was cast under no_grad"
        with torch.no_grad():
            module(torch.zeros(1, 3))
        loss = module(torch.ones(1, 3)).float().sum()
    loss.backward()
    torch.testing.assert_close(module.weight.grad, torch.ones(1, 3))


def test_ema_moves_the_module_it_is_given():
    module = torch.nn.Linear(2, 1)
    average = torch.nn.Linear(2, 1).requires_grad_(False)
    start = average.weight.clone()
    ema = Ema(module, 0.75, average=average)
    ema.update()
    assert ema.module is average
    torch.testing.assert_close(average.weight, 0.75 * start + 0.25 * module.weight.detach())


@pytest.fixture
def any_device(monkeypatch):
    """Let every name of a device pass, in a launch of as many processes as the fixture's value is set to."""
    launch = {"count": 1}
    monkeypatch.setattr(
        module_of_loops, "join_launch", lambda name: (Ranks(0, launch["count"]), torch.device(name or "cpu"))
    )
    yield launch
    launch["count"] = 1
    build()  # leaves accelerate on the CPU


@pytest.mark.parametrize("order", [("cpu", "meta", "cpu"), ("meta", "cpu", "meta")])
def test_stages_of_one_process_may_differ_in_device(any_device, order):
    for device in order:
        loop, module, _ = build(device=device)
        assert str(loop.accelerator.device) == str(loop.device) == str(module.weight.device) == device


def test_a_device_is_told_from_others_of_its_kind(any_device):
    build(device="meta:0")
    assert build(device="meta:1")[0].accelerator.device == torch.device("meta:1")


def test_what_is_asked_for_by_name_wins_over_the_environment(any_device, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert [build(device="meta")[0].accelerator.device.type for _ in range(2)] == ["meta", "meta"]


def test_a_launch_keeps_the_kind_of_device_it_joined_on(any_device):
    build(device="cpu")
    any_device["count"] = 2
    build(device="cpu")
    with pytest.raises(DeviceError, match="'meta' cannot be used: .* joined on 'cpu'; give all stages the same device"):
        build(device="meta")


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(DeviceError, match="'cuda:99'"):
        build(device="cuda:99")


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from latent_rewards.training.checkpoint import CheckpointError
from latent_rewards.training.loop import Ema, LoopConfig, StopTraining, TrainingLoop
from latent_rewards.training.ranks import OutOfStepError, current_ranks

root, ranks = Path(sys.argv[1]), current_ranks()
told = {}

def built(folder=None, num_steps=3):
    torch.manual_seed(ranks.index)
    module = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.BatchNorm1d(1))
    module[1].running_mean.fill_(ranks.index)
    config = LoopConfig(num_steps, output_dir=folder, checkpoint_every=2, device="cpu", progress=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    ema = Ema(module, 0.5)
    loop = TrainingLoop(config, name="t", modules={"m": module}, optimizers={"m": optimizer}, stateful={"ema": ema})
    return loop, module, ema

def trained(loop, module, ema, stop=lambda step: False):
    def step(index):
        if stop(index):
            raise StopTraining
        norm = loop.update("m", module[0](torch.full((1, 3), 1.0 + ranks.index)).sum())
        ema.update()
        own = {f"of {ranks.index}": 1.0} if index == 1 else {}
        return {"norm": norm, "rank": ranks.index, "drawn": float(torch.rand(())), **own}
    return loop.run(step)

def state(module):
    return {name: value.tolist() for name, value in module.state_dict().items()}

whole = built(str(root / "shared"))
told["history"] = trained(*whole)
told["weights"], told["average"] = state(whole[1]), state(whole[2].module)

def failing(name, error, *arguments, **options):
    try:
        trained(*arguments, **options)
    except error as caught:
        told[name] = str(caught).replace(f"node{ranks.index}", "node")

failing("one stops", OutOfStepError, *built(), stop=lambda step: (ranks.index, step) == (1, 2))
told["all stop"] = len(trained(*built(), stop=lambda step: step == 2))
trained(*built(str(root / f"node{ranks.index}"), num_steps=2))
failing("apart", CheckpointError, *built(str(root / f"node{ranks.index}")))
(root / f"told-{ranks.index}.json").write_text(json.dumps(told))
ranks.leave()
"""


def test_two_processes_keep_in_step(launch, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = launch(tmp_path / "script.py", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [entry["rank"] for entry in first["history"]] == [0.5] * 3 and first["history"][0]["norm"] == pytest.approx(
        (3 * 1.5**2 + 1) ** 0.5
    )
    assert (first["history"][1]["of 0"], first["history"][1]["of 1"]) == (1.0, 1.0)
    assert first["history"] == [
        json.loads(line) for line in (tmp_path / "shared/history.jsonl").read_text().splitlines()
    ]
    assert first["weights"]["1.running_mean"] == first["average"]["1.running_mean"] == [0.0]
    assert "process 0 at an update of m in step 2 of t, process 1 at the end of t before step 2" in first["one stops"]
    assert first["all stop"] == 2
    assert "would go on from steps [2, 0]; output_dir" in first["apart"]
