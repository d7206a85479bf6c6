"""``latent-rewards fit``: from a reward dataset to a stored proxy with its report and card.

    latent-rewards fit rewards/ --output proxy
    latent-rewards fit rewards/ --output proxy --ensemble-size 5 --calibrate-mean isotonic --learning-curve
    latent-rewards fit rewards/ --output proxy --codec runs/student

With a codec the proxy reads small frames, as a tiny decoder draws them from latents (the trunk "pixels").
Every setting of ``ProxyConfig`` is a flag of the same name.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from latent_rewards.errors import DataError
from latent_rewards.training.flags import SettingsParser, chosen_settings


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


def fit_command(options: argparse.Namespace) -> int:
    """Train, print the report, and write the proxy."""
    from latent_rewards.collect_command import CODECS, POLICIES, codec_of, load_stored
    from latent_rewards.dataset import RewardDataset
    from latent_rewards.proxies import ProxyConfig, format_report, train_proxy
    from latent_rewards.proxies.artefact import DESCRIPTION
    from latent_rewards.training.checkpoint import CheckpointError, check_target

    trunk = {} if options.codec is None else {"trunk": "pixels"}
    config = ProxyConfig(**{"progress": sys.stderr.isatty(), **trunk, **chosen_settings(options, ProxyConfig)})
    try:
        check_target(options.output, DESCRIPTION)  # now, not after the training
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
