"""Metrics by name: registration, creation and listing.

A name resolves in this order: what was registered in this session, the metrics built into this package, and the entry
points of other distributions in the group ``latent_rewards.metrics``. Names are case-sensitive at registration and at
look-up alike. ``"pkg.mod:attr"`` reaches a metric that nobody registered.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from torch import nn

from latent_rewards.contracts import (
    ConfigError,
    DuplicateMetricError,
    LatentRewardsError,
    MetricError,
    UnknownMetricError,
    unknown_name,
)
from latent_rewards.metrics.metric import Metric, MetricInfo

ENTRY_POINT_GROUP = "latent_rewards.metrics"

Target = TypeVar("Target", bound=Callable[..., Any])

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class _Definition:
    """A registered metric before it has options."""

    info: MetricInfo
    target: Callable[..., Any]
    makes_score: bool


_DEFINITIONS: dict[str, _Definition] = {}


def register_metric(
    name: str,
    *,
    version: str,
    value_range: tuple[float, float] | None = None,
    higher_is_better: bool = True,
    needs_prompt: bool = False,
    deterministic: bool = True,
    differentiable: bool = False,
    minimum_frames: int = 1,
    needs_fps: bool = False,
    batch_invariant: bool = True,
    may_be_nan: bool = False,
    description: str = "",
    licence: str = "",
    override: bool = False,
) -> Callable[[Target], Target]:
    """Register a function or class as a metric; used as a decorator, which returns its target unchanged.

    A function with a required positional parameter is the score itself: ``(videos)`` or ``(videos, *, prompts)``, and
    its further keyword parameters are options. A class, or a function with no required positional parameter, makes the
    score: its parameters are the options, and what it returns is called with the videos. The other arguments are the
    fields of :class:`MetricInfo`; ``description`` defaults to the first line of the docstring.

    Raises:
        ConfigError: the name or a field is malformed, or the signature does not fit ``needs_prompt`` or ``needs_fps``.
        DuplicateMetricError: the name is taken and ``override`` is false.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"a metric's name is letters, digits, '_' and '-' in parts joined by dots; got {name!r}")
    info = MetricInfo(
        name=name,
        version=version,
        value_range=value_range,
        higher_is_better=higher_is_better,
        needs_prompt=needs_prompt,
        deterministic=deterministic,
        differentiable=differentiable,
        minimum_frames=minimum_frames,
        needs_fps=needs_fps,
        batch_invariant=batch_invariant,
        may_be_nan=may_be_nan,
        description=description,
        licence=licence,
    )

    def register(target: Target) -> Target:
        if name in _DEFINITIONS and not override:
            taken = _DEFINITIONS[name].target
            raise DuplicateMetricError(
                f"metric {name!r} is registered already, by {_qualified(taken)}; choose another name or override=True"
            )
        _DEFINITIONS[name] = _define(info, target)
        return target

    return register


def create_metric(metric: str | Callable[..., Any] | Metric, **options: Any) -> Metric:  # noqa: ANN401 - options are the metric's own
    """Make a metric from a registered name, ``"pkg.mod:attr"``, a callable, or pass a :class:`Metric` through.

    A callable nobody registered is given a version made of its source text, so that its fingerprint changes with it.

    Raises:
        UnknownMetricError: nothing has that name; close names are listed.
        ConfigError: an option the metric does not take, or a required one that is missing.
        MetricError: the metric could not be made (its import or constructor raised).
    """
    if isinstance(metric, Metric):
        if options:
            raise ConfigError(f"metric {metric.name!r} is made already; options {sorted(options)} have no effect")
        return metric
    if isinstance(metric, str):
        definition = _load_dotted(metric) if ":" in metric else _look_up(metric)
    elif callable(metric):
        definition = _definition_of(metric)
    else:
        raise ConfigError(f"a metric is a name, 'pkg.mod:attr', a callable or a Metric; got {type(metric).__name__}")
    return _instantiate(definition, options)


def list_metrics(pattern: str = "*") -> list[str]:
    """Return the sorted names that match a shell-style, case-sensitive pattern such as ``"motion.*"``."""
    _load_built_in()
    _load_plugin_modules()
    return sorted(name for name in {*_DEFINITIONS, *_plugin_metrics()} if fnmatchcase(name, pattern))


def source_of(metric: str | Callable[..., Any] | Metric) -> tuple[str, str]:
    """Return ``(name, module)``: what :func:`create_metric` takes in another process once it has imported ``module``.

    Raises:
        UnknownMetricError: nothing has that name.
        ConfigError: the metric cannot be reached from another process; the message says why and what to do.
    """
    if isinstance(metric, str) and ":" not in metric and metric not in list_metrics():
        raise UnknownMetricError(unknown_name("metric", metric, list_metrics()))
    if isinstance(metric, str):
        name, module = metric, ""
        if metric in _DEFINITIONS:
            module = _DEFINITIONS[metric].target.__module__
    elif isinstance(metric, Metric):
        name, module = metric.name, metric.origin
    else:
        definition = _definition_of(metric)
        name, module = definition.info.name, getattr(metric, "__module__", "")
    if module == "__main__" or "<" in name or (not isinstance(metric, str) and not module):
        raise ConfigError(
            f"metric {name!r} cannot be imported by another process: define it at the top level of a module "
            "(not of the script that runs) and name it 'module:function'"
        )
    return name, module


def _look_up(name: str) -> _Definition:
    if name not in _DEFINITIONS:
        _load_built_in()
    if name not in _DEFINITIONS and name in _plugin_metrics():
        return _load_plugin_metric(_plugin_metrics()[name])
    if name not in _DEFINITIONS:
        _load_plugin_modules()
    if name not in _DEFINITIONS:
        raise UnknownMetricError(unknown_name("metric", name, {*_DEFINITIONS, *_plugin_metrics()}))
    return _DEFINITIONS[name]


@cache
def _load_built_in() -> None:
    """Import every module of this package: each registers its metrics, and imports heavy libraries only when used."""
    package = importlib.import_module("latent_rewards.metrics")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


@cache
def _plugins() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _plugin_metrics() -> dict[str, EntryPoint]:
    return {point.name: point for point in _plugins() if point.attr}


@cache
def _load_plugin_modules() -> None:
    for point in _plugins():
        if not point.attr:
            try:
                point.load()
            except Exception as error:  # a broken plugin must not take the others with it
                warnings.warn(f"entry point {point.name!r} ({point.value}) failed to load: {error}", stacklevel=2)


def _load_plugin_metric(point: EntryPoint) -> _Definition:
    try:
        target = point.load()
    except Exception as error:
        raise MetricError(f"metric {point.name!r}: entry point {point.value!r} failed to load: {error}") from error
    if point.name not in _DEFINITIONS:
        found = _definition_of(target)
        _DEFINITIONS[point.name] = replace(found, info=replace(found.info, name=point.name))
    return _DEFINITIONS[point.name]


def _load_dotted(path: str) -> _Definition:
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UnknownMetricError(f"metric {path!r}: there is no module {module_name!r} to import") from error
        raise MetricError(f"metric {path!r}: importing {module_name!r} failed: {error}") from error
    except Exception as error:
        raise MetricError(f"metric {path!r}: importing {module_name!r} failed: {error}") from error
    for part in attribute.split("."):
        public = [name for name in dir(found) if not name.startswith("_")]
        if not hasattr(found, part):
            raise UnknownMetricError(unknown_name(f"attribute of {module_name!r}", part, public))
        found = getattr(found, part)
    if not callable(found):
        raise UnknownMetricError(f"metric {path!r} is a {type(found).__name__}, which cannot be called")
    return _definition_of(found, name=path)


def _definition_of(target: Callable[..., Any], name: str = "") -> _Definition:
    for definition in _DEFINITIONS.values():
        if definition.target is target:
            return definition
    if isinstance(target, Metric):
        return _define(MetricInfo(**target.info), lambda: target)
    needs_prompt = "prompts" in _call_parameters(target)
    version = getattr(target, "version", None) or _source_hash(target)
    return _define(MetricInfo(name=name or _qualified(target), version=version, needs_prompt=needs_prompt), target)


def _define(info: MetricInfo, target: Callable[..., Any]) -> _Definition:
    """Check a target's signature against what its metric says of itself."""
    parameters = _parameters(target)
    makes_score = inspect.isclass(target) or (inspect.isfunction(target) and not _takes_videos(parameters))
    if info.needs_fps and "fps" not in parameters and not _takes_any(parameters):
        raise ConfigError(f"metric {info.name!r} says needs_fps, so it must take an option `fps`")
    if not makes_score or inspect.isclass(target):
        scored = _call_parameters(target)
        wanted = scored.get("prompts")
        if info.needs_prompt and wanted is None and not _takes_any(scored):
            raise ConfigError(f"metric {info.name!r} says needs_prompt, so it must be callable as (videos, *, prompts)")
        if wanted is not None and wanted.default is wanted.empty and not info.needs_prompt:
            raise ConfigError(f"metric {info.name!r} requires prompts: register it with needs_prompt=True")
    if not info.description:
        info = replace(info, description=(inspect.getdoc(target) or "").partition("\n")[0])
    return _Definition(info, target, makes_score)


def _instantiate(definition: _Definition, options: dict[str, Any]) -> Metric:
    info, target = definition.info, definition.target
    bound = _bind(definition, options)
    if definition.makes_score:
        try:
            score = target(**bound)
        except LatentRewardsError:
            raise
        except Exception as error:
            raise MetricError(f"metric {info.name!r} could not be made: {type(error).__name__}: {error}") from error
        if isinstance(score, Metric):
            return score
        if not callable(score):
            raise MetricError(f"metric {info.name!r} made a {type(score).__name__}, which cannot be called with videos")
    else:
        score = partial(target, **bound) if bound else target
    described = {entry.name: getattr(info, entry.name) for entry in fields(MetricInfo)}
    return Metric(**described, score=score, options=bound, origin=_origin(info.name, target))


def _origin(name: str, target: Callable[..., Any]) -> str:
    """Return the module that makes a target when imported; empty for an object, whose state no import brings back."""
    nameless = not (inspect.isroutine(target) or inspect.isclass(target)) and name == _qualified(target)
    return "" if nameless else getattr(target, "__module__", "")


def _bind(definition: _Definition, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with their defaults; ConfigError for one too many or too few."""
    parameters = _parameters(definition.target)
    named = {name: p for name, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if not definition.makes_score:
        named = {name: p for name, p in named.items() if name not in ("prompts", next(iter(parameters)))}
    for option in options:
        if option not in named and not _takes_any(parameters):
            takes = "" if named else " It takes none."
            raise ConfigError(unknown_name(f"option of metric {definition.info.name!r}:", option, named) + takes)
    missing = [name for name, p in named.items() if p.default is p.empty and name not in options]
    if missing:
        raise ConfigError(f"metric {definition.info.name!r} requires the option(s) {', '.join(missing)}")
    return {**{name: p.default for name, p in named.items() if name not in options}, **options}


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(target).parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{target!r} has no signature to read; wrap it in a function (videos)") from error


def _call_parameters(target: Any) -> dict[str, inspect.Parameter]:  # noqa: ANN401 - a function, class or object
    """Return the parameters of the call that receives videos, whether ``target`` is a function, class or object."""
    if isinstance(target, nn.Module) or (inspect.isclass(target) and issubclass(target, nn.Module)):
        return _parameters(target.forward)
    return _parameters(target.__call__) if inspect.isclass(target) else _parameters(target)


def _takes_videos(parameters: dict[str, inspect.Parameter]) -> bool:
    """Whether a function has a positional parameter that must be given: then it scores, otherwise it makes a score."""
    first = next(iter(parameters.values()), None)
    if first is None:
        return False
    positional = first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
    return first.kind is first.VAR_POSITIONAL or (positional and first.default is first.empty)


def _takes_any(parameters: dict[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _qualified(target: object) -> str:
    named = target if hasattr(target, "__qualname__") else type(target)
    return f"{named.__module__}:{named.__qualname__}"


def _source_hash(target: object) -> str:
    try:
        source = inspect.getsource(target if hasattr(target, "__qualname__") else type(target))  # type: ignore[arg-type]
    except (OSError, TypeError):
        return "0"
    return "source-" + hashlib.sha256(source.encode()).hexdigest()[:8]


def metric_table(pattern: str = "*") -> str:
    """Return a Markdown table of the registered metrics whose names match ``pattern``, as the README shows it."""
    lines = ["| metric | range | better | prompt | what it measures |", "|---|---|---|---|---|"]
    for name in list_metrics(pattern):
        metric = create_metric(name)
        bounds = "any" if metric.value_range is None else " to ".join(f"{bound:g}" for bound in metric.value_range)
        better, prompt = ("higher" if metric.higher_is_better else "lower"), ("yes" if metric.needs_prompt else "no")
        summary = metric.description.split("\n")[0].rstrip(".").replace("|", "\\|")
        lines.append(f"| `{name}` | {bounds} | {better} | {prompt} | {summary} |")
    return "\n".join(lines) + "\n"
