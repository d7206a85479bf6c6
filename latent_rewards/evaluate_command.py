r"""``latent-rewards evaluate``: what metrics say of a policy's samples, alone or against another policy's.

    latent-rewards evaluate runs/tuned/policy --baseline runs/student --prompts held_out.txt \
        --metric digits.legibility --metric motion.dynamic_degree --output runs/evaluation --html page.html

Both policies sample the same prompts from the same noise, so differences are paired. Intervals are 95 % and resample
prompts with all their samples. What is sampled and scored is kept in the output folder, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_rewards.collect_command import POLICIES, check_steps, codec_of, load_stored, make_oracle, prompt_lines
from latent_rewards.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from latent_rewards.dataset import RewardDataset

SHOWN = 6
"""Prompts of which the page shows a sample."""


def add_parser(rooms: Any) -> None:  # noqa: ANN401 - argparse's sub-parsers have no public type
    """Add the command to those of ``latent-rewards``."""
    from latent_rewards.cli import metric_spec

    command = rooms.add_parser(
        "evaluate",
        help="score a policy, alone or against another",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("policy", metavar="POLICY", help="the folder of a stored policy, such as a few-step student")
    command.add_argument("--baseline", metavar="FOLDER", help="another one, to compare with")
    command.add_argument("--prompts", required=True, metavar="FILE", help="prompts nothing was tuned on, one a line")
    command.add_argument(
        "--metric", type=metric_spec, action="append", required=True, help="NAME[,option=value ...]; may be repeated"
    )
    command.add_argument("--output", required=True, metavar="FOLDER", help="where samples, scores and result go")
    command.add_argument("--per-prompt", type=int, default=4, help="samples of each prompt (default: %(default)s)")
    command.add_argument("--num-steps", type=int, default=4, help="sampling steps (default: %(default)s)")
    command.add_argument("--baseline-steps", type=int, help="of the baseline (default: --num-steps)")
    command.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    command.add_argument("--batch-size", type=int, default=8, help="samples at once (default: %(default)s)")
    command.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: an accelerator if there is one)")
    command.add_argument("--kind", help="of the stored folders, where they do not say so themselves")
    command.add_argument("--html", metavar="FILE", help="also write a page with samples side by side")
    command.set_defaults(run=evaluate_command)


def evaluate_command(options: argparse.Namespace) -> int:
    """Sample, score and compare; returns 1 if a sample failed."""
    from latent_rewards.evaluation import compare
    from latent_rewards.report import check_page
    from latent_rewards.training.checkpoint import CheckpointError, write_whole
    from latent_rewards.training.devices import join_launch

    if options.per_prompt < 1:
        raise ConfigError(f"--per-prompt must be at least 1; got {options.per_prompt}")
    prompts = prompt_lines(options.prompts)
    check_page(options.html)
    _, device = join_launch(options.device)
    chosen = {"policy": (options.policy, options.num_steps)}
    if options.baseline:
        chosen["baseline"] = (options.baseline, options.baseline_steps or options.num_steps)
    loaded = {role: (load_stored(path, options.kind, [POLICIES]), steps) for role, (path, steps) in chosen.items()}
    for policy, steps in loaded.values():
        check_steps(policy, [steps])
    try:
        datasets = {role: _score(role, *made, prompts, options, device) for role, made in loaded.items()}
    except CheckpointError as error:
        raise DataError(str(error)) from error
    result = compare(datasets, len(prompts), seed=options.seed)
    output = Path(options.output)
    write_whole(output / "evaluation.json", json.dumps({**vars_of(options), "metrics": result}, indent=1))
    print(as_text(result))
    if options.html:
        write_page(Path(options.html), options, datasets, result, codec_of(loaded["policy"][0], options.policy), device)
        print(f"page: {options.html}")
    failures = [(role, index, why) for role, data in datasets.items() for index, why in data.failures.items()]
    for role, index, why in failures:
        print(f"failed: {role}, sample {index}: {why}", file=sys.stderr)
    return 1 if failures else 0


def vars_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the command line as JSON can hold it."""
    from latent_rewards.cli import metric_label

    kept = {name: value for name, value in vars(options).items() if name not in ("run", "metric")}
    return {**kept, "metric": [metric_label(*spec) for spec in options.metric]}


def _score(
    role: str,
    policy: Any,  # noqa: ANN401 - any stored policy
    num_steps: int,
    prompts: list[str],
    options: argparse.Namespace,
    device: torch.device,
) -> RewardDataset:
    from latent_rewards.collect import collect_rewards

    if hasattr(policy, "to"):
        policy = policy.to(device)
    codec = codec_of(policy, getattr(options, role))
    return collect_rewards(
        policy,
        prompts,
        make_oracle(codec, options.metric, device, chunk_size=options.batch_size),
        num_samples=len(prompts) * options.per_prompt,
        output_dir=Path(options.output) / role,
        seed=options.seed,
        num_steps=num_steps,
        batch_size=options.batch_size,
        progress=sys.stderr.isatty(),
    )


def as_text(result: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the comparison as lines."""
    lines = []
    for name, told in result.items():
        parts = [f"{role} {_cell(told[role])}" for role in ("policy", "baseline", "difference") if role in told]
        lines.append(f"{name}: " + ", ".join(parts))
    return "\n".join(lines)


def _cell(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"


def write_page(
    path: Path,
    options: argparse.Namespace,
    datasets: Mapping[str, RewardDataset],
    result: Mapping[str, Mapping[str, Any]],
    codec: Any,  # noqa: ANN401 - any Codec
    device: torch.device,
) -> None:
    """Write a page with the table, a histogram of each metric's differences, and samples side by side."""
    import torch

    from latent_rewards.evaluation import by_sample, side_by_side
    from latent_rewards.report import Report

    report = Report(f"Evaluation of {options.policy}")
    roles = [role for role in ("policy", "baseline", "difference") if role in next(iter(result.values()))]
    rows: list[list[str | float | int | None]] = [
        [name, *(_cell(told[role]) for role in roles), *([f"{100 * told['won']:.0f} %"] if "won" in told else [])]
        for name, told in result.items()
    ]
    won = ["policy is higher in"] if "difference" in roles else []
    report.add_table(
        ["metric", *roles, *won],
        rows,
        f"Means over {len(datasets['policy'])} samples of {len(set(datasets['policy'].prompts))} prompts, with 95 % "
        "intervals over prompts. Differences are of samples of the same prompt and noise.",
    )
    num_prompts = (len(datasets["policy"]) + len(datasets["policy"].failures)) // options.per_prompt
    shown, chosen = side_by_side(datasets, num_prompts, SHOWN)
    columns = {}
    for role, dataset in datasets.items() if shown else ():
        with torch.no_grad():
            columns[role] = codec.decode(dataset.latents(chosen[role]).to(device)).float().cpu()
    if shown:
        report.add_videos("Side by side", columns, shown)
    if "baseline" in datasets:
        for name in result:
            values = by_sample(datasets["policy"], name) - by_sample(datasets["baseline"], name)
            known = values[~values.isnan()].tolist()
            if known:
                report.add_histogram(f"{name}: policy minus baseline", known, "difference", "samples")
    report.add_settings(vars_of(options))
    report.save(path)
