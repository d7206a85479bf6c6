"""What the signature and source of a callable say of it: whether it scores videos or makes what does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from latent_rewards.contracts import ConfigError

Parameters = dict[str, inspect.Parameter]


def parameters_of(target: Callable[..., Any]) -> Parameters:
    """Return the parameters of a call of ``target``.

    Raises:
        ConfigError: it has no signature (some functions written in C).
    """
    try:
        return dict(inspect.signature(target).parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{target!r} has no signature to read; wrap it in a function (videos)") from error


def score_parameters(target: Any) -> Parameters:  # noqa: ANN401 - a function, class or object
    """Return the parameters of the call that receives videos, whether ``target`` is a function, class or object."""
    if isinstance(target, nn.Module) or (inspect.isclass(target) and issubclass(target, nn.Module)):
        return parameters_of(target.forward)
    return parameters_of(target.__call__) if inspect.isclass(target) else parameters_of(target)


def option_parameters(parameters: Parameters, *, makes_score: bool) -> Parameters:
    """Return the parameters that are options: of a score, all but the videos and the prompts."""
    named = {name: p for name, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if makes_score:
        return named
    return {name: p for name, p in named.items() if name not in ("prompts", next(iter(parameters)))}


def takes_videos(parameters: Parameters) -> bool:
    """Whether a function has a positional parameter that must be given: then it scores, otherwise it makes a score."""
    first = next(iter(parameters.values()), None)
    if first is None:
        return False
    positional = first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
    return first.kind is first.VAR_POSITIONAL or (positional and first.default is first.empty)


def takes_any(parameters: Parameters) -> bool:
    """Whether any keyword may be passed."""
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def qualified_name(target: object) -> str:
    """Return ``module:name`` of a function or class, or of an object's class."""
    named = target if hasattr(target, "__qualname__") else type(target)
    return f"{named.__module__}:{named.__qualname__}"
