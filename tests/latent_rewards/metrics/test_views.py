"""Every metric can be shown fewer frames, at another size, in portions, elsewhere; malformed wishes are refused."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, DataError, MetricOutputError
from latent_rewards.metrics import Metric, create_metric, isolate, register_metric
from latent_rewards.metrics.views import View


def brightness(videos: Tensor) -> Tensor:
    return videos.flatten(1).mean(dim=1)


@dataclass
class Seen:
    """Remembers the shapes it was given."""

    def __post_init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, videos: Tensor) -> Tensor:
        self.shapes.append(tuple(videos.shape))
        return brightness(videos)


def levels(count: int) -> Tensor:
    return (torch.arange(count) / 100).view(1, -1, 1, 1, 1).expand(1, -1, 3, 4, 4)


@pytest.mark.parametrize(
    ("frames", "kept"),
    [("uniform:3", [0, 4, 8]), ("first:2", [0, 1]), ("uniform:99", range(9)), ("first:99", range(9))],
)
def test_frames_are_chosen_as_in_files(frames: str, kept: list[int]) -> None:
    expected = sum(kept) / len(kept) / 100
    assert create_metric(brightness, frames=frames)(levels(9)).item() == pytest.approx(expected, abs=1e-6)
    video = levels(9)[0]
    assert View(frames=frames).of(video[None])[0].shape[0] == len(kept)


@pytest.mark.parametrize(
    ("resize", "shape"), [((6, 10), (6, 10)), ([6, 10], (6, 10)), (4, (4, 8)), (16, (16, 32)), (8, (8, 16))]
)
def test_frames_are_resized(resize: object, shape: tuple[int, int]) -> None:
    register_metric("test.seen", version="1")(Seen)
    metric = create_metric("test.seen", resize=resize)
    videos = torch.rand(2, 3, 1, 8, 16, generator=torch.Generator().manual_seed(0))
    metric(videos)
    assert metric.score.score.shapes == [(2, 3, 1, *shape)]
    constant = torch.full((1, 2, 3, 8, 16), 0.37)
    torch.testing.assert_close(View(resize=resize).of(constant), torch.full((1, 2, 3, *shape), 0.37))


def test_resizing_averages_and_stays_in_range() -> None:
    board = torch.tensor([[(x + y) % 2 for x in range(9)] for y in range(9)], dtype=torch.float32).expand(1, 1, 3, 9, 9)
    small, large = View(resize=3).of(board), View(resize=13).of(board)
    assert (small - 0.5).abs().max() < 0.05  # without antialiasing it would be pixels of the board
    assert large.min() >= 0 and large.max() <= 1


def test_portions_bound_a_call_and_change_no_value(videos: Tensor) -> None:
    register_metric("test.seen", version="1")(Seen)
    metric = create_metric("test.seen", batch_size=3)
    assert torch.equal(metric(videos), brightness(videos))
    assert [shape[0] for shape in metric.score.score.shapes] == [3, 1]
    assert metric.fingerprint == create_metric("test.seen").fingerprint

    def length(videos: Tensor, *, prompts: list[str]) -> list[float]:
        return [float(len(prompt)) for prompt in prompts]

    assert create_metric(length, batch_size=2)(videos, ["a", "bb", "ccc", "dddd"]).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_wrong_answer_for_a_portion_is_an_error(videos: Tensor) -> None:
    with pytest.raises(MetricOutputError, match=r"shape \(1,\); expected 2"):
        create_metric(lambda videos: torch.zeros(1), batch_size=2)(videos)


def test_what_is_shown_is_in_the_options_and_the_fingerprint_unless_it_is_everything() -> None:
    plain = create_metric("quality.exposure")
    assert create_metric("quality.exposure", frames="all", resize=None, batch_size=None).options == plain.options
    prints = {plain.fingerprint}
    for options in ({"frames": "first:2"}, {"frames": "uniform:2"}, {"resize": 8}, {"resize": (8, 8)}):
        metric = create_metric("quality.exposure", **options)
        assert options.keys() <= metric.options.keys()
        prints.add(metric.fingerprint)
    assert len(prints) == 5
    assert create_metric("quality.exposure", batch_size=2, device="cpu").fingerprint == plain.fingerprint


def test_a_gradient_passes_through(videos: Tensor) -> None:
    leaf = videos.clone().requires_grad_()
    create_metric("quality.exposure", frames="first:2", resize=4, batch_size=3).score(leaf).sum().backward()
    assert leaf.grad[:, :2].abs().sum() > 0 and leaf.grad[:, 2:].abs().sum() == 0


def test_videos_and_a_network_that_the_metric_makes_are_moved(videos: Tensor) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, videos: Tensor) -> Tensor:
            assert videos.device == self.weight.device == torch.device("meta")
            return torch.ones(len(videos), device="cpu")

    register_metric("test.network", version="1")(Network)
    assert create_metric("test.network", device="meta")(videos).tolist() == [1.0] * 4


def test_a_metrics_own_option_is_its_own(videos: Tensor) -> None:
    register_metric("test.own", version="1")(lambda videos, *, frames=3, device="x": [float(frames)] * len(videos))
    metric = create_metric("test.own", frames=5, device="y", resize=4)
    assert metric(videos).tolist() == [5.0] * 4
    assert metric.options == {"frames": 5, "device": "y", "resize": 4}


def test_a_view_reaches_an_isolated_metric(videos: Tensor) -> None:
    options = {"frames": "uniform:3", "resize": [4, 6]}
    with isolate("quality.exposure", timeout=20.0, **options) as isolated:
        here = create_metric("quality.exposure", **options)
        assert torch.equal(isolated(videos), here(videos))
        assert (isolated.options, isolated.fingerprint) == (here.options, here.fingerprint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": "last:3"}, "frames must be 'all', 'first:N'"),
        ({"frames": 8}, "frames must be 'all', 'first:N'"),
        ({"frames": "uniform:0"}, "N from 1"),
        ({"resize": 0}, "resize must be"),
        ({"resize": (8,)}, "resize must be"),
        ({"resize": (8, 0)}, "resize must be"),
        ({"resize": "64"}, "resize must be"),
        ({"resize": 8.5}, "resize must be"),
        ({"resize": True}, "resize must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": 2.0}, "batch_size must be"),
        ({"device": "gpu"}, "device 'gpu' is not one that torch finds here"),
        ({"resiz": 8}, "'resiz'.*'resize'"),
    ],
)
def test_malformed_wishes_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_metric("quality.sharpness", **options)


def test_what_a_metric_cannot_be_shown_is_refused_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match="needs at least 3 frames; frames='uniform:2' keeps 2"):
        create_metric("motion.smoothness", frames="uniform:2")
    with pytest.raises(DataError, match="at least 3 frames; got 2"):
        create_metric("motion.smoothness", frames="uniform:3")(torch.zeros(1, 2, 3, 16, 16))
    register_metric("test.relative", version="1", batch_invariant=False)(brightness)
    with pytest.raises(ConfigError, match="'test.relative' scores a batch as a whole, so batch_size=2"):
        create_metric("test.relative", batch_size=2)
    register_metric("test.elsewhere", version="1")(lambda: Metric(name="made", score=brightness))
    assert create_metric("test.elsewhere").name == "made"
    with pytest.raises(ConfigError, match="'test.elsewhere' is made elsewhere; it does not take resize"):
        create_metric("test.elsewhere", resize=8)


def test_the_frame_rate_of_chosen_frames_must_be_given() -> None:
    with pytest.raises(ConfigError, match="depends on the frame rate, which frames='uniform:8' changes: give fps"):
        create_metric("motion.dynamic_degree", frames="uniform:8")
    assert create_metric("motion.dynamic_degree", frames="uniform:8", fps=2.0).options["fps"] == 2.0
    assert create_metric("motion.dynamic_degree", frames="first:8").options["frames"] == "first:8"
