"""The contract: what goes in is checked, what comes out is checked, and the fingerprint tells configurations apart."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, DataError, MetricError, MetricOutputError
from latent_rewards.metrics import Metric, MetricInfo, create_metric
from latent_rewards.metrics.metric import require


def returning(value: object, **fields: object) -> Metric:
    return Metric(name="probe", score=lambda videos: value, **fields)


GOOD = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(GOOD),
        torch.tensor(GOOD, dtype=torch.float64, requires_grad=True),
        torch.tensor(GOOD, dtype=torch.bfloat16),
        np.array(GOOD),
        np.array(GOOD)[::-1][::-1],
        GOOD,
        tuple(np.float32(x) for x in GOOD),
        [torch.tensor(x) for x in GOOD],
    ],
)
def test_any_container_of_b_real_numbers_is_accepted(videos: Tensor, value: object) -> None:
    answer = returning(value)(videos)
    assert answer.dtype == torch.float32
    assert not answer.requires_grad
    torch.testing.assert_close(answer, torch.tensor(GOOD), atol=2e-3, rtol=0)


@pytest.mark.parametrize("value", [[True, False, True, True], np.array([1, 0, 1, 1]), torch.tensor([1, 0, 1, 1])])
def test_booleans_and_integers_are_cast(videos: Tensor, value: object) -> None:
    assert returning(value)(videos).tolist() == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (0.5, "a float"),
        (None, r"nothing \(None\)"),
        ({"score": GOOD}, "a dict"),
        (torch.tensor(0.5), r"shape \(\)"),
        (np.array(0.5), r"shape \(\)"),
        (torch.zeros(4, 1), r"shape \(4, 1\)"),
        ([[x] for x in GOOD], r"shape \(4, 1\)"),
        (GOOD[:3], r"shape \(3,\)"),
        (torch.zeros(1), r"shape \(1,\)"),
        (torch.zeros(4, dtype=torch.complex64), "complex"),
        ([1j, 0, 0, 0], "complex"),
        (["a", "b", "c", "d"], "not numbers"),
        ([None, 1, 2, 3], "not numbers"),
        ([1, [2, 3], 4, 5], "not numbers"),
    ],
)
def test_anything_else_is_refused_and_never_broadcast(videos: Tensor, value: object, got: str) -> None:
    with pytest.raises(MetricOutputError, match=rf"metric 'probe' returned.*{got}.*expected 4|{got}"):
        returning(value)(videos)


def test_a_zero_dimensional_array_is_refused_for_one_video_too(videos: Tensor) -> None:
    with pytest.raises(MetricOutputError, match=r"shape \(\)"):
        returning(np.array(0.5))(videos[:1])


def test_nan_is_an_error_unless_promised_and_infinity_always_is(videos: Tensor) -> None:
    value = [0.0, float("nan"), 1.0, float("nan")]
    with pytest.raises(MetricOutputError, match=r"'probe' returned NaN for samples \[1, 3\].*may_be_nan"):
        returning(value)(videos)
    assert returning(value, may_be_nan=True, value_range=(0, 1))(videos).isnan().tolist() == [False, True, False, True]
    for infinite in (float("inf"), 1e300):
        with pytest.raises(MetricOutputError, match=r"infinity for samples \[2\]"):
            returning([0.0, 0.0, infinite, 0.0], may_be_nan=True)(videos)


def test_a_value_outside_the_range_is_an_error_and_rounding_is_not(videos: Tensor) -> None:
    with pytest.raises(MetricOutputError, match=r"promises values in \[0, 1\] and returned 1.01 for samples \[2\]"):
        returning([0, 0.5, 1.01, 1], value_range=(0, 1))(videos)
    with pytest.raises(MetricOutputError, match="returned -0.01"):
        returning([0, 0.5, 1, -0.01], value_range=(0, float("inf")))(videos)
    assert returning([0, 1e9, 1, 1], value_range=(0, float("inf")))(videos)[1] == 1e9
    assert returning([1 + 1e-7, 0, 0, -1e-7], value_range=(0, 1))(videos).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.numpy(), "takes a tensor"),
        (lambda v: v[0], r"\(5, 3, 8, 8\)"),
        (lambda v: v[:0], "none of them empty"),
        (lambda v: v.permute(0, 2, 1, 3, 4), r"\[B, C, T, H, W\] must be permuted"),
        (lambda v: v.double(), "float64"),
        (lambda v: (255 * v).to(torch.uint8), "uint8"),
        (lambda v: v * 2 - 1, r"in \[0, 1\]; got -0"),
        (lambda v: v.masked_fill(v > 0.99, float("nan")), "got nan"),
        (lambda v: v[:, :1], "at least 2 frames; got 1"),
    ],
)
def test_videos_that_break_the_layout_are_refused(videos: Tensor, change: object, message: str) -> None:
    with pytest.raises(DataError, match=f"'probe'.*{message}"):
        returning(GOOD, minimum_frames=2)(change(videos))


def test_prompts_reach_only_the_metric_that_needs_them(videos: Tensor) -> None:
    seen = []

    def score(videos: Tensor, **given: object) -> Tensor:
        seen.append(given)
        return torch.zeros(len(videos))

    mixed = ["a", {"prompt": "b", "seed": 3}, "c", "d"]
    Metric(name="deaf", score=score)(videos, mixed)
    Metric(name="listening", score=score, needs_prompt=True)(videos, prompts=mixed)
    assert seen == [{}, {"prompts": ["a", "b", "c", "d"]}]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [(None, "needs the prompts"), (["a"] * 3, "3 prompts for 4 videos"), ("abcd", "one text"), ([" "] * 4, "blank")],
)
def test_missing_or_miscounted_prompts_are_refused(videos: Tensor, prompts: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        returning(GOOD, needs_prompt=True)(videos, prompts)


def test_an_exception_inside_names_the_metric_and_keeps_its_cause(videos: Tensor) -> None:
    def score(videos: Tensor) -> Tensor:
        raise ZeroDivisionError("by zero")

    with pytest.raises(MetricError, match=r"'broken' raised ZeroDivisionError on 4 video\(s\): by zero") as caught:
        Metric(name="broken", score=score)(videos)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_score_sees_contiguous_videos_without_a_graph(videos: Tensor) -> None:
    def score(videos: Tensor) -> Tensor:
        assert videos.is_contiguous() and not videos.requires_grad and not torch.is_grad_enabled()
        return videos.view(len(videos), -1).mean(dim=1)

    turned = videos.transpose(3, 4).requires_grad_()
    torch.testing.assert_close(Metric(name="mean", score=score)(turned), videos.flatten(1).mean(1))


@pytest.mark.parametrize(
    "fields", [{"name": ""}, {"version": ""}, {"value_range": (1, 0)}, {"minimum_frames": 0}, {"value_range": (0, 0)}]
)
def test_impossible_fields_are_refused(fields: dict) -> None:
    with pytest.raises(ConfigError):
        MetricInfo(**{"name": "probe", **fields})


class Weighted(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([scale]))

    def forward(self, videos: Tensor) -> Tensor:
        return videos.flatten(1).mean(dim=1) * self.weight


class Holder:
    def __init__(self, scale: float) -> None:
        self.network = Weighted(scale)

    def __call__(self, videos: Tensor) -> Tensor:
        return self.network(videos)


class Declared:
    def __init__(self, weights_hash: str) -> None:
        self.weights_hash = weights_hash

    def __call__(self, videos: Tensor) -> Tensor:
        return videos.flatten(1).mean(dim=1)


def test_the_fingerprint_follows_name_version_options_and_weights() -> None:
    base = {"name": "probe", "version": "1", "score": len, "options": {"size": 3, "path": Path("a")}}
    changed = [{"name": "other"}, {"version": "2"}, {"options": {"size": 4, "path": Path("a")}}, {"options": {}}]
    prints = [Metric(**{**base, **change}).fingerprint for change in [{}, *changed]]
    assert len(set(prints)) == 5
    assert prints[0] == Metric(**base).fingerprint
    assert prints[0].startswith("probe@1#")


@pytest.mark.parametrize("make", [Weighted, Holder, lambda scale: Declared(str(scale))])
def test_the_fingerprint_follows_weights_wherever_they_are(make: type) -> None:
    prints = [Metric(name="probe", score=make(scale)).fingerprint for scale in (1.0, 1.0, 2.0)]
    assert prints[0] == prints[1] != prints[2]


@dataclass
class Settings:
    size: int


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(3), torch.ones(3)),
        (np.zeros(3), np.ones(3)),
        (Weighted(1.0), Weighted(2.0)),
        (Settings(1), Settings(2)),
    ],
)
def test_options_that_are_not_json_are_told_apart(first: object, second: object) -> None:
    def fingerprint(option: object) -> str:
        return Metric(name="probe", score=len, options={"option": option}).fingerprint

    assert fingerprint(first) != fingerprint(second)


def test_an_option_without_stable_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="'probe'.*object has no stable text.*`fingerprint`"):
        Metric(name="probe", score=len, options={"option": object()})


def test_a_network_is_a_metric(videos: Tensor) -> None:
    torch.testing.assert_close(create_metric(Weighted(2.0))(videos), 2 * videos.flatten(1).mean(dim=1))


def test_a_missing_library_says_how_to_install_it() -> None:
    with pytest.raises(ImportError, match=r"pip install 'latent-rewards\[metrics\]'"):
        require("no_such_library_here")


def test_where_weights_lie_and_are_computed_with_is_not_in_the_fingerprint():
    def made(**options):
        return Metric(name="m", version="1", score=lambda videos: videos.mean((1, 2, 3, 4)), options=options)

    plain = made(weights="a.safetensors", device="cpu", size=3)
    elsewhere = made(weights="b/a.safetensors", device="cuda", frames_per_batch=2, batch_size=1, size=3)
    assert plain.fingerprint == elsewhere.fingerprint
    assert plain.fingerprint != made(weights="a.safetensors", device="cpu", size=4).fingerprint
