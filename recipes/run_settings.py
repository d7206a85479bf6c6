"""What the sections of a DOLLAR run have to agree on before any work, and what of them its folder remembers."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import latent_rewards as lr
from distillation.config import FREE_SETTINGS
from distillation.student import DEFAULT_TIMESTEPS
from latent_rewards.contracts import ConfigError
from latent_rewards.lro.gradients import GradientAggregation
from latent_rewards.lro.trainers import LatentRewardTrainer
from latent_rewards.proxies.objectives import SCORE_OBJECTIVES
from latent_rewards.training.settings import SettingsError

FREE_RUN_SETTINGS = frozenset({"device", "output_dir", "trainers", "fps"})
"""Settings of a run that change nothing its folder keeps: each trainer has a student and rows of its own."""


@dataclass
class PromptsFacts:
    """What a prompts file was when the run began.

    Attributes:
        sha256: of its prompts.
    """

    sha256: str


def check_sections(
    settings: Mapping[str, Any], trainers: Mapping[str, type[LatentRewardTrainer]], processes: int
) -> None:
    """Check sections against one another: the last stages would refuse them after the first had taken days.

    Args:
        settings: section name -> dataclass.
        trainers: those of the run, by name.
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
    if trainers:
        counts["lro.step_counts"], shared["lro.prompts_per_update"] = lro.step_counts, lro.prompts_per_update
    for key, asked in counts.items():
        if missing := [count for count in asked if count not in DEFAULT_TIMESTEPS]:
            known = ", ".join(map(str, DEFAULT_TIMESTEPS))
            raise SettingsError(f"{key} asks for {missing[0]} steps, and the student samples in one of {known}")
    if trainers and run.num_steps not in lro.step_counts:
        raise SettingsError(
            f"run.num_steps = {run.num_steps} is what a tuned student is scored at, and lro.step_counts = "
            f"{lro.step_counts} is what it is tuned at; put {run.num_steps} there too, or leave run.trainers empty"
        )
    for key, count in shared.items():
        if count % processes:
            raise SettingsError(f"{key} = {count} cannot be shared by {processes} processes; use a multiple")
    for name, trainer in trainers.items():
        try:
            lro.check_estimator(trainer.estimator_names)
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
