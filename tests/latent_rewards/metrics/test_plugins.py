"""A second distribution, built and installed for real, brings metrics that are imported when they are used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "stranger-metrics"
version = "3.1"

[project.entry-points."latent_rewards.metrics"]
"stranger.level" = "stranger_level:Level"
"stranger.broken" = "stranger_broken:score"
stranger = "stranger_registers"

[tool.setuptools]
py-modules = ["stranger_level", "stranger_broken", "stranger_registers"]
"""

MODULES = {
    "stranger_level": """
        from latent_rewards.metrics import register_metric

        @register_metric("stranger.level", version="3", value_range=(0, 2), cheats=("grey",))
        class Level:
            "Mean of the videos."
            def __init__(self, scale=1.0):
                self.scale = scale
            def __call__(self, videos):
                return videos.flatten(1).mean(dim=1) * self.scale
        """,
    "stranger_broken": "raise OSError('no licence')",
    "stranger_registers": """
        from latent_rewards.metrics import register_metric

        @register_metric("stranger.one", version="1")
        def one(videos):
            return [1.0] * len(videos)
        """,
}

SCRIPT = """
import json, sys, warnings
import torch
from latent_rewards.metrics import create_metric, isolate, list_metrics
said = {"listed": list_metrics("stranger.*"), "before": "stranger_level" in sys.modules}
metric = create_metric("stranger.level", scale=2.0)
said["after"] = "stranger_level" in sys.modules
videos = torch.full((2, 1, 3, 4, 4), 0.25)
said["values"] = metric(videos).tolist() + create_metric("stranger.one")(videos).tolist()
said["facts"] = [metric.name, metric.version, metric.description, list(metric.cheats), metric.options]
with isolate("stranger.level", timeout=20, scale=2.0) as isolated:
    said["isolated"] = isolated(videos).tolist()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    said["available"] = list_metrics("stranger.*", available=True)
said["warned"] = [str(warning.message) for warning in caught]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("stranger"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PROJECT)
    for name, text in MODULES.items():
        lines = text.strip("\n").splitlines()
        (source / f"{name}.py").write_text("\n".join(line.removeprefix(" " * 8) for line in lines) + "\n")
    options = "--no-index --no-build-isolation --no-deps --no-cache-dir --disable-pip-version-check --quiet".split()
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def test_its_metrics_are_listed_made_and_scored_and_imported_no_earlier(installed: Path) -> None:
    path = os.pathsep.join([str(installed), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["listed"] == ["stranger.broken", "stranger.level", "stranger.one"]
    assert (said["before"], said["after"]) == (False, True)
    assert said["values"] == [0.5, 0.5, 1.0, 1.0] and said["isolated"] == [0.5, 0.5]
    assert said["facts"] == ["stranger.level", "3", "Mean of the videos.", ["grey"], {"scale": 2.0}]
    assert said["available"] == ["stranger.level", "stranger.one"]
    assert len(said["warned"]) == 1 and "'stranger.broken' is left out" in said["warned"][0]
    assert "no licence" in said["warned"][0]
