"""What a DOLLAR run is told: checked before any work, section against section, and remembered by its folder."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import latent_rewards as lr
from distillation.config import FREE_SETTINGS
from distillation.student import DEFAULT_TIMESTEPS
from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.lro.gradients import GradientAggregation
from latent_rewards.proxies.objectives import SCORE_OBJECTIVES
from latent_rewards.training.settings import SettingsError, check_types

TRAINERS = {"reinforce": lr.ReinforceTrainer, "differentiable": lr.DifferentiableRewardTrainer}
HOLDOUTS = {"moving_digits": ["digits.legibility_holdout"], "prompts": []}
"""World -> the metrics that are held out where a run names none."""
RATES = {"moving_digits": 8.0, "prompts": 16.0}
"""World -> frames per second of its videos where a run says nothing."""
FREE_RUN_SETTINGS = frozenset({"device", "output_dir", "trainers", "fps"})
"""Settings of a run that change nothing its folder keeps: each trainer has a student and rows of its own."""


@dataclass
class RunConfig:
    """What is tuned towards what, and where it is kept.

    Attributes:
        name: folder of the run below ``output_dir``.
        teacher: folder or hub id of a diffusers video pipeline.
        metrics: true metrics; what the student is tuned towards.
        weights: factor of each metric in the reward; None is 1 for each, and -1 for those of which less is better.
        holdout: metrics that are never optimised, for early stop and rollback; an empty list is none. None takes what
            the world has: the digits one of their own, "prompts" none.
        world: "moving_digits" brings its own prompts, data and benchmark; "prompts" reads ``prompts_file``.
        prompts_file: one prompt a line; the last ``num_eval_prompts`` are kept for evaluation.
        num_prompts: training prompts drawn from the digits world.
        num_latents: encoded training clips for CD; 0 distils without data. "prompts" has no data.
        num_queries: student samples the true metrics score before the proxy is trained.
        num_steps: sampling steps the student is scored at, beside one; ``lro`` has to tune it at them.
        num_eval_prompts: prompts of the evaluation (four clips each in the digits world).
        guidance_scale: of the teacher's own rows; None takes the distillation's.
        trainers: which of "reinforce" and "differentiable" tune the student.
        num_frames: frames of a video; needed where the teacher's folder does not say.
        height: pixels, likewise.
        width: pixels, likewise.
        batch_size: samples per call outside training.
        fps: frames per second of the videos in the report; None takes 8 for the digits and 16 for "prompts".
        text_dtype: of the text encoder, which stays on the device.
        output_dir: where runs are kept.
        seed: root of all randomness.
        device: "cpu", "cuda", or one of several such as "cuda:1"; None takes an accelerator if there is one.
    """

    name: str = "demo"
    teacher: str = "recipes/moving_digits/weights/teacher"
    metrics: list[str] = field(default_factory=lambda: ["digits.legibility"])
    weights: list[float] | None = None
    holdout: list[str] | None = None
    world: Literal["moving_digits", "prompts"] = "moving_digits"
    prompts_file: str | None = None
    num_prompts: int = 2048
    num_latents: int = 2048
    num_queries: int = 1024
    num_steps: int = 4
    num_eval_prompts: int = 40
    guidance_scale: float | None = None
    trainers: list[str] = field(default_factory=lambda: ["reinforce"])
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 32
    fps: float | None = None
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    output_dir: str = "runs"
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before any work, and fill in what the world says."""
        check_types(self, SettingsError)
        if self.holdout is None:
            self.holdout = list(HOLDOUTS[self.world])
        if self.fps is None:
            self.fps = RATES[self.world]
        if not self.fps > 0:
            raise SettingsError(f"fps must be a positive number; got {self.fps}")
        if Path(self.name).name in ("", ".."):
            raise SettingsError(f"name must name a folder of its own below output_dir; got {self.name!r}")
        if self.guidance_scale is not None and not self.guidance_scale > 0:
            raise SettingsError(
                "guidance_scale must be positive, 1 being none, or left out for the distillation's; got "
                f"{self.guidance_scale}"
            )
        lowest = dict.fromkeys(("num_queries", "num_steps", "num_eval_prompts", "batch_size"), 1)
        if self.world == "moving_digits":
            lowest |= {"num_prompts": 1, "num_latents": 0}
        for name, least in lowest.items():
            if not getattr(self, name) >= least:
                raise SettingsError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.weights is not None and len(self.weights) != len(self.metrics):
            raise SettingsError(f"{len(self.weights)} weights for {len(self.metrics)} metrics; give one for each")
        if unknown := [name for name in self.trainers if name not in TRAINERS]:
            raise SettingsError(f"unknown trainers {unknown}; known: {', '.join(TRAINERS)}")
        if self.world == "prompts" and not self.prompts_file:
            raise SettingsError("world 'prompts' needs prompts_file, a text file with one prompt a line")
        if self.world == "moving_digits":
            from recipes.moving_digits.evaluation_set import evaluation_prompts

            try:
                evaluation_prompts(self.num_eval_prompts)
            except DataError as error:
                raise SettingsError(f"num_eval_prompts: {error}") from error


@dataclass
class PromptsFacts:
    """What a prompts file was when the run began.

    Attributes:
        sha256: of its prompts.
    """

    sha256: str


def check_sections(settings: Mapping[str, Any], processes: int) -> None:
    """Check sections against one another: the last stages would refuse them after the first had taken days.

    Args:
        settings: section name -> dataclass.
        processes: of the launch.

    Raises:
        SettingsError: two sections do not fit, or a key is set where that of "run" counts; the message names both keys.
    """
    _refuse_overridden(settings)
    run, proxy, distillation, lro = (settings[name] for name in ("run", "proxy", "distillation", "lro"))
    if run.num_queries < proxy.min_samples:
        raise SettingsError(
            f"run.num_queries = {run.num_queries} samples are too few to fit a proxy; at least proxy.min_samples = "
            f"{proxy.min_samples}"
        )
    if proxy.objective not in SCORE_OBJECTIVES:
        raise SettingsError(
            f"proxy.objective = {proxy.objective!r} learns from preferences, and metrics give numbers; use one of "
            f"{', '.join(SCORE_OBJECTIVES)}"
        )
    counts = {"run.num_steps": [run.num_steps], "distillation.step_counts": distillation.step_counts}
    shared = {"distillation.batch_size": distillation.batch_size}
    if run.trainers:
        counts["lro.step_counts"], shared["lro.prompts_per_update"] = lro.step_counts, lro.prompts_per_update
    for key, asked in counts.items():
        if missing := [count for count in asked if count not in DEFAULT_TIMESTEPS]:
            known = ", ".join(map(str, DEFAULT_TIMESTEPS))
            raise SettingsError(f"{key} asks for {missing[0]} steps, and the student samples in one of {known}")
    if run.trainers and run.num_steps not in lro.step_counts:
        raise SettingsError(
            f"run.num_steps = {run.num_steps} is what a tuned student is scored at, and lro.step_counts = "
            f"{lro.step_counts} is what it is tuned at; put {run.num_steps} there too, or leave run.trainers empty"
        )
    for key, count in shared.items():
        if count % processes:
            raise SettingsError(f"{key} = {count} cannot be shared by {processes} processes; use a multiple")
    for name in run.trainers:
        try:
            lro.check_estimator(TRAINERS[name].estimator_names)
        except ConfigError as error:
            raise SettingsError(f"section 'lro' does not fit run.trainers, which has {name!r}: {error}") from error


def check_reward(reward: lr.WeightedSum | None, lro: lr.LROConfig) -> None:
    """Check that a trainer can take the reward apart, where it is to.

    Raises:
        ConfigError: see :class:`~latent_rewards.lro.gradients.GradientAggregation`.
    """
    if lro.gradient_aggregation is not None:
        GradientAggregation(lro.gradient_aggregation, reward, [], lro.seed)


def _refuse_overridden(settings: Mapping[str, Any]) -> None:
    for name in ("distillation", "proxy", "lro"):
        section = settings[name]
        for setting in dataclasses.fields(section):
            value = getattr(section, setting.name)
            if setting.name in ("seed", "output_dir", "device") and value != setting.default:
                raise SettingsError(
                    f"{name}.{setting.name} = {value!r} has no effect: all stages take run.{setting.name}; set that one"
                )


def run_folder(run: RunConfig) -> Path:
    """Return the folder of a run.

    Raises:
        SettingsError: it, or one above it, is a file.
    """
    folder = Path(run.output_dir) / run.name
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise SettingsError(
                f"{place} is a file, and {folder} is where the run is kept; choose another output_dir or name"
            )
    return folder


def begun_with(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the settings a run's folder remembers, by section; nothing if it has none that can be read."""
    try:
        return dict(json.loads((folder / "settings" / "settings.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # where the file is damaged the folder says so itself
        return {}


def as_begun(settings: Mapping[str, Any], before: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sections with what may change between two starts of a run as it was at the first.

    Args:
        settings: section name -> dataclass.
        before: see :func:`begun_with`.
    """
    # In the other world, evaluation prompts are taken from those of the training.
    own = {"num_eval_prompts"} if settings["run"].world == "moving_digits" else set()
    kept = {name: copy.copy(section) for name, section in settings.items()}
    for name, section in kept.items():
        for setting in dataclasses.fields(section) if name in before else ():
            if setting.name in (FREE_RUN_SETTINGS | own if name == "run" else FREE_SETTINGS):
                # What an older version did not know had its default's effect.
                setattr(section, setting.name, before[name].get(setting.name, setting.default))
    return kept
