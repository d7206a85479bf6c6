r"""``latent-rewards tune``: a stored policy and a stored proxy become a tuned policy.

    latent-rewards tune runs/student --proxy proxy --prompts prompts.txt --dataset rewards --output runs/tuned \
        --holdout quality.sharpness
    latent-rewards tune runs/student --proxy proxy --prompts prompts.txt --output runs/tuned --estimator smoothed \
        --weight digits.legibility=1 --weight motion.dynamic_degree=0.3

The true metrics are those the proxy was trained on; they refresh it while the policy changes (``--frozen`` leaves it as
it is, which invites the policy to exploit it). The same command continues a run that was interrupted. The output folder
gets ``policy``, the refreshed ``proxy``, ``result.json`` and the run's checkpoints; every setting of ``LROConfig`` is a
flag of the same name, and ``--estimator`` chooses between the proxy's gradient (the default) and REINFORCE.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_rewards.collect_command import POLICIES, check_steps, codec_of, load_stored, make_oracle, prompt_lines
from latent_rewards.errors import ConfigError, DataError
from latent_rewards.training.flags import SettingsParser, chosen_settings

if TYPE_CHECKING:
    from torch import Tensor

    from latent_rewards.lro.trainers import LatentRewardTrainer, TrainResult

DECIDED = ("output_dir", "progress")
"""Settings that the command decides."""


def add_parser(rooms: Any) -> None:  # noqa: ANN401 - argparse's sub-parsers have no public type
    """Add the command to those of ``latent-rewards``."""
    from latent_rewards.cli import metric_spec

    command = SettingsParser(
        prog="latent-rewards tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.settings, command.left_out = _lro_config, DECIDED
    command.add_argument("policy", metavar="POLICY", help="the folder of a stored policy, such as a few-step student")
    command.add_argument("--proxy", required=True, metavar="FOLDER", help="what `latent-rewards fit` wrote")
    command.add_argument("--prompts", required=True, metavar="FILE", help="training prompts, one a line")
    command.add_argument("--output", required=True, metavar="FOLDER", help="where everything goes")
    command.add_argument("--dataset", metavar="FOLDER", help="what the proxy was trained on, replayed at each refresh")
    command.add_argument(
        "--metric",
        type=metric_spec,
        action="append",
        help="NAME[,option=value ...] of a true metric; may be repeated (default: those the proxy's rewards are named "
        "after)",
    )
    command.add_argument("--frozen", action="store_true", help="never ask the true metrics, never refresh the proxy")
    command.add_argument(
        "--holdout", type=metric_spec, action="append", help="NAME[,option=value ...] of a metric that is not tuned on"
    )
    command.add_argument(
        "--weight",
        type=reward_weight,
        action="append",
        metavar="REWARD=WEIGHT",
        help="of a reward of a proxy that has several, compared in standard deviations; may be repeated (default: 1 "
        "each, and -1 where less is better)",
    )
    command.add_argument("--html", metavar="FILE", help="also write a page with the run's curves")
    command.add_argument("--kind", help="of the policy's folder, where it does not say so itself")
    command.set_defaults(run=tune_command)
    rooms.add_parser("tune", help="tune a policy on a proxy")
    rooms.choices["tune"] = command


def _lro_config() -> type:
    from latent_rewards.lro.config import LROConfig

    return LROConfig


def reward_weight(text: str) -> tuple[str, float]:
    """Read ``reward=weight``.

    Raises:
        argparse.ArgumentTypeError: there is no number after the last equals sign.
    """
    name, _, weight = text.rpartition("=")
    try:
        return name, float(weight)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not REWARD=WEIGHT with a number as weight") from error


def tune_command(options: argparse.Namespace) -> int:
    """Tune, print what became of the metrics, and write policy, proxy and result."""
    from latent_rewards.report import check_page
    from latent_rewards.training.checkpoint import CheckpointError, write_whole

    check_page(options.html, clips=False)
    try:
        trainer = make_trainer(options)
        result = trainer.train()
    except CheckpointError as error:
        raise DataError(str(error)) from error
    output = Path(options.output)
    save: Any = trainer.policy
    save.save_pretrained(output / "policy")
    proxy: Any = trainer.scoring.proxy
    proxy.save_pretrained(output / "proxy")
    write_whole(output / "result.json", json.dumps(dataclasses.asdict(result), indent=1))
    if options.html:
        from latent_rewards.tuning_page import tuning_page

        name = f"{trainer.estimator} towards {', '.join(proxy.reward_names)}"
        title = f"Tuning of {options.policy}"
        tuning_page(options.html, title, name, dataclasses.asdict(result), dataclasses.asdict(trainer.config))
    for line in told(result):
        print(line)
    print(f"policy in {output / 'policy'}")
    return 0


def make_trainer(options: argparse.Namespace) -> LatentRewardTrainer:
    """Return the trainer that the command line asks for; everything is read and checked before any work.

    Raises:
        LatentRewardsError: a part cannot be loaded or does not fit the others; the message says which.
    """
    from latent_rewards.cli import metric_spec
    from latent_rewards.dataset import RewardDataset
    from latent_rewards.directions import falling
    from latent_rewards.lro import DifferentiableRewardTrainer, LROConfig, ReinforceTrainer
    from latent_rewards.proxies import RewardProxy
    from latent_rewards.rewards import combined
    from latent_rewards.training.devices import join_launch

    settings = {"progress": sys.stderr.isatty(), **chosen_settings(options, LROConfig)}
    config = LROConfig(output_dir=str(Path(options.output) / "lro"), **settings)
    prompts = prompt_lines(options.prompts)
    _, device = join_launch(config.device)
    policy = load_stored(options.policy, options.kind, [POLICIES])
    check_steps(policy, config.step_counts)
    if not hasattr(policy, "save_pretrained"):
        raise ConfigError(f"what {options.policy} holds (a {type(policy).__name__}) cannot be saved after tuning")
    policy = policy.to(device)
    proxy = RewardProxy.from_pretrained(options.proxy, encode=prompt_encoder(policy))
    codec = codec_of(policy, options.policy)
    metrics = options.metric or [metric_spec(name) for name in proxy.reward_names]
    told = lower_is_better(metrics) & {*proxy.reward_names}
    by_score = config.estimator in ReinforceTrainer.estimator_names
    return (ReinforceTrainer if by_score else DifferentiableRewardTrainer)(
        policy,
        proxy,
        prompts,
        config=config,
        reward=combined(proxy.reward_names, options.weight, told | falling(proxy)),
        oracle=None if options.frozen else make_oracle(codec, metrics, device),
        dataset=RewardDataset.load(options.dataset) if options.dataset else None,
        holdout=make_oracle(codec, options.holdout, device) if options.holdout else None,
    )


def prompt_encoder(policy: Any) -> Any:  # noqa: ANN401 - any stored policy
    """Return texts -> token embeddings ``[N, L, D]``, as the policy reads them; a proxy of hashed words ignores it."""

    def encode(texts: Sequence[str]) -> Tensor:
        condition = policy.encode(list(texts))
        if not hasattr(condition, "embeddings"):
            raise ConfigError(
                f"the proxy reads prompts through a text encoder, and what {type(policy).__name__} makes of a prompt "
                "has no embeddings; fit the proxy without encode="
            )
        embeddings: Tensor = condition.embeddings
        return embeddings

    return encode


def lower_is_better(specs: Sequence[tuple[str, dict[str, Any]]]) -> set[str]:
    """Return which of the rewards, named by their metrics' names and options, should fall; others are not known."""
    from latent_rewards.cli import metric_label
    from latent_rewards.metrics import list_metrics
    from latent_rewards.metrics.registry import metric_info

    known = {*list_metrics()}
    found = [spec for spec in specs if spec[0] in known or ":" in spec[0]]
    return {metric_label(name, options) for name, options in found if not metric_info(name).higher_is_better}


def told(result: TrainResult) -> list[str]:
    """Return lines that say what a run did to proxy, truth and held-out metrics."""
    lines = []
    if result.true_curve:
        first, last = result.true_curve[0], result.true_curve[-1]
        for name, value in last["true"].items():
            lines.append(
                f"{name}: true {first['true'][name]:.4g} -> {value:.4g}, proxy {last['proxy'][name]:.4g} at update "
                f"{last['step']}"
            )
    if result.holdout_curve:
        chosen = next(point for point in result.holdout_curve if point["step"] == result.best_step)
        for name, value in chosen["values"].items():
            before = result.holdout_curve[0]["values"][name]
            lines.append(f"held-out {name}: {before:.4g} -> {value:.4g} at update {result.best_step}, which was kept")
    early = ", stopped early" if result.stopped_early else ""
    lines.append(f"{len(result.history)} updates{early}, {result.num_queries} true scores")
    return lines
