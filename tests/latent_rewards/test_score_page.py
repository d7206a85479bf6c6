"""The page holds the right clips and reads no other."""

import re
from pathlib import Path

import pytest
import torch

from latent_rewards import score_page as module
from latent_rewards.contracts import DataError
from latent_rewards.metrics import create_metric
from latent_rewards.score_page import score_page
from latent_rewards.video import encode_mp4, read_video

LABEL = "quality.blur"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    data = encode_mp4(torch.rand(80, 3, 16, 16, generator=torch.Generator().manual_seed(0)), fps=4)
    names = [f"{letter}.mp4" for letter in "abcdefgh"]
    for name in names:
        (tmp_path / name).write_bytes(data)
    return {name: tmp_path / name for name in names}


def rows_of(values: dict[str, float]) -> list[dict[str, float | str]]:
    return [{"video": f"{name}.mp4", LABEL: value} for name, value in values.items()]


def titled(text: str) -> dict[str, list[str]]:
    galleries = re.findall(r"<h3>((?:Best|Worst) by [^<]*)</h3>(.*?)</div>", text, re.S)
    return {title: re.findall(r"</b> ([^<]*)", content) for title, content in galleries}


def test_best_and_worst_follow_the_direction_and_only_they_are_read(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, object, object]] = []

    def reading(path: Path, **options: object) -> object:
        read.append((path.name, options["frames"], options["short_side"]))
        return read_video(path, **options)

    monkeypatch.setattr(module, "read_video", reading)
    values = dict(zip("abcdefgh", [0.4, 0.1, float("nan"), 0.9, 0.3, 0.8, 0.2, 0.7], strict=True))
    rows = [*rows_of(values), {"video": "failed.mp4"}]
    faults: list[str] = []
    metrics = {LABEL: create_metric(LABEL)}  # lower is better
    page = score_page("clips", rows, metrics, files, {"b.mp4": "a bee"}.get, faults, "uniform:99").render()
    assert titled(page) == {
        f"Best by {LABEL}": ["b.mp4", "g.mp4", "e.mp4"],
        f"Worst by {LABEL}": ["d.mp4", "f.mp4", "h.mp4"],
    }
    assert read == [(f"{name}.mp4", "uniform:64", 240) for name in "bgedfh"]
    assert "Values of 7 clip(s)" in page and "<q>a bee</q>" in page and page.count("<q>") == 1
    assert re.findall(r'<td class="number">([^<]*)</td>', page) == ["7", "0.4857", "0.2900", "0.1000", "0.9000"]
    assert "<p>A noise clip is as good as any to it.</p>" in page
    assert not faults and "Failed" not in page


def test_few_clips_are_shown_once_and_one_that_vanished_is_named(files: dict[str, Path]) -> None:
    files["b.mp4"].unlink()
    faults: list[str] = []
    rows = rows_of({"a": 0.5, "b": 0.4})
    page = score_page("clips", rows, {LABEL: create_metric(LABEL)}, files, lambda name: None, faults).render()
    assert titled(page) == {f"Best by {LABEL}": ["a.mp4"]}
    assert len(faults) == 1 and "b.mp4 cannot be shown" in faults[0] and "<h2>Failed</h2>" in page


def test_a_metric_without_values_and_a_prompt_that_cannot_be_read(files: dict[str, Path]) -> None:
    def prompt(name: str) -> str:
        raise DataError("no text")

    faults: list[str] = []
    metrics = {LABEL: create_metric(LABEL), "other": create_metric("quality.sharpness")}
    page = score_page("clips", rows_of({"a": 0.5}), metrics, files, prompt, faults).render()
    assert "No clip has a value." in page and "<video" not in page
    assert faults == ["a.mp4 cannot be shown: no text"]
