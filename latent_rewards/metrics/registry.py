"""Metrics by name: registration, creation and listing.

A name resolves in this order: what was registered in this session, the metrics built into this package, and the entry
points of other distributions (:mod:`~latent_rewards.metrics.plugins`). Names are case-sensitive at registration and at
look-up alike. ``"pkg.mod:attr"`` reaches a metric that nobody registered.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, TypeVar

from torch import nn

from latent_rewards.contracts import (
    ConfigError,
    DataError,
    DuplicateMetricError,
    LatentRewardsError,
    MetricError,
    UnknownMetricError,
    unknown_name,
)
from latent_rewards.digests import source_digest
from latent_rewards.metrics import plugins
from latent_rewards.metrics.metric import Metric, MetricInfo
from latent_rewards.metrics.signatures import (
    option_parameters,
    parameters_of,
    qualified_name,
    score_parameters,
    takes_any,
    takes_videos,
)
from latent_rewards.metrics.views import VIEW_OPTIONS, View, ViewedScore
from latent_rewards.metrics.weights import WeightsFile

Target = TypeVar("Target", bound=Callable[..., Any])

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class _Definition:
    """A registered metric before it has options."""

    info: MetricInfo
    target: Callable[..., Any]
    makes_score: bool
    weights: tuple[WeightsFile, ...] = ()

    def missing_modules(self) -> list[str]:
        """Return the required modules that cannot be imported here; none is imported to find out."""
        return [module for module in self.info.requires if not _is_importable(module)]

    def is_available(self) -> bool:
        """Whether every required module and weight file is here."""
        return not self.missing_modules() and all(_is_located(file) for file in self.weights)


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
    requires: tuple[str, ...] = (),
    install: str = "",
    weights: tuple[WeightsFile, ...] = (),
    cheats: tuple[str, ...] = (),
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
    info = MetricInfo(
        name=_checked_name(name),
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
        requires=requires,
        install=install,
        weights=tuple(file.name for file in weights),
        cheats=cheats,
    )
    return partial(_register, info, weights, override)


def _register(info: MetricInfo, weights: tuple[WeightsFile, ...], override: bool, target: Target) -> Target:
    if info.name in _DEFINITIONS and not override:
        taken = qualified_name(_DEFINITIONS[info.name].target)
        raise DuplicateMetricError(
            f"metric {info.name!r} is registered already, by {taken}; choose another name or override=True"
        )
    _DEFINITIONS[info.name] = replace(_define(info, target), weights=weights)
    return target


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"a metric's name is letters, digits, '_' and '-' in parts joined by dots; got {name!r}")
    return name


def create_metric(metric: str | Callable[..., Any] | Metric, **options: Any) -> Metric:  # noqa: ANN401 - options are the metric's own
    """Make a metric from a registered name, ``"pkg.mod:attr"``, a callable, or pass a :class:`Metric` through.

    A callable nobody registered is given a version made of its source text, so that its fingerprint changes with it.
    ``options`` are the metric's own and, whatever these are, ``frames``, ``resize``, ``batch_size`` and ``device`` of
    :class:`~latent_rewards.metrics.views.View`.

    Raises:
        UnknownMetricError: nothing has that name; close names are listed.
        ConfigError: an option the metric does not take, a malformed one, or a required one that is missing.
        MetricError: the metric could not be made (its import or constructor raised, or a module it requires is
            missing).
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


def list_metrics(pattern: str = "*", *, available: bool = False) -> list[str]:
    """Return the sorted names that match a shell-style, case-sensitive pattern such as ``"motion.*"``.

    With ``available``, only those whose required modules can be imported and whose weight files are found here. That
    imports the plugins that match; one that fails is a warning.
    """
    _load_built_in()
    plugins.load_plugin_modules()
    names = sorted(name for name in {*_DEFINITIONS, *plugins.plugin_metrics()} if fnmatchcase(name, pattern))
    return [name for name in names if _find_available(name)] if available else names


def metric_info(name: str) -> MetricInfo:
    """Return what a metric says of itself, without making it: weight files need not be here.

    Args:
        name: a registered name or ``"pkg.mod:attr"``.

    Raises:
        UnknownMetricError: nothing has that name; close names are listed.
        MetricError: importing it failed.
    """
    return (_load_dotted(name) if ":" in name else _look_up(name)).info


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
    if name not in _DEFINITIONS and name in plugins.plugin_metrics():
        found = _definition_of(plugins.load_plugin(plugins.plugin_metrics()[name]))
        # The plugin's module may have registered it under the very name of its entry point.
        _DEFINITIONS.setdefault(name, replace(found, info=replace(found.info, name=name)))
    if name not in _DEFINITIONS:
        plugins.load_plugin_modules()
    if name not in _DEFINITIONS:
        raise UnknownMetricError(unknown_name("metric", name, {*_DEFINITIONS, *plugins.plugin_metrics()}))
    return _DEFINITIONS[name]


def _find_available(name: str) -> bool:
    try:
        return _look_up(name).is_available()
    except MetricError as error:
        warnings.warn(f"metric {name!r} is left out: {error}", stacklevel=3)
        return False


def _is_importable(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _is_located(file: WeightsFile) -> bool:
    try:
        return file.locate().is_file()
    except DataError:
        return False


@cache
def _load_built_in() -> None:
    """Import every module of this package: each registers its metrics, and imports heavy libraries only when used."""
    package = importlib.import_module("latent_rewards.metrics")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


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
    needs_prompt = "prompts" in score_parameters(target)
    version = getattr(target, "version", None) or source_digest(target)
    return _define(MetricInfo(name=name or qualified_name(target), version=version, needs_prompt=needs_prompt), target)


def _define(info: MetricInfo, target: Callable[..., Any]) -> _Definition:
    """Check a target's signature against what its metric says of itself."""
    parameters = parameters_of(target)
    makes_score = inspect.isclass(target) or (inspect.isfunction(target) and not takes_videos(parameters))
    if info.needs_fps and "fps" not in parameters and not takes_any(parameters):
        raise ConfigError(f"metric {info.name!r} says needs_fps, so it must take an option `fps`")
    if not makes_score or inspect.isclass(target):
        scored = score_parameters(target)
        wanted = scored.get("prompts")
        if info.needs_prompt and wanted is None and not takes_any(scored):
            raise ConfigError(f"metric {info.name!r} says needs_prompt, so it must be callable as (videos, *, prompts)")
        if wanted is not None and wanted.default is wanted.empty and not info.needs_prompt:
            raise ConfigError(f"metric {info.name!r} requires prompts: register it with needs_prompt=True")
    if not info.description:
        info = replace(info, description=(inspect.getdoc(target) or "").partition("\n")[0])
    return _Definition(info, target, makes_score)


def _instantiate(definition: _Definition, options: dict[str, Any]) -> Metric:
    info, target = definition.info, definition.target
    if missing := definition.missing_modules():
        remedy = info.install or "install what brings them"
        raise MetricError(f"metric {info.name!r} requires {', '.join(missing)}, not installed here: {remedy}")
    bound, view = _bind(definition, options)
    score: Any = target
    if definition.makes_score:
        try:
            score = target(**bound)
        except LatentRewardsError:
            raise
        except Exception as error:
            raise MetricError(f"metric {info.name!r} could not be made: {type(error).__name__}: {error}") from error
        if not callable(score):
            raise MetricError(f"metric {info.name!r} made a {type(score).__name__}, which cannot be called with videos")
    elif bound:
        score = partial(target, **bound)
    if isinstance(score, Metric):
        if view.options():
            raise ConfigError(f"metric {info.name!r} is made elsewhere; it does not take {', '.join(view.options())}")
        return score
    if view.options():
        if view.device is not None and definition.makes_score and isinstance(score, nn.Module):
            score.to(view.device)
        score = ViewedScore(score, view, info.name)
    described = {entry.name: getattr(info, entry.name) for entry in fields(MetricInfo)}
    shown = {**bound, **view.options()}
    return Metric(**described, score=score, options=shown, origin=_origin(info.name, target))


def _origin(name: str, target: Callable[..., Any]) -> str:
    """Return the module that makes a target when imported; empty where none brings back what the target holds."""
    lasting = (inspect.isroutine(target) or inspect.isclass(target)) and "<locals>" not in name
    return "" if name == qualified_name(target) and not lasting else getattr(target, "__module__", "")


def _bind(definition: _Definition, options: dict[str, Any]) -> tuple[dict[str, Any], View]:
    """Return the metric's own options with their defaults, and the view; ConfigError for one too many or too few."""
    info, parameters = definition.info, parameters_of(definition.target)
    named = option_parameters(parameters, makes_score=definition.makes_score)
    shown = {name: value for name, value in options.items() if name in VIEW_OPTIONS and name not in named}
    own = {name: value for name, value in options.items() if name not in shown}
    for option in own:
        if option not in named and not takes_any(parameters):
            takes = "" if named else " It takes none of its own."
            raise ConfigError(unknown_name(f"option of metric {info.name!r}:", option, {*named, *VIEW_OPTIONS}) + takes)
    missing = [name for name, p in named.items() if p.default is p.empty and name not in own]
    if missing:
        raise ConfigError(f"metric {info.name!r} requires the option(s) {', '.join(missing)}")
    view = View(**shown)
    view.check(info, own)
    return {**{name: p.default for name, p in named.items() if name not in own}, **own}, view


def metric_table(pattern: str = "*", *, available: bool = False) -> str:
    """Return a Markdown table of the metrics that :func:`list_metrics` returns, as the README shows it.

    No metric is made, so weight files need not be here.
    """
    headers = ["metric", "range", "better", "prompt", "weights", "won by", "what it measures"]
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    for name in list_metrics(pattern, available=available):
        try:
            info = metric_info(name)
        except MetricError as error:  # a plugin that fails must not hide the others
            lines.append(f"| `{name}` | – | – | – | – | – | {_one_line(str(error))} |")
            continue
        bounds = "any" if info.value_range is None else " to ".join(f"{bound:g}" for bound in info.value_range)
        better, prompt = ("higher" if info.higher_is_better else "lower"), ("yes" if info.needs_prompt else "no")
        weights, cheats = ", ".join(f"`{file}`" for file in info.weights) or "–", ", ".join(info.cheats) or "–"
        row = [f"`{name}`", bounds, better, prompt, weights, cheats, _one_line(info.description)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    """Return the first line of a text as a cell of a Markdown table."""
    return text.partition("\n")[0].rstrip(".").replace("|", "\\|")
