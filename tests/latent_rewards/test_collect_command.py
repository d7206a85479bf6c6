"""`latent-rewards collect`: stored policies and folders of videos, found by their kind, become datasets."""

import json
from importlib.metadata import EntryPoint

import pytest
import torch

from latent_rewards import collect_command
from latent_rewards.cli import main
from latent_rewards.dataset import RewardDataset
from latent_rewards.video import encode_mp4

LOADERS = '''
import torch
import toys_of_tests as toys

class Stored(toys.LinearPolicy):
    """A policy that brings its codec, the way a student does."""

    def __init__(self, path):
        super().__init__()
        self.exporter = type("Exporter", (), {"codec": toys.Codec()})()

def bare(path):
    return toys.LinearPolicy()

def codec(path):
    return toys.Codec()

def failing(path):
    raise FileNotFoundError("weights.safetensors")
'''


@pytest.fixture
def stored(toys, toy_folder, tmp_path, monkeypatch):
    """A folder of each kind, and the entry points that load them."""
    (toy_folder / "loaders_of_tests.py").write_text(LOADERS)
    kinds = {"policies": ["Stored", "bare", "failing"], "codecs": ["codec"]}
    points = {
        f"latent_rewards.{group}": [EntryPoint(n, f"loaders_of_tests:{n}", f"latent_rewards.{group}") for n in names]
        for group, names in kinds.items()
    }
    monkeypatch.setattr(collect_command, "entry_points", lambda group: points[group])
    for kind in ("Stored", "bare", "failing", "codec"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "latent_rewards.json").write_text(json.dumps({"kind": kind}))
    (tmp_path / "silent").mkdir()
    (tmp_path / "prompts.txt").write_text("a\n\nbb\nccc\n")
    (tmp_path / "clips").mkdir()
    for seed in (0, 1):
        video = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        (tmp_path / "clips" / f"{seed}.mp4").write_bytes(encode_mp4(video))
    return tmp_path


def run(stored, *arguments):
    return main(["collect", *(argument.format(root=stored) for argument in arguments)])


def test_a_policy_is_sampled_and_the_command_continues(stored, capsys):
    command = ["--policy", "{root}/Stored", "--prompts", "{root}/prompts.txt", "--metric", "quality.sharpness"]
    command += ["--metric", "compression.jpeg_size,quality=30", "-n", "7", "--batch-size", "2", "--num-steps", "2"]
    command += ["--seed", "3", "--cache", "{root}/cache", "--output", "{root}/rewards"]
    assert run(stored, *command) == 0
    printed = capsys.readouterr()
    assert "7 of 7 scored" in printed.out and "7 samples in" in printed.out and not printed.err
    dataset = RewardDataset.load(stored / "rewards")
    assert dataset.prompts == ["a", "bb", "ccc", "a", "bb", "ccc", "a"]
    assert dataset.reward_names == ("quality.sharpness", "compression.jpeg_size,quality=30")
    assert list((stored / "cache").rglob("*.json"))
    before = (stored / "rewards" / "complete" / "manifest.json").stat().st_mtime_ns
    assert run(stored, *command) == 0
    assert (stored / "rewards" / "complete" / "manifest.json").stat().st_mtime_ns == before
    assert run(stored, *[part.replace("3", "4") if part == "3" else part for part in command]) == 2
    assert "another seed: 3 there, 4 now" in capsys.readouterr().err


def test_videos_are_encoded_by_a_stored_codec_or_a_policys(stored, capsys):
    (stored / "clips" / "broken.mp4").write_bytes(b"no video")
    for kind in ("codec", "Stored"):
        command = ["--videos", "{root}/clips", "--codec", "{root}/" + kind, "--metric", "quality.sharpness"]
        with pytest.warns(UserWarning, match="1 of 3 samples"):
            assert run(stored, *command, "--output", "{root}/from-" + kind, "--frames", "first:2") == 1
        printed = capsys.readouterr()
        assert "quality.sharpness: mean" in printed.out and "2 of 2 scored" in printed.out
        assert "failed: sample 2: broken.mp4" in printed.err
    datasets = [RewardDataset.load(stored / name) for name in ("from-codec", "from-Stored")]
    assert datasets[0].latent_shape == (2, 2, 16, 16) and torch.equal(datasets[0].latents(), datasets[1].latents())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "{root}/none", "--prompts", "{root}/prompts.txt"], "none is no folder"),
        (["--policy", "{root}/Stored"], "--policy needs --prompts"),
        (["--policy", "{root}/Stored", "--prompts", "{root}/gone.txt"], "gone.txt cannot be read"),
        (["--policy", "{root}/silent", "--prompts", "{root}/prompts.txt"], "silent does not say what it holds"),
        (["--policy", "{root}/codec", "--prompts", "{root}/prompts.txt"], "Known: Stored, bare, failing. Loaders come"),
        (["--policy", "{root}/silent", "--kind", "Stord", "--prompts", "{root}/prompts.txt"], "Did you mean 'Stored'"),
        (["--policy", "{root}/bare", "--prompts", "{root}/prompts.txt"], "(a LinearPolicy) brings no codec"),
        (["--policy", "{root}/failing", "--prompts", "{root}/prompts.txt"], "failing: weights.safetensors"),
        (["--policy", "{root}/Stored", "--prompts", "{root}/prompts.txt", "-n", "0"], "num_samples must be at least 1"),
        (["--videos", "{root}/clips"], "--videos needs --codec"),
        (["--videos", "{root}/silent", "--codec", "{root}/codec"], "silent holds no video"),
    ],
)
def test_what_cannot_begin_says_why(stored, capsys, arguments, message):
    assert run(stored, *arguments, "--metric", "quality.sharpness", "--output", "{root}/rewards") == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("latent-rewards: ") and not printed.out
    assert not (stored / "rewards").exists()


def test_help_explains_and_one_source_is_needed(capsys):
    for arguments, part in [(["--help"], "continues a collection"), (["--metric", "m", "--output", "o"], "one of the")]:
        with pytest.raises(SystemExit):
            main(["collect", *arguments])
        printed = capsys.readouterr()
        assert part in printed.out + printed.err
