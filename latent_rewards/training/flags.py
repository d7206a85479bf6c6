"""Command lines whose flags are the fields of a dataclass: a single-stage command takes what a YAML section takes."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

_READERS: dict[type, Callable[[str], Any]] = {int: int, float: float, str: str}
_NONE = type(None)
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class SettingsParser(argparse.ArgumentParser):
    """Gets the flags of a dataclass when it is first used, so that building all commands does not import it."""

    settings: Callable[[], type] | None = None
    left_out: Sequence[str] = ()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Parse as usual, with the flags."""
        if self.settings is not None:
            settings, self.settings = self.settings, None
            add_settings(self, settings(), self.left_out)
        return super().parse_known_args(args, namespace)


def add_settings(parser: argparse.ArgumentParser, settings: type, left_out: Sequence[str] = ()) -> None:
    """Add a flag for every field of a dataclass; what is not given on the command line is not in the namespace.

    Args:
        parser: gets the flags, in a group named after the dataclass.
        settings: a dataclass whose docstring describes its fields under ``Attributes:``.
        left_out: fields that the command decides itself.
    """
    group = parser.add_argument_group(settings.__name__)
    described, hints = attribute_docs(settings), get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if field.name in left_out:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = f"{described.get(field.name, '')} (default: {default})".replace("%", "%%")
        flag = "--" + field.name.replace("_", "-")
        if hints[field.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(
                flag, type=_reader(hints[field.name]), default=argparse.SUPPRESS, metavar="VALUE", help=text
            )


def attribute_docs(settings: type) -> dict[str, str]:
    """Return ``{field: text}`` of the ``Attributes:`` section of a class's docstring, each text on one line."""
    _, _, section = (inspect.getdoc(settings) or "").partition("Attributes:\n")
    entries = re.split(r"^    (?=\w+:)", section.partition("\n\n")[0], flags=re.MULTILINE)[1:]
    pairs = (entry.partition(":") for entry in entries)
    return {name: " ".join(text.split()) for name, _, text in pairs}


def _reader(hint: Any) -> Callable[[str], Any]:  # noqa: ANN401 - a type hint
    """Return what turns a flag's text into a value of the type ``hint``; others than numbers and texts are YAML."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    readers = [str if _chooses_text(kind) else _READERS.get(kind, yaml_value) for kind in kinds if kind is not _NONE]
    optional = _NONE in kinds

    def read(text: str) -> Any:  # noqa: ANN401
        if optional and text.lower() == "none":
            return None
        value = readers[0](text)
        return [value] if get_origin(kinds[0]) is list and not isinstance(value, list) else value

    read.__name__ = getattr(kinds[0], "__name__", "value")
    return read


def yaml_value(text: str) -> Any:  # noqa: ANN401 - whatever it says
    """Read a value as YAML does, and ``1e-3``, which to YAML 1.1 is a text, as the number it is.

    Raises:
        argparse.ArgumentTypeError: it is no YAML.
    """
    try:
        return _with_numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid YAML: {error}") from error


def _with_numbers(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _chooses_text(kind: Any) -> bool:  # noqa: ANN401 - a type hint
    """Return whether all choices are texts, which YAML would not leave alone: to it ``no`` is false."""
    return get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind))


def chosen_settings(options: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Return the fields of ``settings`` that the command line gave."""
    names = {field.name for field in dataclasses.fields(settings)}
    return {name: value for name, value in vars(options).items() if name in names}
