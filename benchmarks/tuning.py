"""Ways to tune the digits world's student towards ``digits.legibility``, and what they share.

A proxy starts from true scores of the untuned student's samples, which count as queries. The published ways query the
metric itself for every sample of every update, and one backpropagates through decoder and metric.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import latent_rewards as lr
from benchmarks.provenance import device_name
from benchmarks.proxies import only
from benchmarks.proxy_samples import NUM_STEPS, Amounts, ProxyWorld
from benchmarks.result_files import RESULTS, add_results, flat
from latent_rewards.contracts import Anchor, ConfigError, Oracle
from latent_rewards.digests import value_digest
from latent_rewards.rollout import rollout
from latent_rewards.training.checkpoint import MANIFEST
from latent_rewards.training.randomness import sample_noise
from recipes.moving_digits.benchmark import TUNED, training_prompts
from recipes.moving_digits.evaluation_set import selection_prompts
from recipes.moving_digits.metrics import SAMPLED_FRAMES, cut_digits, legibility_classifier
from recipes.moving_digits.world import parse_prompt

HOLDOUT = "digits.legibility_holdout"
NUM_PROMPTS = 2048
AT_ONCE = 100
"""Samples that are made and decoded in one piece."""

Source = Literal["refreshed", "frozen", "true", "decoded"]


@dataclass(frozen=True)
class Method:
    """One way to tune.

    Attributes:
        title: what tables and pictures call it.
        source: of the reward: a proxy that is refreshed or frozen, the metric itself, or the metric's gradient through
            the decoder.
        labels: true scores the proxy starts from; 0 without one.
        settings: what differs from :class:`~latent_rewards.LROConfig`'s defaults.
    """

    title: str
    source: Source
    labels: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trainer(self) -> type[lr.ReinforceTrainer] | type[lr.DifferentiableRewardTrainer]:
        """The trainer that has the method's estimator."""
        by_gradient = self.settings["estimator"] in lr.DifferentiableRewardTrainer.estimator_names
        return lr.DifferentiableRewardTrainer if by_gradient else lr.ReinforceTrainer


class TuningWorld:
    """A student, prompts to tune on and prompts to judge by, true scores, and proxies fitted on them.

    Args:
        samples: student, teacher, codec and pools of scored samples.
        folder: where runs are kept; proxies lie beside the pools.
        config: of the proxies; None takes the defaults with the trunk "pixels".
        rewards: names of the metrics that are tuned or guarded.

    Raises:
        DeviceError: there is no such device.
    """

    def __init__(
        self,
        samples: ProxyWorld,
        folder: Path,
        config: lr.ProxyConfig | None = None,
        rewards: Sequence[str] = (TUNED,),
    ) -> None:
        self.samples, self.folder, self.device, self.rewards = samples, folder, samples.device, tuple(rewards)
        self.student, self.codec = samples.student, samples.codec
        self.device_name = device_name(self.device)
        if self.device != "cpu":
            self.codec.chunk_size = AT_ONCE
        self.config = config or lr.ProxyConfig(trunk="pixels", progress=False)
        self.oracle = lr.MetricOracle(self.codec, self.rewards, chunk_size=AT_ONCE)
        self.holdout = lr.MetricOracle(self.codec, [HOLDOUT], chunk_size=AT_ONCE)

    def measured_with(self) -> dict[str, Any]:
        """Return what results must share, whichever the benchmark: the student, and how proxies are fitted."""
        return {"student": self.samples.student_digest, **flat(proxy=self.config)}

    def prompts(self, seed: int) -> list[str]:
        """Return what a seed tunes on: training prompts."""
        return training_prompts(NUM_PROMPTS, seed=seed)

    def dataset(self, seed: int, labels: int) -> lr.RewardDataset:
        """Return the first ``labels`` samples of a seed's pool with their true scores."""
        return only(self.samples.pool(seed).select(range(labels)), *self.rewards)

    def proxy(self, seed: int, labels: int, ensemble_size: int | None = None) -> lr.RewardProxy:
        """Return a proxy fitted on :meth:`dataset`, which is kept: another student or configuration has its own."""
        size = ensemble_size or self.config.ensemble_size
        rewards = "".join(f"-{name}" for name in self.rewards if name != TUNED)
        fitted = f"{self.samples.student_digest}-{value_digest(flat(proxy=self.config))}"
        folder = self.samples.folder / f"proxy-seed{seed}-{labels}-{size}{rewards}-{fitted}"
        if not (folder / MANIFEST).is_file():
            settings = {**vars(self.config), "seed": seed, "device": self.device, "ensemble_size": size}
            config = lr.ProxyConfig(**settings)
            dataset = self.dataset(seed, labels)
            proxy = lr.train_proxy(dataset, config=config, encode=self.samples.embed, codec=self.codec)
            proxy.save_pretrained(folder)
        return lr.RewardProxy.from_pretrained(folder, encode=self.samples.embed).to(self.device)

    def trainer(
        self,
        method: Method,
        policy: Any,  # noqa: ANN401 - any Policy
        config: lr.LROConfig,
        *,
        proxy: lr.RewardProxy | None = None,
        anchor: Anchor | None = None,
        reward: Any = None,  # noqa: ANN401 - a Reward
        callbacks: Sequence[Callable[[int, dict[str, float]], None]] = (),
    ) -> lr.ReinforceTrainer | lr.DifferentiableRewardTrainer:
        """Return the trainer of a method.

        Args:
            method: how it tunes.
            policy: what it tunes.
            config: settings; their seed is that of prompts and proxy.
            proxy: is copied; None takes that of the method's labels.
            anchor: holds the policy.
            reward: of several rewards.
            callbacks: called after each update.
        """
        oracle: Oracle | None = None
        dataset = None
        scorer: Any
        if method.source == "true":
            scorer = lr.TrueReward(self.oracle)
        elif method.source == "decoded":
            scorer = lr.DecodedReward(self.codec, {TUNED: differentiable_legibility}, chunk_size=24)
        else:
            scorer = copy.deepcopy(self.proxy(config.seed, method.labels) if proxy is None else proxy)
            if method.source == "refreshed":
                oracle, dataset = self.oracle, self.dataset(config.seed, method.labels)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="no oracle|one reward and no holdout")  # it is what is compared
            return method.trainer(
                policy,
                scorer,
                self.prompts(config.seed),
                config=config,
                reward=reward,
                oracle=oracle,
                dataset=dataset,
                anchor=anchor,
                callbacks=callbacks,
            )

    @torch.no_grad()
    def sample(self, policy: Any, prompts: Sequence[str], stage: str) -> Tensor:  # noqa: ANN401 - any policy
        """Return latents ``[N, C, F, H, W]`` of a policy, a function of the stage and of the place in the list."""
        parts, shape = [], self.student.latent_shape()
        for start in range(0, len(prompts), AT_ONCE):
            rows = range(start, min(start + AT_ONCE, len(prompts)))
            stack = [sample_noise(0, f"{stage}/{k}", 0, rows, shape, device=self.device) for k in range(NUM_STEPS)]
            condition = policy.encode([prompts[i] for i in rows]).to(self.device)
            parts.append(rollout(policy, condition, torch.stack(stack), NUM_STEPS).final)
        return torch.cat(parts)

    def true_scores(self, policy: Any, prompts: Sequence[str], stage: str) -> dict[str, float]:  # noqa: ANN401
        """Return the mean true scores of a policy's samples; these do not count as queries."""
        scores = self.oracle(self.sample(policy, prompts, stage), list(prompts))
        return {name: float(values.mean()) for name, values in scores.items()}

    def true_score(self, policy: Any, prompts: Sequence[str], stage: str) -> float:  # noqa: ANN401 - any policy
        """Return the mean of ``digits.legibility``; see :meth:`true_scores`."""
        return self.true_scores(policy, prompts, stage)[TUNED]

    def heldout_prompts(self, count: int) -> list[str]:
        """Return ``count`` prompts of held-out combinations of attributes, each as often as any other."""
        return [self.samples.prompts[i % len(self.samples.prompts)] for i in range(count)]

    def heldin_prompts(self, count: int) -> list[str]:
        """Return ``count`` prompts that settings may be chosen on: held-in combinations and phrasings."""
        return selection_prompts(count)


def differentiable_legibility(videos: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return ``digits.legibility`` with a gradient: the same cuts, and the classifier's weights as torch sees them."""
    classifier = legibility_classifier()
    frames = videos[:, [f for f in SAMPLED_FRAMES if f < videos.shape[1]]]
    hidden = cut_digits(frames.flatten(0, 1))
    layers = list(zip(classifier.coefs_, classifier.intercepts_, strict=True))
    for index, (weight, bias) in enumerate(layers):
        hidden = hidden @ torch.as_tensor(weight).to(hidden) + torch.as_tensor(bias).to(hidden)
        if index + 1 < len(layers):
            hidden = hidden.relu()
    probabilities = hidden.softmax(dim=1).unflatten(0, frames.shape[:2]).mean(dim=1)
    digits = torch.tensor([parse_prompt(prompt).digit for prompt in prompts], device=videos.device)
    return probabilities.gather(1, digits[:, None])[:, 0]


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add what every benchmark of tuning is told: student, device and folders."""
    parser.add_argument("--student", type=Path, help="folder that student.save_pretrained wrote")
    parser.add_argument("--teacher", default="recipes/moving_digits/weights/teacher", help="pipeline folder")
    parser.add_argument("--samples", type=Path, default=Path("runs/proxies/samples"), help="pools of scored samples")
    parser.add_argument("--runs", type=Path, default=Path("runs") / name, help="where runs are kept")
    add_results(parser, RESULTS / name)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")


def open_samples(options: argparse.Namespace) -> ProxyWorld:
    """Return the student's samples that the command line names.

    Raises:
        ConfigError: it names no student.
    """
    if options.student is None:
        raise ConfigError("no student; pass --student FOLDER, a folder that student.save_pretrained wrote")
    return ProxyWorld(options.student, options.teacher, options.samples, Amounts(), options.device)
