"""Every shipped YAML runs: two updates of each stage on its family's tiny pipeline.

Only sizes, step counts and paths are overridden; everything else is as in the file.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillation import cli
from distillation.families import import_diffusers
from latent_rewards.training.settings import read_settings
from recipes.dollar import SECTIONS, Dollar

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
FAMILIES = runpy.run_path(str(ROOT / "tests" / "distillation" / "families" / "conftest.py"))
EMBEDDED = "recipes/moving_digits/weights/teacher"


@dataclass(frozen=True)
class TinyPipeline:
    """How a pipeline class is built from configurations, and the size of its videos."""

    components: Callable[[], dict[str, Any]]
    num_frames: int = 9  # temporal terms need three latent frames
    height: int = 16
    width: int = 16


TINY = {
    "WanPipeline": TinyPipeline(FAMILIES["build_components"]),
    "CogVideoXPipeline": TinyPipeline(FAMILIES["build_cogvideox"]),
}
"""Pipeline class -> its tiny pipeline; a family's configurations run as soon as it stands here."""

PIPELINES = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "WanPipeline",
    "THUDM/CogVideoX-2b": "CogVideoXPipeline",
}
"""Hub ids in the YAMLs -> pipeline class."""

SMALL = {
    "run": {
        "num_prompts": 8,
        "num_latents": 8,
        "num_queries": 48,
        "num_eval_prompts": 2,
        "batch_size": 16,
        "device": "cpu",
    },
    "distillation": {"vsd_steps": 2, "cd_steps": 2, "batch_size": 2, "checkpoint_every": 2, "progress": False},
    "proxy": {"num_updates": 2, "decoder_updates": 2, "decoder_clips": 8, "progress": False},
    "lro": {
        "num_updates": 2,
        "prompts_per_update": 2,
        "num_generations": 2,
        "num_draws": 2,
        "refresh_every": 1,
        "refresh_queries": 8,
        "refresh_steps": 2,
        "holdout_every": 2,
        "holdout_samples": 4,
        "checkpoint_every": 2,
        "progress": False,
    },
    "anchor": {"warmup": 2},
}


def teacher_of(path: Path) -> str:
    content = yaml.safe_load(path.read_text())
    return content["teacher"]["path"] if "teacher" in content else content["run"]["teacher"]


def tiny(path: Path) -> TinyPipeline | None:
    """The tiny pipeline for a YAML; None where its family has none yet."""
    return TINY.get(PIPELINES[teacher_of(path)]) if teacher_of(path) != EMBEDDED else TINY["WanPipeline"]


RUNNABLE = [path for path in CONFIGS if tiny(path) is not None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipeline class -> the folder of its tiny pipeline."""
    made = {}
    for name, pipeline in TINY.items():
        made[name] = tmp_path_factory.mktemp("pipelines") / name
        getattr(import_diffusers(), name)(**pipeline.components()).save_pretrained(made[name])
    return made


@pytest.fixture
def shrunk(tmp_path, folders):
    """Write a YAML with its sizes, step counts and paths overridden; returns its path and content."""

    def shrink(path: Path) -> tuple[Path, dict[str, Any]]:
        content = yaml.safe_load(path.read_text())
        source, pipeline = teacher_of(path), tiny(path)
        (tmp_path / "prompts.txt").write_text("a digit moves left\ntwo digits rest\na digit rests\na digit moves up\n")
        for section in SMALL if "run" in content else ["distillation"]:
            content[section] = content.get(section, {}) | SMALL[section]
        size = {"num_frames": pipeline.num_frames, "height": pipeline.height, "width": pipeline.width}
        where = "run" if "run" in content else "teacher"
        if source == EMBEDDED:
            content["run"]["teacher"] = str(ROOT / EMBEDDED)
        else:
            content[where] |= {**size, "teacher" if where == "run" else "path": str(folders[PIPELINES[source]])}
        if where == "run":
            content["run"]["output_dir"] = str(tmp_path)
            if content["run"].get("prompts_file"):
                content["run"]["prompts_file"] = str(tmp_path / "prompts.txt")
        else:
            content["teacher"]["device"] = "cpu"
            content["data"]["prompts_file"] = str(tmp_path / "prompts.txt")
            content["distillation"]["output_dir"] = str(tmp_path / "run")
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump(content))
        return file, content

    return shrink


def updates(folder: Path) -> int:
    return len((folder / "history.jsonl").read_text().splitlines())


@pytest.mark.parametrize("path", [p for p in RUNNABLE if not p.stem.startswith("distill_")], ids=lambda p: p.stem)
def test_a_recipe_runs_two_updates_of_every_stage(path, shrunk, monkeypatch):
    file, content = shrunk(path)
    if content["run"]["world"] == "moving_digits":  # its evaluation has tests of its own
        monkeypatch.setattr(Dollar, "evaluate", lambda self, *students: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Dollar(read_settings(file, SECTIONS)).run()
    else:
        assert Dollar(read_settings(file, SECTIONS)).run().is_file()
    folder = Path(content["run"]["output_dir"]) / content["run"]["name"]
    assert [updates(folder / "distillation" / stage) for stage in ("vsd", "cd")] == [2, 2]
    for name in content["run"].get("trainers", ["reinforce"]):
        result = json.loads((folder / f"lro_{name}" / "result.json").read_text())
        assert len(result["history"]) == 2 and result["num_queries"] > 0
        assert (folder / f"student_{name}" / "model_index.json").is_file()


@pytest.mark.parametrize("path", [p for p in RUNNABLE if p.stem.startswith("distill_")], ids=lambda p: p.stem)
def test_a_distillation_runs_two_updates_of_every_stage(path, shrunk):
    file, content = shrunk(path)
    assert cli.main(["run", "--config", str(file)]) == 0
    folder = Path(content["distillation"]["output_dir"])
    assert [updates(folder / stage) for stage in ("vsd", "cd")] == [2, 2]
    assert (folder / "student" / "model_index.json").is_file()


@pytest.mark.parametrize("path", [p for p in CONFIGS if teacher_of(p) != EMBEDDED], ids=lambda p: p.stem)
def test_a_large_model_is_distilled_with_activation_checkpoints(path):
    assert yaml.safe_load(path.read_text())["distillation"]["gradient_checkpointing"] is True


def test_every_teacher_is_of_a_known_pipeline_class():
    assert {teacher_of(path) for path in CONFIGS} == {*PIPELINES, EMBEDDED}
    assert TINY.keys() <= set(PIPELINES.values())
