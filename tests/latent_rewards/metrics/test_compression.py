"""Sizes agree with other encoders' output, order clips as expected, and repeat."""

import io

import av
import pytest
import torch
from PIL import Image
from torch import Tensor

from latent_rewards.contracts import ConfigError
from latent_rewards.metrics import create_metric
from latent_rewards.metrics.checks import moving_textures


def test_jpeg_size_is_what_a_file_would_take(textures: Tensor) -> None:
    metric = create_metric("compression.jpeg_size", quality=80)
    frame = textures[0, 0]
    file = io.BytesIO()
    Image.fromarray((255 * frame).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=80)
    assert metric(frame[None, None]).item() == pytest.approx(file.getbuffer().nbytes / 32**2, rel=0.03)
    assert (metric(textures) > create_metric("compression.jpeg_size", quality=20)(textures)).all()


@pytest.mark.parametrize("name", ["compression.jpeg_size", "compression.h264_size"])
def test_blank_is_smallest_and_noise_largest(name: str, textures: Tensor, cheats: dict[str, Tensor]) -> None:
    metric = create_metric(name)
    grey, real, noise = metric(cheats["grey"]), metric(textures), metric(cheats["noise"])
    assert (grey < real).all() and (real < noise).all()
    assert not metric.higher_is_better


def test_h264_exploits_repetition_and_repeats_its_sizes(textures: Tensor, cheats: dict[str, Tensor]) -> None:
    metric = create_metric("compression.h264_size")
    still = cheats["still"]
    assert (9 * metric(still) < 3 * metric(still[:, :1])).all()
    # With x264's look-ahead this very clip changes its size in about one run of ten.
    clip = moving_textures(1)
    assert len({metric(clip).item() for _ in range(100)}) == 1
    first = metric(textures)
    assert (create_metric("compression.h264_size", crf=40)(textures) < first).all()


@pytest.mark.parametrize("height", [32, 31])
def test_h264_size_is_that_of_the_stream_in_a_file(textures: Tensor, height: int) -> None:
    video = textures[:1, :, :, :height]
    file = io.BytesIO()
    with av.open(file, "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "30", "tune": "zerolatency"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = 32, 32, "yuv420p", 1
        pixels = (255 * video[0]).round().byte().permute(0, 2, 3, 1)
        for frame in torch.cat([pixels, pixels[:, -1:]], dim=1)[:, :32].contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    expected = file.getbuffer().nbytes / (video.shape[1] * height * 32)
    assert create_metric("compression.h264_size", crf=30)(video).item() == pytest.approx(expected, rel=1e-6)


def test_impossible_requests_are_refused() -> None:
    for quality in (0, 101, 7.5):
        with pytest.raises(ConfigError, match="1 to 100"):
            create_metric("compression.jpeg_size", quality=quality)
    with pytest.raises(ConfigError, match="0 to 51; got 52"):
        create_metric("compression.h264_size", crf=52)
