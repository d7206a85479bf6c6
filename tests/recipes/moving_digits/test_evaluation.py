import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_rewards.contracts import DataError, FingerprintMismatchError
from recipes.moving_digits import evaluation
from recipes.moving_digits.evaluation import Evaluation, Reference, build_reference, compare, evaluate
from recipes.moving_digits.judge import Judge
from recipes.moving_digits.scores import UndefinedError, resample_weights
from recipes.moving_digits.world import parse_prompt

PROMPTS = evaluation.evaluation_prompts(8)
DIMENSIONS = ("total", "quality", "semantic", "diversity", "frechet")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.rand(32, 17, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference(judge: Judge, noise: torch.Tensor) -> Reference:
    return build_reference(PROMPTS, judge, noise[:12], progress=False)


@pytest.fixture(scope="module")
def real_videos() -> torch.Tensor:
    return evaluation.real_clips(PROMPTS)


@pytest.fixture(scope="module")
def real(judge: Judge, reference: Reference, real_videos: torch.Tensor) -> Evaluation:
    mean = real_videos.flatten(1).mean(dim=1)
    return evaluate(real_videos, PROMPTS, reference, judge, extra={"brightness": mean})


@pytest.fixture(scope="module")
def garbage(judge: Judge, reference: Reference, noise: torch.Tensor) -> Evaluation:
    return evaluate(noise, PROMPTS, reference, judge)


def test_the_reference_holds_ten_real_clips_per_prompt(reference: Reference) -> None:
    assert len(reference.features) == 80
    assert set(reference.metrics) == set(evaluation.PIXEL_METRICS) == set(reference.noise_metrics)
    assert all(len(values) == 80 for values in reference.metrics.values())
    assert all(len(values) == 12 for values in reference.noise_metrics.values())


def test_real_clips_score_near_the_top(real: Evaluation) -> None:
    assert min(v for k, v in real.scores.items() if k.startswith("closeness/")) > 90
    assert real.scores["semantic"] > 95
    assert real.scores["diversity"] > 60
    assert real.scores["total"] > 90


def test_noise_scores_at_the_bottom(garbage: Evaluation, real: Evaluation) -> None:
    assert garbage.scores["quality"] < 2
    assert garbage.scores["diversity"] == 0
    assert garbage.scores["semantic"] < 60
    assert garbage.scores["frechet"] > 20 * real.scores["frechet"]


def test_dimensions_are_the_means_they_are_said_to_be(real: Evaluation) -> None:
    s = real.scores
    assert s["quality"] == pytest.approx(np.mean([s[f"closeness/{m}"] for m in evaluation.PIXEL_METRICS]))
    assert s["semantic"] == pytest.approx(
        np.mean([s[f"accuracy/{a}"] for a in ("digit", "colour", "direction", "speed")])
    )
    assert s["semantic"] == pytest.approx((s["semantic/heldin"] + s["semantic/heldout"]) / 2)
    assert s["total"] == pytest.approx(0.4 * s["quality"] + 0.4 * s["semantic"] + 0.2 * s["diversity"])
    assert s["brightness"] == pytest.approx(real.extra["brightness"].mean().item())


def test_semantic_is_measured_against_the_prompt(judge: Judge, reference: Reference, real_videos: torch.Tensor) -> None:
    shifted = evaluate(real_videos.roll(4, dims=0), PROMPTS, reference, judge).scores
    backwards = evaluate(real_videos.flip(1), PROMPTS, reference, judge).scores
    assert shifted["semantic"] < 70
    assert backwards["accuracy/direction"] == 0
    assert backwards["accuracy/colour"] == 100


def test_repeating_one_clip_costs_diversity_only(
    judge: Judge, reference: Reference, real: Evaluation, real_videos: torch.Tensor
) -> None:
    collapsed = evaluate(real_videos[::4].repeat_interleave(4, dim=0), PROMPTS, reference, judge).scores
    assert collapsed["diversity"] < real.scores["diversity"] - 20
    assert collapsed["quality"] > 80


def test_a_metric_cannot_be_overshot(judge: Judge, reference: Reference, real_videos: torch.Tensor) -> None:
    name = "closeness/quality.temporal_flickering"
    still = evaluate(real_videos[:, :1].expand(-1, 17, -1, -1, -1).contiguous(), PROMPTS, reference, judge)
    assert still.metrics["quality.temporal_flickering"].min() == 1
    assert still.scores[name] < 99
    assert still.scores["closeness/motion.dynamic_degree"] < 50


def test_files_come_back_unchanged(tmp_path, reference: Reference, real: Evaluation) -> None:
    reference.save(tmp_path / "reference.safetensors")
    real.save(tmp_path / "deep" / "real.safetensors")
    read, values = (
        Reference.load(tmp_path / "reference.safetensors"),
        Evaluation.load(tmp_path / "deep/real.safetensors"),
    )
    assert (read.prompts, read.fingerprints) == (reference.prompts, reference.fingerprints)
    assert all(torch.equal(read.metrics[k], v) for k, v in reference.metrics.items())
    assert all(torch.equal(read.noise_metrics[k], v) for k, v in reference.noise_metrics.items())
    assert torch.equal(read.features, reference.features)
    assert (values.scores, values.prompts) == (real.scores, real.prompts)
    assert torch.equal(values.covered, real.covered)
    assert list(compare(values, real, read, resamples=3)) == list(real.scores)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["real.safetensors"]


def test_another_benchmark_version_is_refused(tmp_path, reference: Reference) -> None:
    path = tmp_path / "reference.safetensors"
    reference.save(path)
    save_file(load_file(path), path, metadata={"settings": json.dumps({"benchmark_version": 0})})
    with pytest.raises(DataError, match="version 0, this is 1"):
        Reference.load(path)


def test_a_method_compared_with_itself_differs_by_nothing(real: Evaluation, reference: Reference) -> None:
    found = compare(real, real, reference, resamples=20)
    assert set(found) == set(real.scores)
    assert all((i.difference, i.low, i.high) == (0, 0, 0) for i in found.values())


def test_differences_of_totals_have_intervals_over_prompts(
    real: Evaluation, garbage: Evaluation, reference: Reference
) -> None:
    found = compare(garbage, real, reference, resamples=40)
    for name in DIMENSIONS:
        interval = found[name]
        assert interval.difference == pytest.approx(real.scores[name] - garbage.scores[name])
        assert 0 < interval.low < interval.high or interval.low < interval.high < 0
    for name in ("total", "semantic"):
        assert found[name].low <= found[name].difference <= found[name].high
    assert "brightness" not in found
    assert compare(garbage, real, reference, resamples=40) == found


def test_an_interval_leaves_out_the_resamples_in_which_real_clips_are_like_noise(
    judge: Judge, reference: Reference, real_videos: torch.Tensor
) -> None:
    # Half of the prompts move fast; a resample in which a quarter do is like this noise in the metric.
    moves, metric = "closeness/motion.dynamic_degree", "motion.dynamic_degree"
    fast = torch.tensor([parse_prompt(text).speed == "fast" for text in PROMPTS]).double()
    assert fast.mean() == 0.5
    drawn = resample_weights(len(PROMPTS), resamples=200, seed=1) @ fast.numpy()
    alike = int((drawn == 2).sum())
    assert alike > 5
    tight = replace(
        reference,
        metrics={**reference.metrics, metric: fast.repeat_interleave(10)},
        noise_metrics={**reference.noise_metrics, metric: torch.tensor([1.0, 0, 0, 0]).double()},
    )
    methods = [evaluate(clips, PROMPTS, tight, judge) for clips in (real_videos, real_videos.roll(4, dims=0))]
    with pytest.warns(UserWarning, match=rf"of 200 resamples.*quality {alike}, .*{moves} {alike}"):
        found = compare(*methods, tight, resamples=200, seed=1)
    assert found["total"].low < found["total"].high and found[moves].low < found[moves].high
    with pytest.warns(UserWarning, match="of 200 resamples"):
        usual = compare(*methods, reference, resamples=200, seed=1)
    assert found["semantic"] == usual["semantic"] and found["diversity"] == usual["diversity"]
    with pytest.raises(UndefinedError, match="same distribution"):
        evaluate(real_videos, PROMPTS, replace(tight, noise_metrics=tight.metrics), judge)


def test_mismatches_are_refused(
    judge: Judge, reference: Reference, real: Evaluation, real_videos: torch.Tensor
) -> None:
    with pytest.raises(DataError, match="32 clips; got 31"):
        evaluate(real_videos[1:], PROMPTS, reference, judge)
    with pytest.raises(DataError, match="other prompts"):
        evaluate(real_videos[:8], PROMPTS[:2], reference, judge)
    with pytest.raises(FingerprintMismatchError, match="judge"):
        evaluate(real_videos, PROMPTS, reference, Judge())
    with pytest.raises(DataError, match="k = 5"):
        build_reference(PROMPTS, judge, real_videos, clips_per_prompt=5)
    other = Evaluation(**{**vars(real), "prompts": PROMPTS[::-1]})
    with pytest.raises(DataError, match="same prompts"):
        compare(real, other, reference)
