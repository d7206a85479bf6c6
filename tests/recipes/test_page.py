import base64
import io
import re

import av
import pytest
import torch

from recipes.page import write_report
from recipes.run_settings import RunConfig


class TwoRows:
    """A finished evaluation: in every column the first row is lower."""

    shown_prompts = ("a",)

    def table(self):
        headers = ["method", "quality.blur", "quality.sharpness", "Fréchet", "evaluations", "s / video"]
        return headers, [["low", 0.1, 0.1, 0.1, 1, 0.1], ["high", 0.2, 0.2, 0.2, 2, 0.2]]

    def videos(self):
        return {"low": torch.zeros(1, 4, 3, 16, 16)}


def page(folder, **run):
    config = RunConfig(**run)
    return write_report(folder, {"run": config}, TwoRows(), {}, {}, {}, lower_is_better={"quality.blur"}).read_text()


def test_the_best_is_the_lowest_where_less_is_better(tmp_path):
    rows = re.findall(r'<th scope="row"[^>]*>(low|high)</th>(.*?)</tr>', page(tmp_path), re.S)
    marked = {name: ["best" in cell for cell in cells.split("<td")[1:]] for name, cells in rows}
    assert marked == {"low": [True, False, True, False, False], "high": [False, True, False, False, False]}


@pytest.mark.parametrize(
    ("run", "rate"),
    [
        ({}, 8),
        ({"world": "prompts", "prompts_file": "p.txt"}, 16),
        ({"world": "prompts", "prompts_file": "p.txt", "fps": 12.5}, 12.5),
    ],
)
def test_videos_play_at_the_rate_of_the_run(tmp_path, run, rate):
    (clip,) = re.findall(r"base64,([^\"]+)", page(tmp_path, **run))
    with av.open(io.BytesIO(base64.b64decode(clip))) as container:
        assert float(container.streams.video[0].average_rate) == rate
