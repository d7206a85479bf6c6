"""Distil a many-step video diffusion teacher into a 1-4-step student.

The public names are imported when they are first used, so ``import distillation`` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillation.adversarial import (
        AdversarialHead as AdversarialHead,
        approximate_r1 as approximate_r1,
        discriminator_loss as discriminator_loss,
        generator_loss as generator_loss,
    )
    from distillation.baselines.decoupled import (
        DecoupledConfig as DecoupledConfig,
        DecoupledTrainer as DecoupledTrainer,
    )
    from distillation.baselines.progressive import (
        ProgressiveConfig as ProgressiveConfig,
        ProgressiveResult as ProgressiveResult,
        ProgressiveTrainer as ProgressiveTrainer,
    )
    from distillation.baselines.turbo import TurboConfig as TurboConfig, TurboTrainer as TurboTrainer
    from distillation.condition import TextCondition as TextCondition
    from distillation.config import DistillationConfig as DistillationConfig
    from distillation.consistency import (
        consistency_function as consistency_function,
        consistency_loss as consistency_loss,
        curriculum_pairs as curriculum_pairs,
        time_grid as time_grid,
    )
    from distillation.correspondence import (
        correspondence_loss as correspondence_loss,
        frame_matches as frame_matches,
        soft_flow as soft_flow,
    )
    from distillation.denoiser import (
        Denoiser as Denoiser,
        EmpiricalDenoiser as EmpiricalDenoiser,
        GaussianDenoiser as GaussianDenoiser,
        Prediction as Prediction,
        guided as guided,
    )
    from distillation.errors import DistillationError as DistillationError
    from distillation.families import Teacher as Teacher, load_teacher as load_teacher
    from distillation.features import BlockFeatures as BlockFeatures
    from distillation.monitors import (
        channel_std as channel_std,
        fake_score_lag as fake_score_lag,
        saturation as saturation,
    )
    from distillation.roles import SharedBase as SharedBase
    from distillation.sampler import ode_step as ode_step, sample_teacher as sample_teacher, transition as transition
    from distillation.schedule import (
        RectifiedFlow as RectifiedFlow,
        VariancePreserving as VariancePreserving,
        check_timesteps as check_timesteps,
    )
    from distillation.student import FewStepStudent as FewStepStudent
    from distillation.temporal import (
        feature_similarity_loss as feature_similarity_loss,
        frame_differences as frame_differences,
        frame_similarities as frame_similarities,
        temporal_consistency_loss as temporal_consistency_loss,
        temporal_vsd_loss as temporal_vsd_loss,
    )
    from distillation.trainer import (
        DistillationResult as DistillationResult,
        DistillationTrainer as DistillationTrainer,
        start_student as start_student,
    )
    from distillation.vsd import (
        VSDAnchor as VSDAnchor,
        backward_simulation as backward_simulation,
        fake_score_loss as fake_score_loss,
        sample_times as sample_times,
        vsd_gradient as vsd_gradient,
        vsd_loss as vsd_loss,
        vsd_target as vsd_target,
    )

_HOME = {
    "adversarial": ("AdversarialHead", "approximate_r1", "discriminator_loss", "generator_loss"),
    "baselines.decoupled": ("DecoupledConfig", "DecoupledTrainer"),
    "baselines.progressive": ("ProgressiveConfig", "ProgressiveResult", "ProgressiveTrainer"),
    "baselines.turbo": ("TurboConfig", "TurboTrainer"),
    "condition": ("TextCondition",),
    "config": ("DistillationConfig",),
    "consistency": ("consistency_function", "consistency_loss", "curriculum_pairs", "time_grid"),
    "correspondence": ("correspondence_loss", "frame_matches", "soft_flow"),
    "denoiser": ("Denoiser", "EmpiricalDenoiser", "GaussianDenoiser", "Prediction", "guided"),
    "errors": ("DistillationError",),
    "families": ("Teacher", "load_teacher"),
    "features": ("BlockFeatures",),
    "monitors": ("channel_std", "fake_score_lag", "saturation"),
    "roles": ("SharedBase",),
    "sampler": ("ode_step", "sample_teacher", "transition"),
    "schedule": ("RectifiedFlow", "VariancePreserving", "check_timesteps"),
    "student": ("FewStepStudent",),
    "temporal": (
        "feature_similarity_loss",
        "frame_differences",
        "frame_similarities",
        "temporal_consistency_loss",
        "temporal_vsd_loss",
    ),
    "trainer": ("DistillationResult", "DistillationTrainer", "start_student"),
    "vsd": (
        "VSDAnchor",
        "backward_simulation",
        "fake_score_loss",
        "sample_times",
        "vsd_gradient",
        "vsd_loss",
        "vsd_target",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'distillation' has no attribute {name!r}")
    value = getattr(import_module(f"distillation.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*globals(), *_MODULE_OF])
