"""The shell commands, on real files: what is printed, what is written, and how they end."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from latent_rewards.cli import main, metric_spec
from latent_rewards.metrics import list_metrics, registry
from latent_rewards.metrics.registry import metric_info
from latent_rewards.metrics.weights import VARIABLE
from latent_rewards.video import encode_mp4


def clip(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    start = torch.rand(1, 3, height, width, generator=source)
    return torch.cat([start.roll(t, dims=3) for t in range(count)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of several sizes, rates and lengths, odd ones among them, and two files that are no videos."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep").mkdir()
    (folder / "plain.mp4").write_bytes(encode_mp4(clip(9, 32, 48), fps=8))
    (folder / "deep" / "fast.mp4").write_bytes(encode_mp4(clip(30, 64, 32), fps=30))
    (folder / "frame.mp4").write_bytes(encode_mp4(clip(1, 16, 16)))
    (folder / "odd.mp4").write_bytes(encode_mp4(clip(12, 33, 51), fps=23.976, lossless=True))
    with av.open(str(folder / "odd.gif"), "w") as container:
        stream = container.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 33, 17, "rgb8"
        for frame in (255 * clip(5, 17, 33)).byte().permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="rgb8")))
        container.mux(stream.encode())
    whole = (folder / "plain.mp4").read_bytes()
    (folder / "corrupt.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "notes.txt").write_text("not a video")
    (folder / "plain.txt").write_text("a thing that moves\n")
    return folder


def test_score_gives_a_row_for_every_video_and_names_what_failed(folder, tmp_path, capsys):
    wanted = [
        "--metric",
        "quality.sharpness",
        "--metric",
        "quality.temporal_flickering",
        "--csv",
        str(tmp_path / "a.csv"),
    ]
    assert main(["metrics", "score", str(folder), *wanted]) == 1
    printed = capsys.readouterr()
    rows = {row["video"]: row for row in csv.DictReader((tmp_path / "a.csv").open())}
    assert sorted(rows) == sorted(["plain.mp4", "deep/fast.mp4", "frame.mp4", "odd.gif", "odd.mp4", "corrupt.mp4"])
    assert all(float(rows[name]["quality.sharpness"]) > 0 for name in rows if name != "corrupt.mp4")
    assert rows["corrupt.mp4"]["quality.sharpness"] == rows["frame.mp4"]["quality.temporal_flickering"] == ""
    assert 0 < float(rows["odd.gif"]["quality.temporal_flickering"]) < 1
    assert "corrupt.mp4 cannot be read as a video" in printed.err
    assert "frame.mp4: metric 'quality.temporal_flickering' needs at least 2 frames; got 1" in printed.err
    assert printed.out.splitlines()[0].split() == ["video", "quality.sharpness", "quality.temporal_flickering"]
    mean = [float(rows[name]["quality.sharpness"]) for name in rows if rows[name]["quality.sharpness"]]
    assert float(printed.out.splitlines()[-1].split()[1]) == pytest.approx(sum(mean) / len(mean), rel=1e-3)


def test_every_built_in_metric_scores_any_size_and_rate_and_one_frame_where_it_can(folder, tmp_path, capsys):
    built_in = [name for name in list_metrics() if registry.source_of(name)[1].startswith("latent_rewards.")]
    names = [name for name in built_in if not metric_info(name).weights]
    wanted = [part for name in names for part in ("--metric", name)]
    assert main(["metrics", "score", str(folder), *wanted, "--csv", str(tmp_path / "a.csv")]) == 1
    rows = {row["video"]: row for row in csv.DictReader((tmp_path / "a.csv").open())}
    for video in ("plain.mp4", "deep/fast.mp4", "odd.gif", "odd.mp4"):
        assert all(math.isfinite(float(rows[video][name])) for name in names), video
    for name in names:
        assert bool(rows["frame.mp4"][name]) == (metric_info(name).minimum_frames == 1), name
        assert not rows["corrupt.mp4"][name]
    assert sum("corrupt.mp4" in line for line in capsys.readouterr().err.splitlines()) == 1


def test_the_page_shows_the_best_and_worst_clips_of_each_metric(folder, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    wanted = ["--metric", "quality.sharpness", "--metric", "quality.blur,frames=first:2,resize=[16, 24]"]
    assert main(["metrics", "score", str(folder), *wanted, "--html", str(page), "--csv", str(tmp_path / "a.csv")]) == 1
    text = page.read_text(encoding="utf-8")
    rows = [row for row in csv.DictReader((tmp_path / "a.csv").open()) if row["quality.sharpness"]]
    ranked = sorted(rows, key=lambda row: -float(row["quality.sharpness"]))
    section = text[text.index("<h2>quality.sharpness") : text.index("<h2>quality.blur")]
    shown = re.findall(r"<figcaption><b>([^<]*)</b> ([^<]*)", section)
    expected = [*ranked[:3], *ranked[3:][::-1]]
    assert [name for _, name in shown] == [row["video"] for row in expected]
    assert [float(value) for value, _ in shown] == pytest.approx(
        [float(row["quality.sharpness"]) for row in expected], rel=1e-3
    )
    assert "<q>a thing that moves</q>" in section and section.count("<svg") == 1
    assert "<h2>Failed</h2>" in text and "corrupt.mp4 cannot be read as a video" in text
    assert text.count("<video ") == 2 * len(rows) and not list(page.parent.glob("*.partial"))
    assert "http-equiv" in text and not re.search(r"""(src|href)=["'](?!data:|#)""", text)


def test_a_page_needs_its_packages_before_any_work(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["metrics", "score", str(folder), "--metric", "quality.blur", "--html", str(tmp_path / "p.html")]) == 2
    assert "pip install 'latent-rewards[report]'" in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_named(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.mp4").write_bytes((folder / "plain.mp4").read_bytes())
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert main(["metrics", "score", str(tmp_path), "--metric", "quality.sharpness"]) == 1
    assert "a.txt cannot be read" in capsys.readouterr().err


def test_options_make_columns_of_their_own_and_the_frame_rate_is_the_videos(folder, capsys):
    video = str(folder / "deep" / "fast.mp4")
    specs = ["motion.flow_direction,direction=right", "motion.flow_direction,direction=left", "motion.dynamic_degree"]
    assert main(["metrics", "score", video, *(part for spec in specs for part in ("--metric", spec))]) == 0
    header, row, _ = capsys.readouterr().out.splitlines()
    assert header.split()[1:] == specs
    right, left, moving = map(float, row.split()[1:])
    assert right > 0.9 and left < -0.9
    assert moving == 1.0  # 30 frames a second of one pixel are 8 of nearly four


def test_a_metric_that_depends_on_the_frame_rate_is_given_each_videos(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "rates.py").write_text(
        "from latent_rewards.metrics import register_metric\n\n\n"
        "@register_metric('test.rate', version='1', needs_fps=True)\n"
        "def rate(videos, *, fps=1.0):\n    return [float(fps)] * len(videos)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_DEFINITIONS", dict(registry._DEFINITIONS))
    assert main(["metrics", "score", str(folder), "--metric", "rates:rate", "--metric", "rates:rate,fps=5"]) == 1
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["odd.mp4"] == ["23.98", "5"]
    assert (rows["plain.mp4"], rows["deep/fast.mp4"], rows["odd.gif"]) == (["8", "5"], ["30", "5"], ["10", "5"])


def test_prompts_come_from_beside_the_video_or_from_a_file(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "words.py").write_text(
        "def length(videos, *, prompts):\n    return [float(len(prompt)) for prompt in prompts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    score = ["metrics", "score", str(folder), "--metric", "words:length"]
    assert main(score) == 1
    printed = capsys.readouterr()
    assert "plain.mp4" in printed.out and "18" in printed.out
    assert "odd.gif: metric 'words:length' needs a prompt" in printed.err
    (tmp_path / "prompts.tsv").write_text("odd.gif\tfour\nplain.mp4\tfive5\n\n")
    main([*score, "--prompts", str(tmp_path / "prompts.tsv")])
    values = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert (values["odd.gif"], values["plain.mp4"]) == ("4", "5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "{folder}", "--metric", "quality.sharpnes"], "quality.sharpness"),
        (["score", "{folder}", "--metric", "quality.blur,windw=3"], "window"),
        (["score", "{folder}/deep/none", "--metric", "quality.blur"], "holds no video"),
        (["score", "{folder}", "--metric", "quality.blur", "--frames", "last:3"], "first:N"),
        (["score", "{folder}", "--metric", "quality.blur", "--prompts", "{folder}/plain.txt"], "line 1: expected"),
        (["score", "{folder}", "--metric", "quality.blur", "--prompts", "{folder}/none"], "cannot be read"),
        (["score", "{folder}", "--metric", "quality.blur", "--prompts", "{folder}/names.tsv"], "name no video"),
        (["score", "{folder}", "--metric", "quality.blur", "--csv", "{folder}/deep"], "deep is a folder; name a file"),
        (["score", "{folder}", "--metric", "quality.blur", "--html", "{folder}"], "is a folder; name a file in it"),
        (["score", "{folder}", "--metric", "quality.blur", "--html", "{folder}/plain.txt/p"], "plain.txt is a file"),
        (["list", "nothing.*"], "no metric matches"),
        (["info", "motion.flow_direction,direction=north"], "north"),
    ],
)
def test_what_cannot_begin_says_why_before_any_work(folder, capsys, arguments, message):
    (folder / "names.tsv").write_text("other.mp4\ta prompt\n")
    assert main(["metrics", *(argument.format(folder=folder) for argument in arguments)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("latent-rewards: ") and not printed.out


def test_list_info_and_check(capsys):
    assert main(["metrics", "list", "motion.*"]) == 0
    assert "`motion.smoothness`" in capsys.readouterr().out
    assert main(["metrics", "info", "quality.blur,window=7"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["options"] == {"window": 7} and facts["value_range"] == [0, 1]
    assert main(["metrics", "check", "quality.exposure"]) == 0
    assert "keeps its promises" in capsys.readouterr().out


def test_what_cannot_be_made_here_is_described_and_left_out_on_demand(tmp_path, monkeypatch, capsys):
    (tmp_path / "heavy.py").write_text(
        "from latent_rewards.metrics import register_metric\n"
        "from latent_rewards.metrics.weights import WeightsFile\n"
        "HEAD = WeightsFile('head.safetensors', 'its authors', 3)\n\n\n"
        "@register_metric('test.heavy', version='1', weights=(HEAD,))\n"
        "class Heavy:\n"
        "    def __init__(self, weights=None):\n        HEAD.read(weights)\n\n"
        "    def __call__(self, videos):\n        return videos\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(registry, "_DEFINITIONS", dict(registry._DEFINITIONS))
    assert main(["metrics", "info", "heavy:Heavy"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["weights"] == ["head.safetensors"] and "head.safetensors does not exist" in facts["not_available"]
    assert main(["metrics", "list", "test.*"]) == 0
    assert "`test.heavy`" in capsys.readouterr().out
    assert main(["metrics", "list", "test.*", "--available"]) == 2
    assert "no metric here that is available matches" in capsys.readouterr().err


def test_a_broken_promise_is_a_failure(tmp_path, monkeypatch, capsys):
    (tmp_path / "liar.py").write_text("def wrong(videos):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["metrics", "check", "liar:wrong"]) == 2
    assert "shape (1,)" in capsys.readouterr().err


def test_metric_specs_are_read_as_yaml():
    assert metric_spec("a.b,x=3,y=true,z=left") == ("a.b", {"x": 3, "y": True, "z": "left"})
    assert metric_spec("pkg.mod:attr") == ("pkg.mod:attr", {})
    assert metric_spec("a,resize=[8, 16],frames=uniform:8") == ("a", {"resize": [8, 16], "frames": "uniform:8"})
    with pytest.raises(Exception, match="options are name=value"):
        metric_spec("a.b,x")


def test_the_installed_command_explains_itself():
    done = subprocess.run(
        [sys.executable, "-m", "latent_rewards.cli", "metrics", "score", "--help"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert "may be repeated" in done.stdout and "first:64" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "collect --policy nowhere --prompts FILE --metric quality.blur --output OUT",
        "collect --videos VIDEOS --codec nowhere --metric quality.blur --output OUT",
        "evaluate nowhere --prompts FILE --metric quality.blur --output OUT",
        "tune nowhere --proxy nowhere --prompts FILE --output OUT",
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(folder, tmp_path, capsys, command):
    (tmp_path / "prompts.txt").write_text("a digit moves left\n")
    places = {"FILE": str(tmp_path / "prompts.txt"), "OUT": str(tmp_path / "out"), "VIDEOS": str(folder)}
    words = [places.get(word, word) for word in command.split()]
    assert main([*words, "--device", "cuda:99"]) == 2
    assert "device 'cuda:99' cannot be used" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_options_of_a_metric_are_numbers_where_they_look_like_numbers(capsys):
    assert metric_spec("a.b,x=1e-3,y=[2E3,no],z=e3") == ("a.b", {"x": 0.001, "y": [2000.0, False], "z": "e3"})
    with pytest.raises(SystemExit):
        main(["metrics", "info", "quality.blur,window=[4"])
    assert "'[4' is not valid YAML" in capsys.readouterr().err
