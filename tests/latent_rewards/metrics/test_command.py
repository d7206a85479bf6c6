"""A judge in a second environment, and commands that hang, fail, flood and lie."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from latent_rewards.contracts import (
    ConfigError,
    MetricCrashError,
    MetricError,
    MetricOutputError,
    MetricTimeoutError,
)
from latent_rewards.metrics import Metric
from latent_rewards.metrics.command import command_metric

VIDEOS = torch.linspace(0, 1, 3).view(3, 1, 1, 1, 1).expand(3, 4, 3, 17, 16).contiguous()
PROMPTS = ["zero", "a 'half' {answer}", "eins – ß"]
FILES = ("{request}", "{answer}")

JUDGE = """
import importlib.util, json, sys
import only_in_the_other_environment as judge
request = json.load(open(sys.argv[1], encoding="utf-8"))
assert importlib.util.find_spec("latent_rewards") is None, "it sees this environment"
values = [judge.score(open(clip["video"], "rb").read(), clip["prompt"]) for clip in request["clips"]]
json.dump({"values": values}, open(sys.argv[2], "w"))
"""

JUDGE_MODULE = """
def score(video, prompt):
    assert video[4:8] == b"ftyp", video[:16]
    return None if prompt == "zero" else len(prompt)
"""


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a second environment that holds a module of its own and none of this one's."""
    folder = tmp_path_factory.mktemp("environment") / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=240)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "only_in_the_other_environment.py").write_text(JUDGE_MODULE)
    return folder / "bin" / "python"


def scripted(tmp_path: Path, code: str, **options: object) -> Metric:
    script = tmp_path / "tool.py"
    script.write_text("import json, os, subprocess, sys, time\nrequest, answer = sys.argv[1:3]\n" + code)
    options = {"version": "1", "timeout": 20.0, **options}
    return command_metric("tool", [sys.executable, "-S", str(script), *FILES], **options)


def test_a_judge_in_another_environment_scores_each_clip_with_its_prompt(
    other_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    script = tmp_path / "judge.py"
    script.write_text(JUDGE)
    command = [str(other_python), str(script), *FILES]
    with pytest.raises(ModuleNotFoundError):
        __import__("only_in_the_other_environment")
    values = command_metric("judge", command, version="1", timeout=30.0)(VIDEOS, PROMPTS)
    assert values[0].isnan() and values[1:].tolist() == [len(PROMPTS[1]), len(PROMPTS[2])]


@pytest.mark.parametrize("lossless", [True, False])
def test_the_request_names_playable_files_and_the_folder_is_gone_afterwards(tmp_path: Path, lossless: bool) -> None:
    kept = tmp_path / "kept"
    code = (
        "import shutil\n"
        f"shutil.copytree(os.path.dirname(request), {str(kept)!r})\n"
        "json.dump({'values': [1, 2.5, -3]}, open(answer, 'w'))\n"
    )
    metric = scripted(tmp_path, code, lossless=lossless, fps=12.0, needs_prompt=lossless)
    assert metric(VIDEOS, PROMPTS).tolist() == [1.0, 2.5, -3.0]
    request = json.loads((kept / "request.json").read_text())
    assert (request["metric"], request["fps"]) == ("tool", 12.0)
    assert [clip["prompt"] for clip in request["clips"]] == (PROMPTS if lossless else [None] * 3)
    assert not any(Path(clip["video"]).exists() for clip in request["clips"])
    with av.open(str(kept / Path(request["clips"][1]["video"]).name)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert float(container.streams.video[0].average_rate) == 12.0
    if lossless:
        assert np.array_equal(frames, (255 * VIDEOS[1]).round().byte().permute(0, 2, 3, 1).numpy())
    else:
        assert frames.shape == (4, 18, 16, 3) and abs(frames.mean() / 255 - 0.5) < 0.02


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (
            "print('no GPU', file=sys.stderr); sys.exit(3)",
            MetricCrashError,
            r"failed \(exit status 3\).*with:\nno GPU$",
        ),
        ("os.kill(os.getpid(), 11)", MetricCrashError, r"failed \(killed by SIGSEGV\)$"),
        ("1 / 0", MetricCrashError, r"exit status 1.*ZeroDivisionError: division by zero$"),
        ("pass", MetricOutputError, "ended with exit status 0 and wrote no answer"),
        ("open(answer, 'w').write('{\"values\": [1')", MetricOutputError, r"answered b'.*\[1'; answer.json must be"),
        ("open(answer, 'w').write('[1, 2, 3]')", MetricOutputError, r"answered b'\[1, 2, 3\]'"),
        ("open(answer, 'w').write('[' * 3000)", MetricOutputError, "answered b'"),
        ("json.dump({'values': [1, 2]}, open(answer, 'w'))", MetricOutputError, "gave 2 value.*with 3 finite"),
        ("json.dump({'values': {'a': 1}}, open(answer, 'w'))", MetricOutputError, "gave dict value"),
        ("json.dump({'values': [1, float('inf'), 2]}, open(answer, 'w'))", MetricOutputError, "gave inf for clip 1"),
        ("json.dump({'values': [1, 2, float('nan')]}, open(answer, 'w'))", MetricOutputError, "gave nan for clip 2"),
        ("json.dump({'values': [10 ** 400, 2, 3]}, open(answer, 'w'))", MetricOutputError, "0 for clip 0"),
        ("json.dump({'values': [True, 2, 3]}, open(answer, 'w'))", MetricOutputError, "gave True for clip 0"),
        ("json.dump({'values': [0, 2, 3]}, open(answer, 'w'))", MetricOutputError, r"promises values in \[0, 2\]"),
        ("open(answer, 'w').write(' ' * 10 ** 7)", MetricOutputError, "answered with 10000000 bytes"),
        ("os.mkdir(answer)", MetricOutputError, "wrote no answer"),
    ],
)
def test_each_fault_is_an_error_that_names_the_command_and_how_it_ended(
    tmp_path: Path, code: str, error: type, message: str
) -> None:
    with pytest.raises(error, match=f"(?s)metric 'tool'.*{message}") as caught:
        scripted(tmp_path, code, value_range=(0, 2))(VIDEOS, PROMPTS)
    assert "promises" in message or "tool.py '{request}' '{answer}'" in str(caught.value)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def none_running(pids: list[int], within: float) -> bool:
    deadline = time.monotonic() + within
    while any(running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


SLEEPERS = (
    "sleepers = [subprocess.Popen(['sleep', '600'], start_new_session=stray) for stray in (False, {stray})]\n"
    "open({note!r}, 'w').write(' '.join(str(child.pid) for child in sleepers))\n"
)


def test_a_command_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    code = (
        SLEEPERS.format(stray=True, note=str(note)) + "print('loading', file=sys.stderr, flush=True)\ntime.sleep(600)"
    )
    started = time.monotonic()
    with pytest.raises(MetricTimeoutError, match=r"did not end within 2 s and was killed[^§]*with:\nloading$"):
        scripted(tmp_path, code, timeout=2.0)(VIDEOS, PROMPTS)
    assert time.monotonic() - started < 4.0
    pids = [int(pid) for pid in note.read_text().split()]
    assert len(pids) == 2 and none_running(pids, within=4.0 - (time.monotonic() - started))


def test_what_a_command_leaves_behind_is_killed_though_it_holds_the_error_stream(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    code = SLEEPERS.format(stray=False, note=str(note)) + "json.dump({'values': [1, 2, 3]}, open(answer, 'w'))"
    started = time.monotonic()
    assert scripted(tmp_path, code)(VIDEOS, PROMPTS).tolist() == [1.0, 2.0, 3.0]
    assert time.monotonic() - started < 10
    assert none_running([int(pid) for pid in note.read_text().split()], within=2.0)


def test_a_command_that_closes_its_error_stream_still_has_a_deadline(tmp_path: Path) -> None:
    with pytest.raises(MetricTimeoutError):
        scripted(tmp_path, "os.close(2); time.sleep(600)", timeout=1.0)(VIDEOS, PROMPTS)


def test_a_flood_of_errors_neither_blocks_nor_fills_memory(tmp_path: Path) -> None:
    code = (
        "for _ in range(100): os.write(2, b'x' * 2 ** 20)\n"
        "os.write(2, b'\\nthe end')\nprint('y' * 2 ** 22)\nsys.exit(5)"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MetricCrashError, match=r"exit status 5\)[^§]*the end$") as caught:
        scripted(tmp_path, code)(VIDEOS, PROMPTS)
    assert len(str(caught.value)) < 5000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


def test_the_command_gets_variables_and_nothing_of_this_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("LR_TEST", "kept")
    code = (
        "seen = ['PYTHONPATH' in os.environ, os.environ['LR_TEST'] == 'kept', os.environ['KEY'] == 'secret']\n"
        "json.dump({'values': [int(value) for value in seen]}, open(answer, 'w'))"
    )
    metric = scripted(tmp_path, code, environment={"KEY": "secret"})
    assert metric(VIDEOS, PROMPTS).tolist() == [0.0, 1.0, 1.0]
    assert "secret" not in repr(metric) + metric.fingerprint + json.dumps(metric.options)


def test_the_fingerprint_follows_command_version_and_what_is_written() -> None:
    def fingerprint(*arguments: str, **options: object) -> str:
        options = {"version": "1", **options}
        return command_metric("tool", [sys.executable, *arguments, "{folder}"], **options).fingerprint

    prints = [
        fingerprint(),
        fingerprint("-S"),
        fingerprint(version="2"),
        fingerprint(fps=4.0),
        fingerprint(lossless=True),
    ]
    assert len(set(prints)) == 5
    assert fingerprint(timeout=3.0, environment={"A": "b"}) == prints[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": "python {folder}"}, "must be a list of texts"),
        ({"command": []}, "must be a list of texts"),
        ({"command": [sys.executable, Path("{folder}")]}, "must be a list of texts"),
        ({"command": [sys.executable, "{request}"]}, "not told where the files are"),
        ({"command": ["no-such-program-here", "{folder}"]}, "no program 'no-such-program-here'"),
        ({"timeout": 0.0}, "timeout must be positive"),
        ({"fps": -1.0}, "fps must be positive"),
    ],
)
def test_wrong_settings_are_refused(change: dict, message: str) -> None:
    settings = {"command": [sys.executable, "{folder}"], "version": "1", **change}
    with pytest.raises(ConfigError, match=f"'tool': .*{message}"):
        command_metric("tool", settings.pop("command"), **settings)


def test_a_program_that_is_gone_by_then_is_an_error(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    metric = command_metric("tool", [str(program), "{folder}"], version="1")
    os.unlink(program)
    with pytest.raises(MetricError, match="could not be started: .*No such file"):
        metric(VIDEOS, PROMPTS)
