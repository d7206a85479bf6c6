"""Existing videos become a dataset: pixels scored as they are, latents from the codec, every bad file accounted for."""

import pytest
import torch

from latent_rewards.collect_videos import collect_videos
from latent_rewards.collection import GIVE_UP_AFTER
from latent_rewards.contracts import ConfigError, DataError, MetricError
from latent_rewards.dataset import RewardDataset
from latent_rewards.metrics import create_metric, register_metric, registry
from latent_rewards.oracle import MetricOracle
from latent_rewards.video import encode_mp4, find_videos, read_video


def clip(seed, count=5, height=16, width=16):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)).expand(count, -1, -1, -1)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    for seed, name in enumerate(["a.mp4", "b.mp4", "deep/c.mp4", "z.mp4"]):
        (folder / name).write_bytes(encode_mp4(clip(seed), fps=8))
    (folder / "a.txt").write_text("the first\n")
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "large.mp4").write_bytes(encode_mp4(clip(9, height=32), fps=8))
    (folder / "notes.md").write_text("not a video")
    return folder


def oracle(toys, metrics=("toys_of_tests:level", "quality.sharpness"), **settings):
    return MetricOracle(toys.Codec(), list(metrics), chunk_size=2, **settings)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pixels_are_scored_and_latents_encoded_and_bad_files_listed(toys, folder, tmp_path):
    settings = {"batch_size": 2, "progress": False, "output_dir": tmp_path / "rewards"}
    with pytest.warns(UserWarning, match="2 of 6 samples"):
        dataset = collect_videos(folder, oracle(toys), **settings)
    assert list(find_videos(folder)) == ["a.mp4", "b.mp4", "broken.mp4", "deep/c.mp4", "large.mp4", "z.mp4"]
    assert list(dataset.failures) == [2, 4] and len(dataset) == 4
    assert "broken.mp4" in dataset.failures[2] and "cannot be read as a video" in dataset.failures[2]
    assert "large.mp4" in dataset.failures[4] and "5 frames of 32 x 16" in dataset.failures[4]
    videos = torch.stack([read_video(folder / name).frames for name in ("a.mp4", "b.mp4", "deep/c.mp4", "z.mp4")])
    assert torch.equal(dataset.latents(), toys.Codec().encode(videos))
    assert torch.equal(dataset.rewards["toys_of_tests:level"], videos.flatten(1).mean(1))
    assert torch.equal(dataset.rewards["quality.sharpness"], create_metric("quality.sharpness")(videos))
    assert dataset.prompts == ["the first", "", "", ""] and dataset.latent_space == "toy-codec"
    assert RewardDataset.load(tmp_path / "rewards").failures == dataset.failures
    with pytest.raises(ConfigError, match="another frames: all there, first:3 now"):
        collect_videos(folder, oracle(toys), **settings, frames="first:3")


@pytest.fixture
def cluttered(folder):
    """Before the videos that can be used, more files than a collection tries that fails from its start."""
    for number in range(GIVE_UP_AFTER + 4):
        (folder / f"0{number:02d}.mp4").write_bytes(b"no video")
    return folder


@pytest.mark.parametrize("stored", [True, False])
def test_files_that_cannot_be_used_end_no_collection_however_many(toys, cluttered, tmp_path, stored):
    root = tmp_path / "rewards" if stored else None
    with pytest.warns(UserWarning, match=f"{GIVE_UP_AFTER + 6} of {GIVE_UP_AFTER + 10} samples"):
        dataset = collect_videos(cluttered, oracle(toys), batch_size=2, progress=False, output_dir=root)
    assert len(dataset) == 4 and list(dataset.failures)[: GIVE_UP_AFTER + 4] == list(range(GIVE_UP_AFTER + 4))
    for path in cluttered.glob("0*.mp4"):
        path.write_bytes(encode_mp4(clip(9, height=32), fps=8))
    levels = dict(zip(["a.mp4", "b.mp4"], dataset.rewards["toys_of_tests:level"].tolist(), strict=False))
    dark, bright = sorted(levels, key=levels.__getitem__)
    files = [cluttered / bright, *cluttered.glob("0*.mp4"), cluttered / dark]
    picky = create_metric("toys_of_tests:level", limit=sum(levels.values()) / 2)
    with pytest.warns(UserWarning, match=f"{GIVE_UP_AFTER + 5} of {GIVE_UP_AFTER + 6} samples"):
        assert len(collect_videos(files, MetricOracle(toys.Codec(), [picky]), batch_size=1, progress=False)) == 1


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_collection_ends_where_no_video_can_be_scored(toys, cluttered, batch_size):
    strict = MetricOracle(toys.Codec(), [create_metric("toys_of_tests:level", limit=0.0)])
    settings = {"batch_size": batch_size, "progress": False}
    with pytest.raises(MetricError, match=f"the first {GIVE_UP_AFTER + 10} samples failed; sample 20: .*too bright"):
        collect_videos(cluttered, strict, **settings)
    for number in range(GIVE_UP_AFTER):
        (cluttered / f"b{number:02d}.mp4").write_bytes((cluttered / "b.mp4").read_bytes())
    if batch_size == 1:  # and after as many as are tried, where more follow
        with pytest.raises(MetricError, match=f"the first {2 * GIVE_UP_AFTER + 4} samples failed; sample 20: "):
            collect_videos(cluttered, strict, **settings)


def test_hidden_files_of_a_folder_are_none_of_its_videos(tmp_path):
    for name in ("clip.mp4", "._clip.mp4", "deep/._other.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list(find_videos(tmp_path)) == ["clip.mp4"]
    assert list(find_videos([tmp_path / "._clip.mp4"])) == [str(tmp_path / "._clip.mp4")], "it was asked for"
    with pytest.raises(DataError, match="holds no video"):
        find_videos(tmp_path / "deep")


def test_it_continues_where_it_stopped_and_ends_the_same(toys, folder, tmp_path, monkeypatch):
    files = [folder / name for name in ("a.mp4", "b.mp4", "deep/c.mp4", "z.mp4")]
    settings = {"batch_size": 1, "progress": False}
    collect_videos(files, oracle(toys), output_dir=tmp_path / "whole", **settings)
    read = []

    def reading(file, **options):
        read.append(file.name)
        if len(read) == 4:
            raise KeyboardInterrupt
        return read_video(file, **options)

    monkeypatch.setattr("latent_rewards.collect_videos.read_video", reading)
    with pytest.raises(KeyboardInterrupt):
        collect_videos(files, oracle(toys), output_dir=tmp_path / "resumed", **settings)
    collect_videos(files, oracle(toys), output_dir=tmp_path / "resumed", **settings)
    assert read == ["a.mp4", "a.mp4", "b.mp4", "c.mp4", "a.mp4", "c.mp4", "z.mp4"]  # each time a.mp4 for the shape
    assert content(tmp_path / "resumed") == content(tmp_path / "whole")


def test_prompts_come_from_a_mapping_a_file_or_beside(toys, folder, tmp_path):
    asked = oracle(toys, ["toys_of_tests:words"])
    with pytest.warns(UserWarning, match="needs a prompt"):
        beside = collect_videos(folder, asked, progress=False)
    assert beside.prompts == ["the first"] and beside.rewards["toys_of_tests:words"].tolist() == [9.0]
    (tmp_path / "prompts.tsv").write_text("b.mp4\tbee\nz.mp4\tzed\n")
    for given in (tmp_path / "prompts.tsv", {"b.mp4": "bee", "z.mp4": "zed"}):
        with pytest.warns(UserWarning, match="3 of 6"):
            dataset = collect_videos(folder, asked, prompts=given, progress=False)
        assert dataset.prompts == ["the first", "bee", "zed"]


def test_prompts_that_name_no_video_are_told(toys, folder):
    files = [folder / "a.mp4"]
    with pytest.raises(DataError, match="1 of 1 prompts name no video, such as 'a'; a video here is named '.*a.mp4'"):
        collect_videos(files, oracle(toys), prompts={"a": "the first"}, progress=False)
    with pytest.warns(UserWarning, match="1 of 2 prompts name no video, such as 'b.mp4'"):
        known = collect_videos(files, oracle(toys), prompts={"b.mp4": "b", str(files[0]): "one"}, progress=False)
    assert known.prompts == ["one"]


def test_a_metric_of_another_frame_rate_does_not_score(toys, folder, monkeypatch):
    monkeypatch.setattr(registry, "_DEFINITIONS", dict(registry._DEFINITIONS))

    @register_metric("test.rate", version="1", needs_fps=True)
    def rate(videos, *, fps=24.0):
        return [float(fps)] * len(videos)

    with pytest.raises(
        MetricError, match="8 frames a second, and metric 'test.rate' was made for 24; make it with fps=8"
    ):
        collect_videos([folder / "a.mp4"], MetricOracle(toys.Codec(), [create_metric("test.rate")]), progress=False)
    made = MetricOracle(toys.Codec(), [create_metric("test.rate", fps=8.0)])
    assert collect_videos([folder / "a.mp4"], made, progress=False).rewards["test.rate"].tolist() == [8.0]


def test_what_cannot_begin_says_why(toys, folder, tmp_path):
    for videos, message in [
        (tmp_path / "none", "holds no video"),
        ([], "the list is empty"),
        ([folder / "a.mp4", folder / "gone.mp4"], "no files, such as .*gone.mp4"),
        ([folder / "a.mp4", folder / "a.mp4"], "named twice"),
        ([folder / "broken.mp4"], "none of the 1 videos can be read and encoded; .*broken.mp4"),
    ]:
        with pytest.raises(DataError, match=message):
            collect_videos(videos, oracle(toys), progress=False)
    for settings, message in [({"batch_size": 0}, "batch_size"), ({"frames": "last:2"}, "first:N")]:
        with pytest.raises(ConfigError, match=message):
            collect_videos(folder, oracle(toys), **settings)
    with pytest.raises(ConfigError, match="short_side must be at least 1"):
        collect_videos(folder, oracle(toys), short_side=0, progress=False)
