"""Flow is accurate to 15 % on small frames, and the metrics built on it tell moving, still and jerky clips apart."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.metrics import create_metric, dis_flow


def blob(
    speed: float, *, frames: int = 7, height: int = 32, width: int = 32, path: list[float] | None = None
) -> Tensor:
    """A textured blob ``[T, 3, H, W]`` on black, that moves right by ``speed`` pixels per frame."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    unit = min(height, width) / 32
    steps = path or [speed * t for t in range(frames)]
    start = width / 2 - steps[-1] / 2
    drawn = []
    for step in steps:
        across, down = (x - start - step) / unit, (y - height / 2) / unit
        envelope = torch.exp(-(across**2 + down**2) / 32)
        drawn.append(envelope * (0.6 + 0.4 * torch.cos(across) * torch.cos(1.1 * down)))
    return torch.stack(drawn)[:, None].repeat(1, 3, 1, 1)


def texture(speed: float, *, frames: int = 7, size: int = 32) -> Tensor:
    """A texture ``[T, 3, H, W]`` that fills the frame and moves down by ``speed`` pixels per frame."""
    source = torch.Generator().manual_seed(1)
    waves = 1.8 * torch.rand(12, 2, generator=source) - 0.9
    phases = 2 * math.pi * torch.rand(12, generator=source)
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    drawn = [
        sum(torch.cos(u * x + v * (y - speed * t) + p) for (u, v), p in zip(waves, phases, strict=True))
        for t in range(frames)
    ]
    return (0.5 + torch.stack(drawn)[:, None] / 24).clamp(0, 1).repeat(1, 3, 1, 1)


@pytest.mark.parametrize("speed", [0.4, 1.0, 3.0])
def test_flow_of_small_frames_is_accurate(speed: float) -> None:
    moving = blob(speed)
    flow = dis_flow(moving)
    assert flow.shape == (6, 32, 32, 2) and flow.dtype == np.float32
    inside = moving[:-1, 0].numpy() > 0.3
    assert np.median(flow[..., 0][inside]) == pytest.approx(speed, rel=0.15)
    assert abs(np.median(flow[..., 1][inside])) < 0.15 * speed
    filled = dis_flow(texture(speed))[:, 4:-4, 4:-4]
    assert np.median(filled[..., 1]) == pytest.approx(speed, rel=0.15)
    assert abs(np.median(filled[..., 0])) < 0.15 * speed


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 48), (80, 64), (160, 144)])
def test_flow_keeps_its_scale_in_other_sizes(height: int, width: int) -> None:
    moving = blob(1.0, frames=3, height=height, width=width)
    flow = dis_flow(moving)
    assert flow.shape == (2, height, width, 2)
    assert np.median(flow[..., 0][moving[:-1, 0].numpy() > 0.3]) == pytest.approx(1.0, rel=0.15)


def test_flow_of_one_frame_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2 frames"):
        dis_flow(torch.zeros(1, 3, 32, 32))


def test_flow_leaves_opencv_as_it_was() -> None:
    cv2 = pytest.importorskip("cv2")
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        dis_flow(blob(1.0, frames=2))
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)


def test_dynamic_degree_is_a_threshold_of_three_quarters_of_a_pixel_at_32() -> None:
    # 6 * 32 / 256 = 0.75 pixels per frame.
    clips = torch.stack([texture(speed, frames=17) for speed in (0.0, 0.4, 0.6, 0.9, 2.0)])
    assert create_metric("motion.dynamic_degree")(clips).tolist() == [0, 0, 0, 1, 1]


def test_dynamic_degree_counts_pairs() -> None:
    # 17 frames need round(4.25) = 4 moving pairs.
    three, four = ([min(t, steps) * 1.5 for t in range(17)] for steps in (3, 4))
    clips = torch.stack([blob(0, path=three), blob(0, path=four)])
    assert create_metric("motion.dynamic_degree")(clips).tolist() == [0, 1]


def test_dynamic_degree_samples_eight_frames_per_second() -> None:
    # 0.4 pixels per frame are 1.2 per sampled frame at 24 frames per second.
    clip = texture(0.4, frames=17)[None]
    assert create_metric("motion.dynamic_degree", fps=24)(clip).item() == 1
    assert create_metric("motion.dynamic_degree", fps=8)(clip).item() == 0
    assert create_metric("motion.dynamic_degree", fps=240)(clip[:, :2]).item() == 0
    with pytest.raises(ConfigError, match="fps must be positive; got 0"):
        create_metric("motion.dynamic_degree", fps=0)


def test_two_still_frames_do_not_move() -> None:
    assert create_metric("motion.dynamic_degree")(torch.full((1, 2, 3, 32, 32), 0.5)).item() == 0


def test_smoothness_by_hand_for_a_brightening_clip() -> None:
    levels = torch.tensor([0.0, 0.3, 0.2, 0.3])
    clip = levels[None, :, None, None, None].expand(1, 4, 3, 32, 32)
    # The only dropped frame with two neighbours is the first 0.3; between 0 and 0.2 lies 0.1.
    assert create_metric("motion.smoothness", interpolation="average")(clip).item() == pytest.approx(0.8, abs=1e-6)
    with pytest.raises(ConfigError, match="'flow' or 'average'; got 'amt'"):
        create_metric("motion.smoothness", interpolation="amt")


def test_flow_sees_that_uniform_motion_is_smooth_and_jerks_are_not() -> None:
    uniform = blob(1.0, frames=9)[None]
    jerky = blob(0, path=[0, 0, 2, 2, 4, 4, 6, 6, 8])[None]
    smoothness = create_metric("motion.smoothness")
    assert smoothness(uniform).item() > 0.997
    assert 1 - smoothness(jerky).item() > 5 * (1 - smoothness(uniform).item())
    averaged = create_metric("motion.smoothness", interpolation="average")
    assert 1 - averaged(uniform).item() > 2 * (1 - smoothness(uniform).item())


def test_what_cheating_clips_score(cheats: dict[str, Tensor]) -> None:
    degree, smoothness = create_metric("motion.dynamic_degree"), create_metric("motion.smoothness")
    for kind in ("still", "grey"):
        assert (degree(cheats[kind]) == 0).all()
        assert (smoothness(cheats[kind]) > 0.9999).all()
    assert (degree(cheats["noise"]) == 1).all()
    assert (smoothness(cheats["noise"]) < 0.8).all()


def test_one_channel_is_enough() -> None:
    clip = blob(1.0, frames=5)[None]
    for name in ("motion.dynamic_degree", "motion.smoothness"):
        torch.testing.assert_close(create_metric(name)(clip[:, :, :1]), create_metric(name)(clip), atol=1e-3, rtol=0)


def test_faint_noise_on_a_flat_background_is_not_motion():
    video = torch.zeros(1, 17, 3, 32, 32)
    video[..., 8:24, 12:20] = 0.9
    noisy = (video + 0.01 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert float(create_metric("motion.dynamic_degree")(noisy)) == 0.0


def test_flow_direction_is_a_cosine_with_rows_counted_downwards() -> None:
    right, down = blob(1.0)[None], texture(1.0)[None]
    wanted = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), 45.0: (0.5**0.5, -(0.5**0.5))}
    for direction, (across, along) in wanted.items():
        metric = create_metric("motion.flow_direction", direction=direction)
        assert float(metric(right)) == pytest.approx(across, abs=0.1)
        assert float(metric(down)) == pytest.approx(along, abs=0.1)
    assert float(create_metric("motion.flow_direction")(right[:, :1].repeat(1, 5, 1, 1, 1))) == 0.0
    assert float(create_metric("motion.flow_direction")(torch.full((1, 4, 3, 32, 32), 0.5))) == 0.0
    with pytest.raises(ConfigError, match="'rihgt'.*right"):
        create_metric("motion.flow_direction", direction="rihgt")
    with pytest.raises(ConfigError, match="still"):
        create_metric("motion.flow_direction", still=-1.0)


def test_warping_error_forgives_motion_and_punishes_change() -> None:
    metric = create_metric("motion.warping_error")
    moving, still = texture(1.0)[None], texture(0.0)[None]
    flickering = still * torch.tensor([1.0, 0.6] * 3 + [1.0]).view(1, 7, 1, 1, 1)
    noisy = (still + 0.1 * torch.randn(still.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert float(metric(still)) == 0.0
    plain = float(moving.diff(dim=1).square().mean())
    assert float(metric(moving)) < 0.1 * plain
    assert float(metric(flickering)) == pytest.approx(float(flickering.diff(dim=1).square().mean()), rel=0.2)
    assert float(metric(noisy)) > 0.005 > 10 * float(metric(moving))


def test_warping_error_of_a_clip_that_nothing_connects_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from latent_rewards.metrics import motion

    monkeypatch.setattr(motion, "dis_flow", lambda video: np.full((len(video) - 1, 32, 32, 2), 1e3, dtype=np.float32))
    assert math.isnan(float(create_metric("motion.warping_error")(texture(1.0)[None])))


def test_warping_error_leaves_out_where_the_flows_there_and_back_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    from latent_rewards.metrics import motion

    there, back = np.zeros((2, 1, 32, 32, 2), dtype=np.float32)
    back[:, :, :16] = 3.0
    clip = torch.full((1, 2, 3, 32, 32), 0.5)
    clip[:, 1, ..., :16] = 1.0
    flows = iter([there, back, there, there])
    monkeypatch.setattr(motion, "dis_flow", lambda video: next(flows))
    assert float(motion.warping_error(clip)) == 0.0
    assert float(motion.warping_error(clip)) == pytest.approx(0.5 * 0.25)
