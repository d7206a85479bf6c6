"""Clips survive being written and read; frames are chosen and shrunk as asked; what is no video is named."""

import io
import struct
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.video import _upright, encode_mp4, prompt_of, read_lines, read_prompts, read_video


def decode(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def moving_square(frames: int = 9, size: int = 16) -> torch.Tensor:
    video = torch.zeros(frames, 3, size, size)
    for t in range(frames):
        video[t, :2, 4:8, t : t + 4] = 1
    return video


@pytest.mark.parametrize(("size", "scale", "expected"), [(16, 2, 32), (15, 1, 16), (15, 3, 46)])
def test_mp4_decodes_to_the_frames(size: int, scale: int, expected: int) -> None:
    video = moving_square(7, 15)[..., :size, :size] if size < 16 else moving_square(7)
    frames = decode(encode_mp4(video, fps=8, scale=scale))
    assert frames.shape == (7, expected, expected, 3)
    wanted = video.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).numpy() * 255
    error = np.abs(frames[:, : size * scale, : size * scale].astype(float) - wanted)
    assert error.mean() < 6
    assert np.median(error) < 3


def test_mp4_is_h264_yuv420p_at_the_frame_rate() -> None:
    with av.open(io.BytesIO(encode_mp4(moving_square(), fps=8))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 8.0
        assert float(stream.duration * stream.time_base) == pytest.approx(9 / 8)


@pytest.mark.parametrize("size", [(16, 32), (17, 33)])
def test_lossless_mp4_keeps_every_pixel_and_odd_sizes(size: tuple[int, int]) -> None:
    video = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(0))
    frames = decode(encode_mp4(video, fps=8, lossless=True))
    assert np.array_equal(frames, (255 * video).round().byte().permute(0, 2, 3, 1).numpy())


def test_mp4_clips_values_and_refuses_bad_input() -> None:
    assert decode(encode_mp4(torch.full((2, 3, 16, 16), 7.0))).min() > 250
    with pytest.raises(DataError, match="NaN"):
        encode_mp4(torch.full((2, 3, 16, 16), float("nan")))
    with pytest.raises(DataError, match="shape"):
        encode_mp4(torch.zeros(2, 1, 16, 16))
    with pytest.raises(DataError, match="fps=0"):
        encode_mp4(torch.zeros(2, 3, 16, 16), fps=0)
    with pytest.raises(DataError, match=r"scale=1\.5"):
        encode_mp4(torch.zeros(2, 3, 16, 16), scale=1.5)


def levels(count: int, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    """A clip whose frame t has the brightness t / 20."""
    return (torch.arange(count) / 20).view(-1, 1, 1, 1).expand(-1, 3, *size).contiguous()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_mp4(levels(17), fps=10))
    return path


@pytest.mark.parametrize(
    ("frames", "indices", "fps"),
    [
        ("all", range(17), 10.0),
        ("first:4", range(4), 10.0),
        ("first:99", range(17), 10.0),
        ("uniform:5", [0, 4, 8, 12, 16], 2.5),
        ("uniform:1", [0], 10.0),
        ("uniform:99", range(17), 10.0),
    ],
)
def test_frames_are_chosen_as_asked(file, frames, indices, fps):
    clip = read_video(file, frames=frames)
    assert clip.frames.shape == (len(indices), 3, 16, 16) and clip.frames.dtype == torch.float32
    assert clip.frames.mean(dim=(1, 2, 3)).tolist() == pytest.approx([i / 20 for i in indices], abs=0.02)
    assert clip.fps == pytest.approx(fps)


def test_the_shorter_side_is_shrunk_and_never_enlarged(tmp_path):
    path = tmp_path / "wide.mp4"
    path.write_bytes(encode_mp4(levels(3, (30, 62))))
    assert read_video(path, short_side=15).frames.shape == (3, 3, 15, 31)
    assert read_video(path, short_side=64).frames.shape == (3, 3, 30, 62)


def with_matrix(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An mp4 whose header says how its pictures are to be shown: (p, q) at (a p + c q, b p + d q)."""
    one = 1 << 16
    at = data.index(struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    return data[:at] + struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30) + data[at + 36 :]


# What the matrix of a phone held in each way does to a picture whose rows are (1, 2) and (3, 4).
SHOWN = {
    "0": ((1, 0, 0, 1), [[1, 2], [3, 4]], 0),
    "90 clockwise": ((0, 1, -1, 0), [[3, 1], [4, 2]], -90),
    "180": ((-1, 0, 0, -1), [[4, 3], [2, 1]], 180),
    "270 clockwise": ((0, -1, 1, 0), [[2, 4], [1, 3]], 90),
    "left and right swapped": ((-1, 0, 0, 1), [[2, 1], [4, 3]], None),
    "upside down": ((1, 0, 0, -1), [[3, 4], [1, 2]], None),
    "across the diagonal": ((0, 1, 1, 0), [[1, 3], [2, 4]], None),
}


@pytest.mark.parametrize(("matrix", "rows", "_"), SHOWN.values(), ids=SHOWN)
@pytest.mark.parametrize("short_side", [None, 16])
def test_pictures_are_turned_as_players_turn_them(tmp_path, matrix, rows, _, short_side):
    quarters = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(16, 0).repeat_interleave(32, 1) / 4
    data = encode_mp4(quarters.expand(3, 3, -1, -1), lossless=True)
    path = tmp_path / "phone.mp4"
    path.write_bytes(with_matrix(data, *matrix))
    frames = read_video(path, short_side=short_side).frames
    tall = matrix[0] == 0
    height, width = (64, 32) if tall else (32, 64)
    factor = 1 if short_side is None else 2
    assert frames.shape == (3, 3, height // factor, width // factor)
    shown = torch.tensor(rows).repeat_interleave(height // factor // 2, 0).repeat_interleave(width // factor // 2, 1)
    torch.testing.assert_close(frames, (shown / 4).expand_as(frames), atol=0.01, rtol=0)


@pytest.mark.parametrize(("matrix", "rows", "angle"), [shown for shown in SHOWN.values() if shown[2] is not None])
def test_pictures_are_turned_where_pyav_does_not_know_what_lies_beside_them(matrix, rows, angle):
    class Unknown:
        def get(self, key):
            raise ValueError("30 is not a valid Type")

    picture = torch.tensor([[1, 2], [3, 4]]).expand(3, 2, 2)
    turned = _upright(picture, SimpleNamespace(side_data=Unknown(), rotation=angle))
    assert turned[0].tolist() == rows


def test_a_file_that_breaks_off_gives_what_it_holds(tmp_path):
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mkv"
    whole.write_bytes(encode_mp4(torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))))
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = cut.read_bytes()
    cut.write_bytes(content[: int(len(content) * 0.6)])
    assert 5 < len(read_video(cut).frames) < 40


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 50])
def test_what_is_no_video_is_named(tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.mp4 cannot be read as a video"):
        read_video(path)
    with pytest.raises(DataError, match=r"missing\.mp4"):
        read_video(tmp_path / "missing.mp4")


def test_sound_without_pictures_is_no_video(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="no video stream"):
        read_video(path)


@pytest.mark.parametrize("frames", ["some", "first:0", "uniform:-1", "first", "uniform:x"])
def test_wrong_choices_are_refused(file, frames):
    with pytest.raises(ConfigError, match="'first:N' or 'uniform:N'"):
        read_video(file, frames=frames)
    with pytest.raises(ConfigError, match="short_side"):
        read_video(file, short_side=0)


def test_the_mark_that_some_editors_begin_a_file_with_is_no_part_of_a_prompt(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a.mp4\ta cat\n", encoding="utf-8-sig")
    assert read_prompts(str(path)) == {"a.mp4": "a cat"}
    path.write_text("a cat\n", encoding="utf-8-sig")
    assert read_lines(str(path)) == ["a cat"]
    assert prompt_of(tmp_path / "a.mp4", "a.mp4", {}) == "a cat"
