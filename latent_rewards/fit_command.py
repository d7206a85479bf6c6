"""``latent-rewards fit``: from a reward dataset to a stored proxy with its report and card.

    latent-rewards fit rewards/ --output proxy
    latent-rewards fit rewards/ --output proxy --ensemble-size 5 --calibrate-mean isotonic --learning-curve
    latent-rewards fit rewards/ --output proxy --codec runs/student

With a codec the proxy reads small frames, as a tiny decoder draws them from latents (the trunk "pixels").
Every setting of ``ProxyConfig`` is a flag of the same name.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from latent_rewards.contracts import DataError

_READERS: dict[type, Callable[[str], Any]] = {int: int, float: float, str: str}


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


def add_parser(rooms: Any) -> None:  # noqa: ANN401 - argparse's sub-parsers have no public type
    """Add the command to those of ``latent-rewards``."""
    command = SettingsParser(
        prog="latent-rewards fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.settings = _proxy_config
    command.add_argument(
        "dataset", metavar="DATASET", help="the folder of a reward dataset, or of a finished collection"
    )
    command.add_argument("--output", required=True, metavar="FOLDER", help="where the proxy goes")
    command.add_argument(
        "--codec", metavar="FOLDER", help="a stored student or teacher with the codec the latents were decoded by"
    )
    command.add_argument("--kind", help="of the codec's folder, where it does not say so itself")
    command.set_defaults(run=fit_command)
    rooms.add_parser("fit", help="train a reward proxy on a dataset")
    rooms.choices["fit"] = command


def _proxy_config() -> type:
    from latent_rewards.proxies.config import ProxyConfig

    return ProxyConfig


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
    readers = [_READERS.get(kind, yaml.safe_load) for kind in kinds if kind is not type(None)]
    optional = type(None) in kinds

    def read(text: str) -> Any:  # noqa: ANN401
        return None if optional and text.lower() == "none" else readers[0](text)

    read.__name__ = getattr(kinds[0], "__name__", "value")
    return read


def chosen_settings(options: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Return the fields of ``settings`` that the command line gave."""
    names = {field.name for field in dataclasses.fields(settings)}
    return {name: value for name, value in vars(options).items() if name in names}


def fit_command(options: argparse.Namespace) -> int:
    """Train, print the report, and write the proxy."""
    from latent_rewards.collect_command import CODECS, POLICIES, codec_of, load_stored
    from latent_rewards.dataset import RewardDataset
    from latent_rewards.proxies import ProxyConfig, format_report, train_proxy
    from latent_rewards.training.checkpoint import CheckpointError

    trunk = {} if options.codec is None else {"trunk": "pixels"}
    config = ProxyConfig(**{"progress": sys.stderr.isatty(), **trunk, **chosen_settings(options, ProxyConfig)})
    try:
        dataset = RewardDataset.load(options.dataset)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    codec = None
    if options.codec is not None:
        codec = codec_of(load_stored(options.codec, options.kind, [CODECS, POLICIES]), options.codec)
    proxy = train_proxy(dataset, config=config, codec=codec)
    proxy.save_pretrained(options.output)
    print(format_report(proxy.report))
    print(f"\n{proxy} in {options.output}")
    return 0
