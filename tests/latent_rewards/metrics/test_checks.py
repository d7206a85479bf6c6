"""check_metric finds every kind of broken promise, and passes the built-in metrics; cheating clips win what is said."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, MetricError
from latent_rewards.metrics import Metric, check_metric, create_metric, list_metrics, register_metric, registry
from latent_rewards.metrics.checks import cheating_clips, moving_textures, warn_if_cheatable
from latent_rewards.metrics.metric import CHEATS
from latent_rewards.metrics.registry import metric_info

WEIGHT_FREE = [
    name
    for name in list_metrics()
    if registry.source_of(name)[1].startswith("latent_rewards.") and not metric_info(name).weights
]
"""Of the package itself, whatever else other tests have registered."""


def mean(videos: Tensor) -> Tensor:
    return videos.flatten(1).mean(dim=1)


def changes_input(videos: Tensor) -> Tensor:
    videos.mul_(0.5)
    return mean(videos)


def fails_on_one(videos: Tensor) -> Tensor:
    return mean(videos).squeeze() if len(videos) == 1 else mean(videos)


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, videos: Tensor) -> Tensor:
        self.calls += 1
        return mean(videos) + self.calls


def shortest(videos: Tensor) -> Tensor:
    return mean(videos[:, 1:] - videos[:, :-1])


@pytest.mark.parametrize("name", WEIGHT_FREE)
def test_built_in_metrics_keep_their_promises(name: str) -> None:
    check_metric(name, num_samples=2)


@pytest.mark.parametrize(
    ("metric", "finding"),
    [
        (Metric(name="m", score=Counting()), "it says deterministic"),
        (Metric(name="m", score=lambda v: mean(v) - mean(v).mean()), "batch_invariant, and sample 0"),
        (Metric(name="m", score=changes_input), "changes the videos"),
        (Metric(name="m", score=lambda v, prompts: mean(v), needs_prompt=True), "other prompts changed no value"),
        (Metric(name="m", score=lambda v: 3 * mean(v), value_range=(0, 1)), "leaves|promises values"),
        (Metric(name="m", score=lambda v: mean(v)[:, None]), r"shape \(4, 1\)"),
        (Metric(name="m", score=lambda v: mean(v) + 0j), "complex"),
        (Metric(name="m", score=fails_on_one), r"sample 0 alone: .*shape \(\)"),
        (Metric(name="m", score=lambda v: mean(v.detach()), differentiable=True), "its gradient failed"),
        (Metric(name="m", score=lambda v: (0 * mean(v)).sqrt(), differentiable=True), "not finite"),
        (Metric(name="m", score=lambda v: 1 / v.diff(dim=1).abs().flatten(1).mean(1), minimum_frames=2), "still clips"),
        (Metric(name="m", score=shortest), r"clips of 1 frame\(s\): .*NaN"),
    ],
)
def test_each_broken_promise_is_named(metric: Metric, finding: str) -> None:
    with pytest.raises(MetricError, match=f"metric 'm' breaks its contract:[^§]*{finding}"):
        check_metric(metric)


def test_all_findings_come_in_one_error() -> None:
    @register_metric("test.bad", version="1", needs_prompt=True, value_range=(0, 0.1))
    def bad(videos: Tensor, *, prompts: list[str]) -> Tensor:
        videos.clamp_(0.2, 0.4)
        return mean(videos) if len(videos) > 1 else mean(videos) * 0

    with pytest.raises(MetricError) as caught:
        check_metric("test.bad")
    text = str(caught.value)
    assert "changes the videos" in text and "promises values in [0, 0.1]" in text


def test_a_metric_that_admits_to_it_passes(videos: Tensor) -> None:
    check_metric(Metric(name="m", score=Counting(), deterministic=False))
    check_metric(Metric(name="m", score=lambda v: mean(v) - mean(v).mean(), batch_invariant=False))
    check_metric(Metric(name="m", score=lambda v: mean(v) * torch.nan, may_be_nan=True))


def test_own_videos_and_prompts_are_used(videos: Tensor) -> None:
    def score(given: Tensor, *, prompts: list[str]) -> Tensor:
        return torch.tensor([float(prompt) for prompt in prompts])

    check_metric(Metric(name="m", score=score, needs_prompt=True), videos=videos, prompts=["1", "2", "3", "4"])
    with pytest.raises(ConfigError, match="at least 2 samples; got 1"):
        check_metric(Metric(name="m", score=mean), num_samples=1)


@pytest.fixture(scope="module")
def real_and_cheating() -> tuple[Tensor, dict[str, Tensor]]:
    real = moving_textures(4, num_frames=25, seed=3)  # over a few frames H.264 does not gain by repetition
    return real, cheating_clips(real, seed=1)


@pytest.mark.parametrize("kind", CHEATS)
@pytest.mark.parametrize("name", WEIGHT_FREE)
def test_a_cheating_clip_wins_exactly_where_the_metric_says_so(
    name: str, kind: str, real_and_cheating: tuple[Tensor, dict[str, Tensor]]
) -> None:
    metric = create_metric(name)
    sign = 1.0 if metric.higher_is_better else -1.0
    real, cheating = (sign * metric(clips) for clips in (real_and_cheating[0], real_and_cheating[1][kind]))
    wins = bool((cheating >= real).all())
    assert wins == (kind in metric.cheats)


def test_the_only_reward_is_a_warning_if_a_cheating_clip_wins_it() -> None:
    still, motion, noise = (
        create_metric(name) for name in ("motion.smoothness", "motion.flow_direction", "quality.sharpness")
    )
    with pytest.warns(
        UserWarning,
        match="'motion.smoothness' is the only.* a still or a grey clip.*add motion.dynamic_degree or",
    ) as seen:
        warn_if_cheatable([still])
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="'quality.sharpness'.* a noise clip .*add a metric that reads the prompt"):
        warn_if_cheatable({"sharp": noise}.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_cheatable([still, noise])
        warn_if_cheatable([motion])
        warn_if_cheatable([lambda videos: 0.0])


def test_writing_into_the_videos_is_an_error_at_once(videos: Tensor) -> None:
    with pytest.raises(MetricError, match="'m' changes the videos it is given"):
        Metric(name="m", score=changes_input)(videos.clone())
    for change in (lambda a: 1 - a, lambda a: a[..., ::-1].copy(), lambda a: a[:, ::-1].copy()):

        def past_torch(videos: Tensor, change: Callable[..., Any] = change) -> Tensor:
            array = videos.numpy()
            array[:] = change(array)
            return mean(videos)

        with pytest.raises(MetricError, match="'m' changes the videos it is given"):
            Metric(name="m", score=past_torch)(videos.clone())
    with torch.inference_mode():
        assert Metric(name="m", score=mean)(videos.clone()).shape == (4,)
