"""The errors distillation raises on purpose: each names the thing, its value and the remedy."""

from __future__ import annotations


class DistillationError(Exception):
    """Base of every error this package raises on purpose."""


class DistillationConfigError(DistillationError, ValueError):
    """A setting is outside what it may be."""


class TimestepsError(DistillationError, ValueError):
    """A student's list of times cannot be sampled or exported."""


class StepCountError(DistillationError, ValueError):
    """A step count, or a step, that the student does not claim."""


class PredictionError(DistillationError, ValueError):
    """One kind of prediction does not determine another one, e.g. x0 from eps where alpha is 0."""


class NoiseError(DistillationError, ValueError):
    """Noise or latents of the wrong shape."""


class ConditionError(DistillationError, ValueError):
    """A condition is missing, or describes another number of samples than the latents."""


class MissingPartError(DistillationError, RuntimeError):
    """An object was built without the part this call needs."""
