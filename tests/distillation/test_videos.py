import struct

import pytest
import torch

from distillation.videos import VideoError, find_videos, read_clip, write_mp4


@pytest.fixture
def grey_ramp(tmp_path):
    """Eight frames of 32 x 48, each of one grey: k / 8."""
    video = (torch.arange(8) / 8).view(8, 1, 1, 1).expand(8, 3, 32, 48)
    write_mp4(tmp_path / "ramp.mp4", video, fps=8)
    return tmp_path / "ramp.mp4"


def greys(clip):
    return (clip.mean(dim=(1, 2, 3)) * 8).round().long().tolist()


@pytest.mark.parametrize(
    ("fps", "count", "expected"),
    [
        (None, 5, [0, 1, 2, 3, 4]),
        (8, 5, [0, 1, 2, 3, 4]),
        (4, 3, [0, 2, 4]),
        (16, 5, [0, 0, 1, 2, 2]),
    ],
)
def test_frames_are_taken_at_the_rate_asked_for(grey_ramp, fps, count, expected):
    clip = read_clip(grey_ramp, count, 16, 16, fps=fps)
    assert clip.shape == (count, 3, 16, 16) and greys(clip) == expected


def test_a_frame_is_scaled_to_cover_and_cropped_at_the_centre(tmp_path):
    video = torch.zeros(1, 3, 32, 64)
    video[..., 16:48] = 1  # the middle half
    write_mp4(tmp_path / "a.mp4", video)
    clip = read_clip(tmp_path / "a.mp4", 1, 16, 16)
    assert clip[..., 1:-1].min() > 0.9 and clip.min() > 0.8  # the filter reaches a little over the edge
    wide = read_clip(tmp_path / "a.mp4", 1, 16, 32)
    assert wide[..., 10:22].min() > 0.9 and wide[..., :6].max() < 0.1


@pytest.mark.parametrize(
    ("turn", "matrix", "band"),
    [
        (0, (1, 0, 0, 1), "left"),
        (90, (0, 1, -1, 0), "top"),
        (180, (-1, 0, 0, -1), "right"),
        (270, (0, -1, 1, 0), "bottom"),
    ],
)
def test_a_clip_is_turned_as_its_file_says(tmp_path, turn, matrix, band):
    video = torch.zeros(3, 3, 32, 64)
    video[..., :16] = 1  # the left quarter of what is stored
    write_mp4(tmp_path / "a.mp4", video)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    start = content.index(b"tkhd") + 44  # (x, y) is shown at (a x + c y, b x + d y), y downwards: b = 1 is clockwise
    a, b, c, d = (value << 16 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    clip = read_clip(tmp_path / "a.mp4", 3, *((64, 32) if turn % 180 else (32, 64)))
    sides = {"left": clip[..., 1:15], "top": clip[:, :, 1:15], "right": clip[..., -15:-1], "bottom": clip[:, :, -15:-1]}
    assert sides[band].min() > 0.9 and clip.mean() == pytest.approx(0.25, abs=0.02)


def test_too_few_frames_and_no_video_are_refused(grey_ramp, tmp_path):
    with pytest.raises(VideoError, match="gives 8 frames, and 9 are needed"):
        read_clip(grey_ramp, 9, 16, 16)
    with pytest.raises(VideoError, match="gives 4 frames at 4 a second, and 5 are needed"):
        read_clip(grey_ramp, 5, 16, 16, fps=4)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(VideoError, match="cannot be read as a video"):
        read_clip(tmp_path / "text.mp4", 1, 16, 16)


@pytest.mark.parametrize(
    ("video", "fps", "message"),
    [
        (torch.zeros(2, 3, 15, 16), 8, "even sides"),
        (torch.zeros(3, 16, 16), 8, "a clip is"),
        (torch.full((1, 3, 16, 16), float("nan")), 8, "NaN"),
        (torch.zeros(1, 3, 16, 16), 0, "fps must be positive"),
    ],
)
def test_what_is_no_clip_is_not_written(tmp_path, video, fps, message):
    with pytest.raises(VideoError, match=message):
        write_mp4(tmp_path / "a.mp4", video, fps=fps)
    assert not list(tmp_path.iterdir())


def test_videos_are_found_below_and_sorted(tmp_path):
    for name in ("b/2.MP4", "a.webm", "b/1.mp4", "c.txt", "b/._1.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(find_videos(tmp_path)) == ["a.webm", "b/1.mp4", "b/2.MP4"]
    with pytest.raises(VideoError, match="holds no video"):
        find_videos(tmp_path / "nowhere")
