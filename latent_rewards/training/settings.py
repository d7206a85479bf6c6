"""YAML files whose sections are dataclasses: one stage, one dataclass, one section; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import yaml


class SettingsError(ValueError):
    """A settings file cannot be used; the message names file, section, key and the nearest known name."""


def read_settings(path: str | Path, sections: Mapping[str, type]) -> dict[str, Any]:
    """Read a YAML file with one mapping per section into dataclasses.

    Args:
        path: the file, read with ``safe_load``.
        sections: section name -> dataclass. A section that the file leaves out gets its defaults.

    Returns:
        ``{section name: dataclass instance}``.

    Raises:
        SettingsError: the file is missing or no mapping, a section or key is unknown, or a value is refused.
    """
    file = Path(path)
    if not file.is_file():
        raise SettingsError(f"no settings file {file}; give the path of a YAML file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} must hold sections ({', '.join(sections)}); got a {type(content).__name__}")
    _refuse_unknown(str(file), "section", content, list(sections))
    return {name: read_section(file, name, kind, content.get(name) or {}) for name, kind in sections.items()}


def read_section(file: str | Path, name: str, kind: type, values: Any) -> Any:  # noqa: ANN401 - any dataclass
    """Return ``kind(**values)``, checked.

    Raises:
        SettingsError: see :func:`read_settings`.
    """
    from trl import TrlParser

    where = f"{file}, section {name!r}"
    if not isinstance(values, dict):
        raise SettingsError(f"{where} must be a mapping; got {values!r}")
    _refuse_unknown(where, "key", values, [field.name for field in dataclasses.fields(kind)])
    try:
        (section,) = TrlParser(cast(Any, kind)).parse_dict(_texts(kind, _numbers(kind, values)))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{where}: {error}") from error
    return section


def check_types(settings: Any, error: type[ValueError]) -> None:  # noqa: ANN401 - any dataclass instance
    """Refuse what a dataclass does not: values of another type than their field's, and numbers that are not finite.

    Args:
        settings: its fields are numbers, texts, truth values, choices, lists of these, or one of them or None; fields
            of other types are left alone.
        error: what is raised.

    Raises:
        error: a value is none of its field; the message names the field, the value and what it must be.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if not _fits(value, hint):
            raise error(f"{field.name} must be {_told(hint)}; got {value!r}")


def _fits(value: Any, hint: Any) -> bool:  # noqa: ANN401 - a value and a type hint
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True


def _told(hint: Any) -> str:  # noqa: ANN401 - a type hint
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_told(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"a list, each item {_told(get_args(hint)[0])}"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    known = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "None"}
    return known.get(hint, str(hint))


def _refuse_unknown(where: str, what: str, found: Mapping[str, Any], known: list[str]) -> None:
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise SettingsError(f"{where}: unknown {what} {name!r}; {hint}")


def _numbers(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn texts such as ``1e-3``, which YAML 1.1 does not read as numbers, into floats where a float is expected."""
    wanted = {field.name for field in dataclasses.fields(kind) if "float" in str(field.type).split("|")[0]}

    def number(value: Any) -> Any:  # noqa: ANN401
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    return {name: number(value) if name in wanted else value for name, value in values.items()}


def _texts(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn truth values, which YAML 1.1 makes of a bare ``no`` or ``yes``, into these words where they are choices."""
    hints = get_type_hints(kind)

    def text(name: str, value: Any) -> Any:  # noqa: ANN401
        parts = (hints[name], *get_args(hints[name]))
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        word = "yes" if value else "no"
        return word if isinstance(value, bool) and value not in choices and word in choices else value

    return {name: text(name, value) for name, value in values.items()}
