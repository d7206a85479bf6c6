"""check_metric finds every kind of broken promise, and passes the built-in metrics."""

import pytest
import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, MetricError
from latent_rewards.metrics import Metric, check_metric, list_metrics, register_metric


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


@pytest.mark.parametrize("name", [n for n in list_metrics() if n.split(".")[0] in ("quality", "motion", "compression")])
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
