"""`latent-distill encode`: real videos and prompts become a cache, every file accounted for, and a run reads it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import distillation as ds
from distillation.cached import CachedText, CacheError, load_cache, load_clips, read_cache_settings, text_fingerprint
from distillation.cli import main
from distillation.families import SIDECAR
from distillation.families.codec import VideoCodec
from distillation.families.wan import WanCodec, WanText
from distillation.videos import read_clip, write_mp4
from latent_rewards.training.checkpoint import CheckpointError, commit_directory
from latent_rewards.training.loop import NonFiniteError

SIZE = {"num_frames": 5, "height": 16, "width": 16}
FLAGS = ["--num-frames", "5", "--height", "16", "--width", "16", "--device", "cpu"]
PROMPTS = ["a digit moves left", "two digits rest", "a digit moves left", "a digit rest"]

# Dies as the kernel kills it, with the first shard of videos whole and the second not begun.
KILLED = """
import os, signal, sys
from distillation import cached
save = cached.save_clips
def then_die(folder, *content):
    save(folder, *content)
    os.kill(os.getpid(), signal.SIGKILL)
cached.save_clips = then_die
from distillation.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def clips(tmp_path):
    """Four videos with captions, of another size than the teacher takes."""
    folder = tmp_path / "clips"
    generator = torch.Generator().manual_seed(0)
    for index, prompt in enumerate(PROMPTS):
        coarse = torch.rand(6, 3, 3, 4, generator=generator)
        video = torch.nn.functional.interpolate(coarse, (24, 32), mode="bilinear")
        write_mp4(folder / "deep" / f"{index}.mp4", video, fps=8)
        (folder / "deep" / f"{index}.txt").write_text(prompt + "\n")
    return folder


def encode(wan_pipeline, *arguments):
    return main(["encode", str(wan_pipeline), *map(str, arguments), *FLAGS])


def test_videos_become_latents_and_prompts_embeddings(wan_pipeline, tiny_teacher, clips, tmp_path, capsys):
    assert (
        encode(wan_pipeline, "--videos", clips, "--output", tmp_path / "c", "--shard-size", 3, "--batch-size", 2) == 0
    )
    assert "4 of 4 videos and 4 distinct texts" in capsys.readouterr().out
    data = load_cache(tmp_path / "c")
    videos = torch.stack([read_clip(clips / "deep" / f"{index}.mp4", 5, 16, 16) for index in range(4)])
    torch.testing.assert_close(data.latents[:], tiny_teacher.codec.encode(videos), rtol=1e-5, atol=1e-5)
    if sys.platform == "linux":
        assert str(tmp_path / "c" / "clips-00000") in Path("/proc/self/maps").read_text(), "the latents stay on disk"
    assert data.prompts == PROMPTS and data.source[0] is data.latents and data.source[1] is data.prompts
    looked_up, encoded = data.encode(["", "two digits rest"]), tiny_teacher.encode(["", "two digits rest"])
    torch.testing.assert_close(looked_up.embeddings, encoded.embeddings, rtol=1e-5, atol=1e-6)
    assert looked_up.extra.keys() == encoded.extra.keys()
    with pytest.raises(CacheError, match="does not hold the prompt 'a fish'"):
        data.encode(["a fish"])


def test_what_cannot_be_read_is_accounted_for_and_tried_again(wan_pipeline, clips, tmp_path, capsys):
    (clips / "junk.mp4").write_bytes(b"no video at all")
    (clips / "junk.txt").write_text("two digits rest")
    write_mp4(clips / "short.mp4", torch.zeros(3, 3, 16, 16))
    (clips / "short.txt").write_text("a digit rest")
    write_mp4(clips / "unnamed.mp4", torch.zeros(5, 3, 16, 16))
    arguments = ("--videos", clips, "--output", tmp_path / "c", "--shard-size", 4)
    assert encode(wan_pipeline, *arguments) == 1
    told = capsys.readouterr()
    assert told.err.count("failed: ") == 3 and "4 of 7 videos" in told.out
    for why in ("junk.mp4: ", "gives 3 frames, and 5 are needed", "no unnamed.txt beside it"):
        assert why in told.err
    failures = load_cache(tmp_path / "c").failures
    assert set(failures) == {"junk.mp4", "short.mp4", "unnamed.mp4"} and len(load_cache(tmp_path / "c").prompts) == 4
    first = (tmp_path / "c" / "clips-00000" / "manifest.json").stat().st_mtime_ns
    (clips / "unnamed.txt").write_text("right digits")
    write_mp4(clips / "junk.mp4", torch.ones(5, 3, 16, 16))
    assert encode(wan_pipeline, *arguments) == 1
    mended = load_cache(tmp_path / "c")
    assert set(mended.failures) == {"short.mp4"} and mended.prompts[-2:] == ["two digits rest", "right digits"]
    assert len(mended.encode(["right digits"])) == 1
    assert (tmp_path / "c" / "clips-00000" / "manifest.json").stat().st_mtime_ns == first


def test_a_video_that_was_replaced_is_encoded_anew(wan_pipeline, clips, tmp_path):
    arguments = ("--videos", clips, "--output", tmp_path / "c", "--shard-size", 4)
    assert encode(wan_pipeline, *arguments) == 0
    shard = tmp_path / "c" / "clips-00000"
    before, _ = load_clips(shard)
    chosen = sorted(before)[1]
    size = (clips / chosen).stat().st_size
    write_mp4(clips / chosen, torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(7)))
    assert (clips / chosen).stat().st_size != size
    assert encode(wan_pipeline, *arguments) == 0
    after, _ = load_clips(shard)
    same = {name: torch.equal(clip.latents, before[name].latents) for name, clip in after.items()}
    assert same == {name: name != chosen for name in before}


def test_a_cache_that_kept_no_sizes_is_left_as_it_is(wan_pipeline, clips, tmp_path):
    arguments = ("--videos", clips, "--output", tmp_path / "c", "--shard-size", 4)
    assert encode(wan_pipeline, *arguments) == 0
    shard = tmp_path / "c" / "clips-00000"
    facts = json.loads((shard / "facts.json").read_text())
    with commit_directory(shard) as old:
        shutil.copy(shard / "tensors.safetensors", old)
        rows = [{"video": row["video"], "prompt": row["prompt"]} for row in facts["rows"]]
        (old / "facts.json").write_text(json.dumps({**facts, "rows": rows}))
    begun = (shard / "manifest.json").stat().st_mtime_ns
    assert encode(wan_pipeline, *arguments) == 0
    assert (shard / "manifest.json").stat().st_mtime_ns == begun


def test_killed_it_goes_on_to_the_same_cache(wan_pipeline, clips, tmp_path):
    arguments = ["--videos", str(clips), "--shard-size", "2", *FLAGS]
    command = [
        sys.executable,
        "-c",
        KILLED,
        "encode",
        str(wan_pipeline),
        *arguments,
        "--output",
        str(tmp_path / "killed"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert died.returncode == -signal.SIGKILL, died.stderr
    killed = tmp_path / "killed"
    assert (killed / "clips-00000").is_dir() and not (killed / "clips-00001").exists()
    with pytest.raises(CacheError, match="is not finished"):
        load_cache(killed)
    first = (killed / "clips-00000" / "manifest.json").stat().st_mtime_ns
    assert main(["encode", str(wan_pipeline), *arguments, "--output", str(killed)]) == 0
    assert main(["encode", str(wan_pipeline), *arguments, "--output", str(tmp_path / "whole")]) == 0
    assert (killed / "clips-00000" / "manifest.json").stat().st_mtime_ns == first
    ours, theirs = load_cache(killed), load_cache(tmp_path / "whole")
    assert torch.equal(ours.latents[:], theirs.latents[:]) and ours.prompts == theirs.prompts


def test_a_run_on_a_cache_loads_no_text_encoder_and_checks_the_codec(
    wan_pipeline, clips, tmp_path, monkeypatch, capsys
):
    assert encode(wan_pipeline, "--videos", clips, "--output", tmp_path / "c", "--dtype", "bfloat16") == 0
    assert load_cache(tmp_path / "c").latents.dtype == torch.bfloat16
    steps = {"vsd_steps": 1, "cd_steps": 1, "batch_size": 2, "fake_updates": 1, "progress": False}
    content = {
        "teacher": {"path": str(wan_pipeline), "device": "cpu"},  # the cache says how large a video is
        "data": {"cache": str(tmp_path / "c")},
        "distillation": {**steps, "output_dir": str(tmp_path / "run")},
    }
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(content))
    with monkeypatch.context() as patch:
        patch.setattr(WanText, "__call__", lambda *a: pytest.fail("a prompt was encoded"))
        patch.setattr(CachedText, "__call__", lambda *a: pytest.fail("all prompts were padded at once"))
        assert main(["run", "--config", str(tmp_path / "d.yaml")]) == 0
    assert main(["info", str(tmp_path / "c"), "--check"]) == 0
    other = tmp_path / "other"
    other.symlink_to(wan_pipeline)
    content["teacher"]["path"], content["distillation"]["output_dir"] = str(other), str(tmp_path / "run2")
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(content))
    mine = ds.load_teacher(wan_pipeline, **SIZE).codec.fingerprint
    monkeypatch.setattr(WanCodec, "fingerprint", "another-vae")
    capsys.readouterr()
    assert main(["run", "--config", str(tmp_path / "d.yaml")]) == 2
    assert f"with the codec {mine}, and the teacher's is another-vae" in capsys.readouterr().err


def diverged(*arguments):
    raise NonFiniteError("loss nan")


def test_a_run_does_not_go_on_with_a_cache_that_changed(wan_pipeline, clips, tmp_path, monkeypatch, capsys):
    (clips / "junk.mp4").write_bytes(b"no video at all")
    (clips / "junk.txt").write_text("two digits rest")
    content = {
        "teacher": {"path": str(wan_pipeline), "device": "cpu"},
        "data": {"cache": str(tmp_path / "c")},
        "distillation": {"output_dir": str(tmp_path / "run")},
    }
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr("distillation.run_command.train", diverged)

    def encode_and_run():
        encode(wan_pipeline, "--videos", clips, "--output", tmp_path / "c")
        capsys.readouterr()
        return main(["run", "--config", str(tmp_path / "d.yaml")]), capsys.readouterr().err

    begun = encode_and_run()
    assert begun == encode_and_run() and begun[0] == 1 and "not checked" not in begun[1]
    (clips / "deep" / "0.txt").write_text("a digit rest")
    code, said = encode_and_run()
    assert code == 2 and "was begun with sources.cache = " in said and "restore it, or use another folder" in said
    shutil.rmtree(tmp_path / "run")
    assert encode_and_run() == begun
    write_mp4(clips / "junk.mp4", torch.ones(5, 3, 16, 16))
    code, said = encode_and_run()
    assert code == 2 and "sources.cache" in said, "a video that is now in it"
    # A folder of a version that did not keep this goes on, and says what it does not know.
    stored = tmp_path / "run" / "settings" / "settings.json"
    settings = json.loads(stored.read_text())
    del settings["sources"]["cache"]
    stored.write_text(json.dumps(settings))
    code, said = encode_and_run()
    assert code == 1 and "whether the cache changed meanwhile is not checked" in said


def test_prompts_alone_are_a_cache_too(wan_pipeline, tiny_teacher, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    assert encode(wan_pipeline, "--prompts", tmp_path / "p.txt", "--output", tmp_path / "c", "--shard-size", 2) == 0
    data = load_cache(tmp_path / "c")
    assert data.latents is None and data.source == PROMPTS and len(list((tmp_path / "c").glob("texts-*"))) == 2
    torch.testing.assert_close(data.encode(PROMPTS).embeddings, tiny_teacher.encode(PROMPTS).embeddings)
    data.check(codec="any", text=text_fingerprint(tiny_teacher.encode), latent_shape=(1, 1, 1, 1), folder="c")
    with pytest.raises(CacheError, match="with the text encoder text-"):
        data.check(codec="any", text="text-other", latent_shape=(1, 1, 1, 1), folder="c")
    # Other prompts are another cache.
    (tmp_path / "p.txt").write_text("right\n")
    assert encode(wan_pipeline, "--prompts", tmp_path / "p.txt", "--output", tmp_path / "c", "--shard-size", 2) == 2


def test_a_text_encoder_is_known_by_its_weights(tiny_teacher, wan_pipeline):
    again = ds.load_teacher(wan_pipeline, **SIZE).encode
    assert text_fingerprint(again) == text_fingerprint(tiny_teacher.encode)
    with torch.no_grad():
        next(again.text_encoder.parameters()).mul_(2)
    assert text_fingerprint(again) != text_fingerprint(tiny_teacher.encode)
    again.max_sequence_length, before = 4, text_fingerprint(again)
    assert text_fingerprint(again) != before
    assert text_fingerprint(SimpleNamespace(fingerprint="its own")) == "its own"


def test_damage_is_named(wan_pipeline, tmp_path):
    (tmp_path / "p.txt").write_text("right\n")
    assert encode(wan_pipeline, "--prompts", tmp_path / "p.txt", "--output", tmp_path / "c") == 0
    file = tmp_path / "c" / "texts-00000" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="tensors.safetensors differs"):
        load_cache(tmp_path / "c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--videos", "{root}/empty"], "holds no video"),
        (["--prompts", "{root}/none.txt"], "no prompts file"),
        (["--prompts", "{root}/p.txt", "--captions", "{root}/p.txt"], "--captions belongs to --videos"),
        (["--videos", "{root}/clips", "--captions", "{root}/p.txt"], "expected video<TAB>prompt"),
        (["--videos", "{root}/clips", "--shard-size", "0"], "--shard-size must be positive"),
        (["--videos", "{root}/clips", "--fps", "inf"], "--fps must be positive and finite; got inf"),
        (["--videos", "{root}/clips", "--num-frames", "6"], "4 n + 1 frames"),
        (["--prompts", "{root}/p.txt", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_what_cannot_be_encoded_says_why(wan_pipeline, clips, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.txt").write_text("right\n")
    command = [argument.format(root=tmp_path) for argument in arguments]
    assert main(["encode", str(wan_pipeline), *FLAGS, *command, "--output", str(tmp_path / "c")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_no_captions_at_all_is_refused_before_the_teacher_is_loaded(clips, tmp_path, capsys):
    for file in clips.rglob("*.txt"):
        file.unlink()
    assert main(["encode", "nowhere/at/all", "--videos", str(clips), "--output", str(tmp_path / "c")]) == 2
    assert "no 0.txt beside it" in capsys.readouterr().err


def test_the_size_of_a_video_is_the_codecs_where_the_folder_says_and_none_is_decoded(
    wan_pipeline, tiny_teacher, clips, tmp_path, monkeypatch
):
    stated = shutil.copytree(wan_pipeline, tmp_path / "stated")
    (stated / SIDECAR).write_text(json.dumps({"latent_shape": tiny_teacher.latent_shape}))
    monkeypatch.delattr(VideoCodec, "decode")
    command = ["encode", str(stated), "--videos", str(clips), "--output", str(tmp_path / "c"), "--device", "cpu"]
    assert main(command) == 0
    settings = read_cache_settings(tmp_path / "c")
    assert {name: getattr(settings, name) for name in SIZE} == SIZE
