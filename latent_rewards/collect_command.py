"""``latent-rewards collect``: from a stored policy, or from videos there are, to a reward dataset.

    latent-rewards collect --policy runs/student --prompts prompts.txt --metric quality.blur -n 2048 --output rewards
    latent-rewards collect --videos clips/ --codec runs/student --metric quality.blur --output rewards

The same command continues a collection that was interrupted. A folder names its kind in ``latent_rewards.json``; the
entry points of the groups ``latent_rewards.policies`` and ``latent_rewards.codecs`` say who loads which kind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_rewards.errors import ConfigError, DataError, LatentRewardsError, unknown_name

if TYPE_CHECKING:
    import torch

    from latent_rewards.contracts import Codec
    from latent_rewards.dataset import RewardDataset
    from latent_rewards.oracle import MetricOracle

POLICIES, CODECS = "latent_rewards.policies", "latent_rewards.codecs"
"""Entry-point groups: kind -> a function of a folder that returns a policy, or something that has a codec."""

SIDECAR = "latent_rewards.json"


def add_parser(rooms: Any) -> None:  # noqa: ANN401 - argparse's sub-parsers have no public type
    """Add the command to those of ``latent-rewards``."""
    from latent_rewards.cli import metric_spec

    style = argparse.RawDescriptionHelpFormatter
    command = rooms.add_parser(
        "collect",
        help="score a policy's samples, or videos, into a dataset",
        description=__doc__,
        formatter_class=style,
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--policy", metavar="FOLDER", help="a stored policy, such as a few-step student, to sample")
    source.add_argument("--videos", metavar="FOLDER", help="videos there are: a folder that is searched, or a file")
    command.add_argument("--codec", metavar="FOLDER", help="for --videos: a stored student or teacher with the codec")
    command.add_argument("--kind", help="of the stored folder, where it does not say so itself")
    command.add_argument(
        "--metric", type=metric_spec, action="append", required=True, help="NAME[,option=value ...]; may be repeated"
    )
    command.add_argument("--output", required=True, metavar="FOLDER", help="where the dataset goes")
    command.add_argument(
        "--prompts",
        metavar="FILE",
        help="with --policy: a prompt a line; with --videos: lines video<TAB>prompt (default: the .txt beside each)",
    )
    command.add_argument("-n", "--num-samples", type=int, help="with --policy: how many (default: one per prompt)")
    command.add_argument("--num-steps", type=int, default=4, help="sampling steps (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    command.add_argument("--batch-size", type=int, default=8, help="samples per stored part (default: %(default)s)")
    command.add_argument("--workers", type=int, default=0, help="processes that score meanwhile (default: %(default)s)")
    command.add_argument("--cache", metavar="FOLDER", help="keeps scores, so that no video is scored twice")
    command.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: an accelerator if there is one)")
    command.add_argument(
        "--frames", default="all", help="with --videos: all, first:N or uniform:N frames (default: %(default)s)"
    )
    command.add_argument("--short-side", type=int, help="with --videos: shrink the shorter side to so many pixels")
    command.set_defaults(run=collect_command)


def collect_command(options: argparse.Namespace) -> int:
    """Collect; returns 1 if a sample failed."""
    from latent_rewards.training.checkpoint import CheckpointError

    try:
        dataset = _from_policy(options) if options.policy else _from_videos(options)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    for name, values in dataset.rewards.items():
        known = values[~values.isnan()]
        spread = f"mean {known.mean():.4g}, {known.min():.4g} to {known.max():.4g}, " if len(known) else ""
        print(f"{name}: {spread}{len(known)} of {len(values)} scored")
    print(f"{len(dataset)} samples in {options.output}")
    for index, fault in dataset.failures.items():
        print(f"failed: sample {index}: {fault}", file=sys.stderr)
    return 1 if dataset.failures else 0


def _from_policy(options: argparse.Namespace) -> RewardDataset:
    from latent_rewards.collect import collect_rewards
    from latent_rewards.training.devices import join_launch

    if options.prompts is None:
        raise ConfigError("--policy needs --prompts: a file with one prompt a line")
    prompts = prompt_lines(options.prompts)
    _, device = join_launch(options.device)
    policy = load_stored(options.policy, options.kind, [POLICIES])
    check_steps(policy, [options.num_steps])
    if hasattr(policy, "to"):
        policy = policy.to(device)
    with _oracle(codec_of(policy, options.policy), options, device) as oracle:
        return collect_rewards(
            policy,
            prompts,
            oracle,
            num_samples=len(prompts) if options.num_samples is None else options.num_samples,
            output_dir=options.output,
            seed=options.seed,
            num_steps=options.num_steps,
            batch_size=options.batch_size,
            progress=sys.stderr.isatty(),
        )


def _from_videos(options: argparse.Namespace) -> RewardDataset:
    from latent_rewards.collect_videos import collect_videos
    from latent_rewards.training.devices import join_launch
    from latent_rewards.video import find_videos

    if options.codec is None:
        raise ConfigError("--videos needs --codec: the folder of a stored student or teacher whose codec encodes them")
    find_videos(options.videos)
    _, device = join_launch(options.device)
    stored = load_stored(options.codec, options.kind, [CODECS, POLICIES])
    with _oracle(codec_of(stored, options.codec), options, device) as oracle:
        return collect_videos(
            options.videos,
            oracle,
            prompts=options.prompts,
            output_dir=options.output,
            frames=options.frames,
            short_side=options.short_side,
            batch_size=options.batch_size,
            progress=sys.stderr.isatty(),
        )


def _oracle(codec: Codec, options: argparse.Namespace, device: torch.device) -> MetricOracle:
    settings = {"chunk_size": options.batch_size, "num_workers": options.workers, "cache_dir": options.cache}
    return make_oracle(codec, options.metric, device, **settings)


def make_oracle(
    codec: Codec,
    specs: Sequence[tuple[str, dict[str, Any]]],
    device: torch.device,
    **settings: Any,  # noqa: ANN401 - MetricOracle's
) -> MetricOracle:
    """Return the oracle of metrics given as names with options, after its codec was moved to ``device``."""
    from latent_rewards.cli import metric_label
    from latent_rewards.metrics import create_metric
    from latent_rewards.oracle import MetricOracle

    moved: Any = codec
    if hasattr(moved, "to"):
        moved.to(device)
    # A name that says all is handed on as it is: workers make of it what they could not make of the metric.
    metrics = {
        metric_label(name, options): create_metric(name, **options) if options else name for name, options in specs
    }
    return MetricOracle(codec, metrics, **settings)


def prompt_lines(path: str) -> list[str]:
    """Return the prompts of a file with one a line.

    Raises:
        DataError: it cannot be read, or holds none.
    """
    from latent_rewards.video import read_lines

    prompts = [line.strip() for line in read_lines(path)]
    if not prompts:
        raise DataError(f"prompts file {path} holds no prompt; write one a line")
    return prompts


def check_steps(policy: Any, counts: Sequence[int]) -> None:  # noqa: ANN401 - any stored policy
    """Check that a policy samples in so many steps; its own error may be of any kind.

    Raises:
        ConfigError: it does not.
    """
    for count in counts:
        try:
            policy.timesteps(count)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def load_stored(path: str, kind: str | None, groups: Sequence[str]) -> Any:  # noqa: ANN401 - what the loader returns
    """Return what a stored folder holds, made by the loader that an entry point names for its kind.

    Args:
        path: a folder.
        kind: of the folder; None reads it from the folder's ``latent_rewards.json``.
        groups: entry-point groups to look in, in order.

    Raises:
        DataError: there is no such folder, or it cannot be loaded.
        ConfigError: nobody loads that kind, or the folder does not say its kind.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{path} is no folder; give one that a policy or teacher was saved in")
    kind = kind or _stated_kind(folder)
    loaders = {point.name: point for group in reversed(groups) for point in entry_points(group=group)}
    if kind not in loaders:
        raise ConfigError(
            unknown_name(f"kind of {path}:", kind, loaders) + f" Loaders come from {' and '.join(groups)}."
        )
    try:
        return loaders[kind].load()(path)
    except LatentRewardsError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"{path} cannot be loaded as a {kind}: {error}") from error


def _stated_kind(folder: Path) -> str:
    try:
        kind = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} does not say what it holds (no {SIDECAR} with a kind); use --kind") from error
    return str(kind)


def codec_of(stored: Any, path: str) -> Codec:  # noqa: ANN401 - whatever a loader returned
    """Return the codec that a policy or teacher brings: itself, its ``codec``, or its exporter's.

    Raises:
        ConfigError: it brings none.
    """
    holders: list[Any] = [stored, getattr(stored, "codec", None)]
    holders.append(getattr(getattr(stored, "exporter", None), "codec", None))
    for holder in holders:
        if callable(getattr(holder, "decode", None)) and hasattr(holder, "fingerprint"):
            codec: Codec = holder
            return codec
    raise ConfigError(f"what {path} holds (a {type(stored).__name__}) brings no codec, so nothing can be decoded")
