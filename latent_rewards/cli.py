"""``latent-rewards``: the library from a shell.

    latent-rewards metrics list "motion.*"
    latent-rewards metrics info motion.flow_direction
    latent-rewards metrics check my_pkg.my_mod:score
    latent-rewards metrics score videos/ --metric quality.sharpness --metric motion.flow_direction,direction=left
    latent-rewards metrics score videos/ --metric quality.blur,resize=128,frames=uniform:8 --html page.html
    latent-rewards fit rewards/ --output proxy
    latent-rewards tune runs/student --proxy proxy --prompts prompts.txt --dataset rewards/ --output runs/tuned
    latent-rewards evaluate runs/tuned/policy --baseline runs/student --prompts held_out.txt --metric ... --output eval/
    latent-rewards report proxy/ --html page.html

A metric is a registered name or ``pkg.mod:attr``, with options after commas.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_rewards import collect_command, evaluate_command, fit_command, report_command, tune_command
from latent_rewards.errors import ConfigError, DataError, LatentRewardsError
from latent_rewards.training.flags import yaml_value

if TYPE_CHECKING:
    from torch import Tensor

    from latent_rewards.metrics import Metric

Row = dict[str, float | str]


def metric_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Read ``name,option=value,...``; values are YAML, so numbers and true are what they look like.

    Raises:
        argparse.ArgumentTypeError: an option without a value, or one that is no YAML.
    """
    name, *options = re.split(r",(?![^\[]*\])", text)  # commas in a list separate no options
    pairs = [option.partition("=") for option in options]
    if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
        raise argparse.ArgumentTypeError(f"{text!r}: options are name=value; got {wrong[0]!r}")
    return name, {key.strip(): yaml_value(value) for key, _, value in pairs}


def list_command(options: argparse.Namespace) -> int:
    """Print the metrics that match a pattern as a table."""
    from latent_rewards.metrics import list_metrics
    from latent_rewards.metrics.registry import metric_table

    if not list_metrics(options.pattern, available=options.available):
        here = " here that is available" if options.available else ""
        raise ConfigError(f"no metric{here} matches {options.pattern!r}; `latent-rewards metrics list` shows all")
    print(metric_table(options.pattern, available=options.available), end="")
    return 0


def info_command(options: argparse.Namespace) -> int:
    """Print what a metric says of itself, with its options and fingerprint, as JSON; 1 if it cannot be made here."""
    from latent_rewards.metrics import create_metric
    from latent_rewards.metrics.registry import metric_info

    name, settings = options.metric
    facts = dataclasses.asdict(metric_info(name))
    try:
        metric = create_metric(name, **settings)
    except ConfigError:
        raise
    except LatentRewardsError as error:  # without its weight files, for instance
        print(json.dumps({**facts, "not_available": str(error)}, indent=1, default=str))
        return 1
    facts = {**metric.info, "options": metric.options, "fingerprint": metric.fingerprint}
    print(json.dumps(facts, indent=1, default=str))
    return 0


def check_command(options: argparse.Namespace) -> int:
    """Test everything a metric promises."""
    from latent_rewards.metrics import check_metric, create_metric

    name, settings = options.metric
    check_metric(create_metric(name, **settings), seed=options.seed)
    print(f"{name}: keeps its promises")
    return 0


def score_command(options: argparse.Namespace) -> int:
    """Score the videos of a folder; returns 1 if a video or a metric failed."""
    from latent_rewards.metrics import create_metric
    from latent_rewards.report import check_file, check_page, write_file
    from latent_rewards.video import check_frames, check_named, find_videos, prompt_of, read_prompts

    check_frames(options.frames)
    files = find_videos(options.folder)
    prompts = read_prompts(options.prompts)
    check_named(prompts, files)
    check_page(options.html)
    if options.csv:
        check_file(options.csv)
    makers = {metric_label(*spec): partial(create_metric, spec[0], **spec[1]) for spec in options.metric}
    # Made before any decoding: an unknown name or option fails now, and weights are loaded once.
    metrics = {label: make() for label, make in makers.items()}
    rows, faults = score_files(files, makers, metrics, prompts, options)
    if options.csv:
        write_file(options.csv, as_csv(rows, [*makers]))
    print(as_table(rows, [*makers]), end="")
    if options.html:
        from latent_rewards.score_page import score_page

        def prompt(name: str) -> str | None:
            return prompt_of(files[name], name, prompts)

        score_page(options.folder, rows, metrics, files, prompt, faults, options.frames).save(options.html)
    for fault in faults:
        print(f"failed: {fault}", file=sys.stderr)
    return 1 if faults else 0


def score_files(
    files: Mapping[str, Path],
    makers: Mapping[str, partial[Metric]],
    metrics: Mapping[str, Metric],
    prompts: dict[str, str],
    options: argparse.Namespace,
) -> tuple[list[Row], list[str]]:
    """Return a row of values for each video, one of which is in memory at a time, and what failed."""
    from tqdm import tqdm

    from latent_rewards.video import prompt_of, read_video

    rows: list[Row] = []
    faults: list[str] = []
    hidden = not sys.stderr.isatty()
    for name, file in tqdm(files.items(), desc="score", unit="video", dynamic_ncols=True, disable=hidden):
        row: Row = {"video": name}
        rows.append(row)
        try:
            clip = read_video(file, frames=options.frames, short_side=options.short_side)
        except LatentRewardsError as error:
            faults.append(str(error))
            continue
        for label, metric in metrics.items():
            try:
                if metric.needs_fps and "fps" not in makers[label].keywords:
                    metric = makers[label](fps=clip.fps)
                row[label] = score_clip(metric, clip.frames, prompt_of(file, name, prompts))
            except LatentRewardsError as error:
                faults.append(f"{name}: {error}")
    return rows, faults


def score_clip(metric: Metric, frames: Tensor, prompt: str | None) -> float:
    """Return a metric's value for the frames ``[T, C, H, W]`` of one clip.

    Raises:
        DataError: the metric needs a prompt and there is none, or it cannot score such frames.
        MetricError: the metric failed.
    """
    if metric.needs_prompt and prompt is None:
        raise DataError(
            f"metric {metric.name!r} needs a prompt: put it beside the video as a .txt file, or use --prompts"
        )
    return float(metric(frames[None], None if prompt is None else [prompt])[0])


def metric_label(name: str, settings: dict[str, Any]) -> str:
    """Return the name of a metric's column: two configurations of one metric have two."""
    return ",".join([name, *(f"{key}={value}" for key, value in settings.items())])


def as_table(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Return rows as an aligned table with the mean of each column; a value that is missing is a dash."""
    means: Row = {"video": "mean"}
    for label in labels:
        known = [value for row in rows if isinstance(value := row.get(label), float) and value == value]
        if known:
            means[label] = sum(known) / len(known)
    cells = [["video", *labels]]
    for row in [*rows, means]:
        values = [row.get(label) for label in labels]
        cells.append([str(row["video"]), *("-" if value is None else f"{value:.4g}" for value in values)])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = (
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines) + "\n"


def as_csv(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Return rows as CSV; a value that is missing is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["video", *labels], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="latent-rewards", description=__doc__, formatter_class=style)
    rooms = parser.add_subparsers(required=True, metavar="COMMAND")
    metrics = rooms.add_parser("metrics", help="list, describe, test and run metrics").add_subparsers(
        required=True, metavar="ACTION"
    )

    command = metrics.add_parser("list", help=list_command.__doc__)
    command.add_argument("pattern", nargs="?", default="*", help='shell-style, such as "motion.*" (default: all)')
    command.add_argument("--available", action="store_true", help="only those whose modules and weights are here")
    command.set_defaults(run=list_command)

    command = metrics.add_parser("info", help=info_command.__doc__)
    command.add_argument("metric", type=metric_spec, help="NAME[,option=value ...]")
    command.set_defaults(run=info_command)

    command = metrics.add_parser("check", help=check_command.__doc__)
    command.add_argument("metric", type=metric_spec, help="NAME[,option=value ...]")
    command.add_argument("--seed", type=int, default=0, help="of the invented videos (default: %(default)s)")
    command.set_defaults(run=check_command)

    command = metrics.add_parser("score", help="score a video, or those of a folder, as a table")
    command.add_argument("folder", help="a video, or a folder that is searched for videos")
    command.add_argument(
        "--metric", type=metric_spec, action="append", required=True, help="NAME[,option=value ...]; may be repeated"
    )
    command.add_argument("--prompts", help="file of lines video<TAB>prompt (default: the .txt beside each video)")
    command.add_argument(
        "--frames", default="first:64", help="all, first:N or uniform:N frames of each video (default: %(default)s)"
    )
    command.add_argument("--short-side", type=int, help="shrink the shorter side to so many pixels (default: as it is)")
    command.add_argument("--csv", help="also write the values to this file")
    command.add_argument("--html", help="also write a page of the best and worst clips of each metric to this file")
    command.set_defaults(run=score_command)
    for room in (collect_command, fit_command, tune_command, evaluate_command, report_command):
        room.add_parser(rooms)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 if some of the work failed, 2 if it could not begin."""
    options = build_parser().parse_args(arguments)
    from latent_rewards.training.settings import SettingsError

    try:
        return int(options.run(options))
    except (LatentRewardsError, SettingsError, ImportError) as error:
        print(f"latent-rewards: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from latent_rewards.training.loop import NonFiniteError

        if not isinstance(error, NonFiniteError):
            raise
        print(f"latent-rewards: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
