"""The metric's own gradient, curves that are kept, and every method of both benchmarks for an update or two."""

import copy
import dataclasses
import json
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import latent_rewards as lr
from benchmarks import constraints, estimators, overoptimisation, sample_efficiency
from benchmarks.proxy_samples import Amounts, ProxyWorld
from benchmarks.result_files import RESULTS, keep
from benchmarks.tuning import TuningWorld, differentiable_legibility
from latent_rewards.contracts import ConfigError
from latent_rewards.lro.scoring import ProxyReward
from latent_rewards.training.checkpoint import MANIFEST
from latent_rewards.training.devices import DeviceError
from recipes.moving_digits import metrics as _register  # noqa: F401 - registers digits.*
from recipes.moving_digits.evaluation_set import noise_clips
from recipes.moving_digits.world import draw_specs, parse_prompt, render, write_prompt

TEACHER = "recipes/moving_digits/weights/teacher"
SMALL = Amounts(pool=40, heldout=12, heldout_prompts=6)
QUICK = lr.ProxyConfig(
    trunk="pixels", width=16, depth=1, num_updates=4, ensemble_size=2, decoder_updates=10, progress=False
)


@pytest.fixture(scope="module")
def world(untrained_student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    samples = ProxyWorld(untrained_student, TEACHER, folder / "samples", SMALL)
    return TuningWorld(samples, folder / "runs", QUICK)


def test_differentiable_legibility_is_legibility_and_has_its_gradient():
    specs = draw_specs(3, seed=1)
    prompts = [write_prompt(spec, seed=1, index=i) for i, spec in enumerate(specs)]
    videos = render(specs, seed=1)
    videos = (videos + 0.1 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    exact = lr.create_metric("digits.legibility")(videos, prompts=prompts)
    torch.testing.assert_close(differentiable_legibility(videos, prompts), exact, rtol=0, atol=1e-6)
    double = videos.double().requires_grad_()
    (gradient,) = torch.autograd.grad(differentiable_legibility(double, prompts).sum(), double)
    along = gradient / gradient.norm()
    ends = [differentiable_legibility(double.detach() + sign * 1e-6 * along, prompts).sum() for sign in (1, -1)]
    assert float(ends[0] - ends[1]) / 2e-6 == pytest.approx(float(gradient.norm()), rel=1e-3)


def test_the_world_judges_by_prompts_nothing_was_trained_on(world):
    assert all(parse_prompt(prompt).is_heldout for prompt in world.heldout_prompts(20))
    assert not any(parse_prompt(prompt).is_heldout for prompt in [*world.prompts(3)[:50], *world.heldin_prompts(20)])
    latents = world.sample(world.student, world.heldout_prompts(4), "a")
    assert torch.equal(latents, world.sample(world.student, world.heldout_prompts(4), "a"))
    assert not torch.equal(latents, world.sample(world.student, world.heldout_prompts(4), "b"))


def test_a_device_that_is_not_there_is_refused_before_any_work(world, tmp_path):
    samples = SimpleNamespace(device="cuda:7", student=None, codec=world.codec)
    with pytest.raises(DeviceError, match="'cuda:7' cannot be used"):
        TuningWorld(samples, tmp_path, QUICK)


def test_a_proxy_of_another_student_or_configuration_is_fitted_anew(world, tmp_path, monkeypatch):
    fitted = []

    def train_proxy(dataset, config, encode, codec):
        fitted.append((config.trunk, config.ensemble_size, config.seed))
        return SimpleNamespace(save_pretrained=lambda folder: (folder.mkdir(parents=True), (folder / MANIFEST).touch()))

    def load(folder, encode):
        return SimpleNamespace(to=lambda device: folder.name)

    monkeypatch.setattr("benchmarks.tuning.lr.train_proxy", train_proxy)
    monkeypatch.setattr("benchmarks.tuning.lr.RewardProxy.from_pretrained", load)

    def proxy(student, size=None, **different):
        samples = SimpleNamespace(**vars(world.samples) | {"folder": tmp_path, "student_digest": student})
        samples.embed = None
        other = copy.copy(world)
        other.samples, other.config = samples, dataclasses.replace(QUICK, **different)
        other.dataset = lambda seed, labels: None
        return other.proxy(3, 40, size)

    first = proxy("one")
    assert proxy("one", progress=True) == first and fitted == [("pixels", 2, 3)]
    names = [first, proxy("two"), proxy("one", trunk="conv3d"), proxy("one", size=1)]
    assert len({*names}) == 4 and fitted[1:] == [("pixels", 2, 3), ("conv3d", 2, 3), ("pixels", 1, 3)]


@pytest.mark.parametrize("name", sample_efficiency.METHODS)
def test_every_method_tunes_and_counts_its_queries(world, tmp_path, name):
    method = sample_efficiency.METHODS[name]
    few = {"prompts_per_update": 2, "num_generations": 2}
    if method.labels:
        few |= {"num_draws": 4, "refresh_every": 1, "refresh_queries": 8, "refresh_steps": 1}
    method = dataclasses.replace(
        method,
        labels=40 if method.labels else 0,
        settings={**method.settings, **few, "num_updates": 2},
    )
    world = copy.copy(world)
    world.folder = tmp_path / "runs"
    sizes = sample_efficiency.Sizes(judged=4, points=2)
    race = sample_efficiency.Race(world, sizes, {name: method})
    trial = sample_efficiency.Race(world, dataclasses.replace(sizes, share=0.5), {name: method})
    cells = sample_efficiency.cells(race, tmp_path / "results", [name], [1e-4], [0])
    keep(cells)
    told = json.loads((tmp_path / "results" / f"{name}-0.0001-seed0.json").read_text())
    queries = [point["queries"] for point in told["curve"]]
    # A refresh comes before the second update.
    spent = {"refreshed": [40, 40, 48], "frozen": [40, 40, 40]}.get(method.source, [0, 4, 8])
    assert queries == spent
    values = [point["true"] for point in told["curve"]]
    assert values[0] != values[1] != values[2]
    assert 0 <= told["heldin"] <= 1
    keep(cells)  # it is there
    before = (world.folder / f"{name}-0.0001-seed0" / "curve.json").read_text()
    with pytest.raises(ConfigError, match="share = 1.0, now 0.5"):
        keep(sample_efficiency.cells(trial, tmp_path / "results", [name], [1e-4], [0]))
    (tmp_path / "results" / f"{name}-0.0001-seed0.json").unlink()
    keep(cells)  # its run goes on at its end
    assert (world.folder / f"{name}-0.0001-seed0" / "curve.json").read_text() == before


def curve(*values, step=100):
    return [{"updates": i, "queries": 50 + step * i, "true": value} for i, value in enumerate(values)]


def result(name, seed, *values, step=100):
    told = {"seed": seed, "seconds": 10.0 + seed, "device": "cpu" if seed < 2 else "NVIDIA H200"}
    return {"method": name, "learning_rate": 1e-4, **told, "curve": curve(*values, step=step)}


def test_queries_to_the_target_are_those_of_the_mean_curve():
    results = [
        *(result("lro_pathwise", seed, 0.4, 0.6 + 0.1 * seed, 0.8) for seed in (0, 1)),
        *(result("ddpo", seed, 0.4, 0.5, 0.62 + 0.04 * seed, step=1000) for seed in (0, 1)),
        *(result("flow_grpo", seed, 0.4, 0.7, 0.6, step=1000) for seed in (0, 1)),
        *(result("backprop", seed, 0.9, 0.9, 0.9) for seed in (0, 1)),
    ]
    summary = sample_efficiency.summarise(results)
    assert summary["best"] == "ddpo" and summary["target"] == pytest.approx(0.64)
    assert summary["queries_to_target"] == {"lro_pathwise": 150, "ddpo": 2050, "flow_grpo": 1050, "backprop": 50}
    assert summary["ratio"] == pytest.approx(150 / 2050)
    assert "LRO reaches it with 0.073 of the queries" in sample_efficiency.table(summary)
    assert "| 10 on cpu |" in sample_efficiency.table(sample_efficiency.summarise(results[:1]))
    mixed = sample_efficiency.summarise([result("ddpo", seed, 0.4, 0.5) for seed in (0, 1, 2)])
    assert mixed["methods"]["ddpo"]["seconds"] == {"cpu": 10.5, "NVIDIA H200": 12.0}
    short = sample_efficiency.summarise([result("lro_pathwise", 0, 0.4, 0.5), result("ddpo", 0, 0.4, 0.6)])
    assert short["ratio"] is None and "no LRO reaches it" in sample_efficiency.table(short)


def searched(folder, name, ends, seeds=()):
    """Write a search, and final runs of every rate of it that end where the search did."""
    for rate, value in ends.items():
        for seed in (sample_efficiency.SEARCH_SEED, *seeds):
            told = {**result(name, seed, 0.4, value), "learning_rate": rate, "heldin": value}
            sample_efficiency.cell(folder, name, rate, seed).write_text(json.dumps(told))


def test_the_search_takes_the_best_end_on_heldin_prompts(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no search of ddpo: run it first \(--stage search\)"):
        sample_efficiency.best_rate(tmp_path, "ddpo")
    searched(tmp_path, "ddpo", {5e-5: 0.5, 1.5e-4: 0.7})
    searched(tmp_path, "backprop", {5e-4: 0.9})
    with pytest.raises(ConfigError, match=r"ddpo-0.0005-search.json is missing: run the search of ddpo first"):
        sample_efficiency.best_rate(tmp_path, "ddpo", sample_efficiency.LEARNING_RATES)
    searched(tmp_path, "ddpo", {5e-4: 0.6})
    assert sample_efficiency.best_rate(tmp_path, "ddpo", sample_efficiency.LEARNING_RATES) == 1.5e-4


def test_final_runs_of_other_learning_rates_are_not_averaged_in(tmp_path, capsys):
    searched(tmp_path, "ddpo", {5e-5: 0.7, 1.5e-4: 0.1}, seeds=(0, 1))
    sample_efficiency.summarise_folder(tmp_path)
    told = json.loads((tmp_path / "summary.json").read_text())["methods"]["ddpo"]
    assert told["learning_rate"] == 5e-5 and told["seeds"] == [0, 1]
    assert told["curve"][-1]["true"] == {"mean": pytest.approx(0.7), "std": 0.0}
    assert "| 5e-05 |" in capsys.readouterr().out and (tmp_path / "curves.png").is_file()


def test_the_rates_that_are_searched_are_those_that_are_chosen_from(tmp_path):
    measured = []

    def measure(name, rate, seed):
        measured.append((rate, seed))
        return {"heldin": rate, "learning_rate": rate, "seconds": 1.0}

    world = SimpleNamespace(proxy=lambda seed, labels: None)
    race = SimpleNamespace(world=world, measure=measure, measured_with=lambda name: {})
    asked = {"stage": "all", "methods": ["ddpo"], "rates": [1e-4, 2e-4], "seeds": [0, 1], "results": tmp_path}
    sample_efficiency.measure_stages(race, Namespace(**asked))
    search = sample_efficiency.SEARCH_SEED
    assert measured == [(1e-4, search), (2e-4, search), (2e-4, 0), (2e-4, 1)]


def test_the_committed_final_runs_are_those_of_the_chosen_rates():
    folder = RESULTS / "sample_efficiency"
    assert len(sample_efficiency.chosen(folder)) == len(list(folder.glob("*-seed*.json"))) > 0


def test_curves_are_drawn(tmp_path):
    summary = sample_efficiency.summarise([result("lro_pathwise", 0, 0.4, 0.5), result("ddpo", 0, 0.4, 0.6)])
    sample_efficiency.draw(summary, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_every_variant_climbs_and_is_judged(world, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.moving_digits.benchmark.noise_clips", partial(noise_clips, count=8))
    few = {"prompts_per_update": 2, "num_generations": 2}
    for name, variant in overoptimisation.VARIANTS.items():
        settings = {**variant.method.settings, **few}
        if variant.method.source == "refreshed":
            settings |= {"refresh_every": 1, "refresh_queries": 8, "refresh_steps": 1}
        method = dataclasses.replace(variant.method, labels=40, settings=settings)
        monkeypatch.setitem(overoptimisation.VARIANTS, name, dataclasses.replace(variant, method=method))
    world = copy.copy(world)
    world.folder = tmp_path / "runs"
    climb = overoptimisation.Climb(world, overoptimisation.Sizes(updates=2, judged_after=(1,), prompts=2))
    climb.settings["anchor"].warmup = 1
    climb.settings["run"].batch_size = 2
    overoptimisation.run(climb, tmp_path / "results", list(overoptimisation.VARIANTS), [0])
    results = [json.loads(file.read_text()) for file in (tmp_path / "results").glob("*-seed0.json")]
    assert {told["variant"] for told in results} == set(overoptimisation.VARIANTS)
    for told in results:
        kl = [point["kl"] for point in told["curve"]]
        assert kl[0] == 0 < kl[1] < kl[2] and [point["updates"] for point in told["curve"]] == [0, 1, 2]
        assert told["queries"] == (48 if "refreshed" in told["variant"] else 40)
        assert told["curve"][0]["true"] == results[0]["curve"][0]["true"], "the same student, prompts and noise"
    further = overoptimisation.Climb(world, dataclasses.replace(climb.sizes, updates=3))
    with pytest.raises(ConfigError, match="updates = 2, now 3"):
        overoptimisation.run(further, tmp_path / "results", ["refreshed"], [0, 1])
    summary = overoptimisation.summarise(results)
    assert "refreshed, anchored, end" in overoptimisation.table(summary)
    overoptimisation.draw(summary, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_the_end_is_what_a_run_gained_and_lost():
    first = {"proxy": 0.6, "true": 0.6, "digit": 90.0, "coverage": 40.0, "frechet": 20.0}
    last = {"proxy": 0.8, "true": 0.75, "digit": 95.0, "coverage": 38.0, "frechet": 22.0}
    told = overoptimisation.end([first, {}, last])
    assert told == pytest.approx({"gap": 0.05, "digit": 5.0, "coverage": -2.0, "frechet": 0.1})


def test_gradients_of_every_estimator_are_compared(world):
    reward = ProxyReward(world.proxy(0, 40), None, pessimism=0.0, cap=None, micro_batch=64)
    told = estimators.measure(world, reward, estimators.make_estimators((4,)), 2, 4)
    exact = told[estimators.EXACT]
    assert exact["slope"] == exact["cosine"] == 1 and exact["seconds"] > 0
    assert all(value["spread"] >= 0 for value in told.values()) and len(told) == 8
    assert told["reinforce, head 0.1"]["spread"] > exact["spread"]


def test_floor_and_front_are_measured_beside_what_they_are_compared_with(world, tmp_path, monkeypatch):
    monkeypatch.setattr(constraints, "LABELS", 40)
    monkeypatch.setattr(constraints, "WEIGHTS", (0.0, 1.0))
    pair = TuningWorld(world.samples, tmp_path / "runs", QUICK, rewards=(constraints.TUNED, constraints.GUARDED))
    trade = constraints.Trade(pair, constraints.Sizes(updates=2, judged=4, refresh_every=2))
    constraints.run(trade, tmp_path / "results", constraints.PARTS, [0])
    results = [json.loads(file.read_text()) for file in (tmp_path / "results").glob("*-seed0.json")]
    counts = {"free": 1, "floor": 1, "free_adapters": 1, "floor_adapters": 1, "sweep": 2, "front": 2}
    assert {told["part"]: len(told["points"]) for told in results} == counts
    assert len({told["student"][constraints.TUNED] for told in results}) == 1
    quick = constraints.Trade(pair, dataclasses.replace(trade.sizes, judged=8))
    with pytest.raises(ConfigError, match="judged = 4, now 8"):
        constraints.run(quick, tmp_path / "results", ["free"], [1, 0])
    summary = constraints.summarise(results)
    kept = constraints.chosen(next(result for result in results if result["part"] == "front")) is not None
    told = {"free_change", "free_adapters_change", "floor_violation", "floor_adapters_violation"}
    told |= {"front_gain", "front_violation"} if kept else set()
    told |= {"floor_gain", "free_adapters_gain", "floor_adapters_gain", "front", "sweep"}
    assert set(summary["numbers"]) == told
    assert "- floor_gain: " in constraints.table(summary)


def test_the_weight_on_a_front_is_chosen_on_held_in_prompts():
    def point(weight, heldout, heldin):
        named = [dict(zip((constraints.TUNED, constraints.GUARDED), pair, strict=True)) for pair in (heldout, heldin)]
        return {"weight": weight, **named[0], constraints.HELDIN: named[1]}

    points = [
        point(0.0, (0.65, 0.6), (0.7, 0.5)),
        point(0.5, (0.7, 0.4), (0.8, 0.49)),
        point(1.0, (0.9, 0.5), (0.9, 0.48)),
    ]
    front = {
        "part": "front",
        "seed": 0,
        "student": point(None, (0.6, 0.5), (0.65, 0.5)),
        "points": points,
        "share": 0.98,
    }
    assert constraints.chosen(front) == points[1]
    free = {**front, "part": "free", "points": [{constraints.TUNED: 0.8, constraints.GUARDED: 0.3}]}
    told = constraints.told([front, free])
    assert told["front_gain"] == pytest.approx(0.5) and told["front_violation"] == pytest.approx(1 - 0.4 / 0.49)
    strict = {**front, "share": 1.1}
    assert constraints.chosen(strict) is None and "front_gain" not in constraints.told([strict, free])


def test_what_a_floor_leaves_of_a_gain_and_how_far_it_is_missed():
    def part(name, *points):
        pairs = [{constraints.TUNED: a, constraints.GUARDED: b} for a, b in points]
        student = {constraints.TUNED: 0.6, constraints.GUARDED: 0.5}
        return {"part": name, "seed": 0, "student": student, "points": pairs, "share": 0.98}

    parts = [part("free", (0.8, 0.4)), part("floor", (0.79, 0.4851)), part("floor_adapters", (0.81, 0.49))]
    parts += [part("front", (0.7, 0.6), (0.8, 0.5)), part("sweep", (0.75, 0.55))]
    told = constraints.told(parts)
    assert told == pytest.approx(
        {
            "free_change": -0.2,
            "floor_gain": 0.95,
            "floor_violation": 0.01,
            "floor_adapters_gain": 1.05,
            "floor_adapters_violation": 0.0,
            "front": 0.2 * 0.2 + 0.1 * 0.1,
            "sweep": 0.25 * 0.15,
        }
    )
    assert constraints.told([part("floor", (0.7, 0.51))]) == {"floor_violation": 0.0}
