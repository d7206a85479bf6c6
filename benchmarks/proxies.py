"""Proxies against baselines, their intervals, and what they say of strange latents; ``python -m benchmarks.proxies``.

Methods learn three rewards of moving digits from 256 to 2,048 samples of a student and are judged on samples of
prompts whose combinations of attributes nothing was trained on. Every (method, seed) is one file below
``results/proxies/``, written after each size, so the benchmark can be run in pieces; ``--summary`` makes a table of
what is there. Methods beside those of :mod:`benchmarks.proxy_baselines`:

- ``default``: ``train_proxy(dataset, encode=..., codec=...)``, one proxy of all rewards that reads prompts as the
  teacher does, and small frames as a tiny decoder draws them.
- ``default_latents``: without the codec, so from latents themselves.
- ``default_words``: without either, so that the words of prompts are hashed.
- ``default_single``: ``default``, but a proxy for each reward.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap, rankdata, spearmanr
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score
from torch import Tensor

import latent_rewards as lr
from benchmarks.provenance import provenance
from benchmarks.proxy_baselines import BASELINES, Features, features_of, fit_predict
from benchmarks.proxy_samples import HACKED, REWARDS, Amounts, ProxyWorld
from benchmarks.proxy_summary import summarise
from benchmarks.result_files import (
    RESULTS,
    add_results,
    check_settings,
    flat,
    read_result,
    read_results,
    write_result,
    write_whole,
)
from latent_rewards.contracts import ConfigError, unknown_name
from latent_rewards.proxies.calibration import Z_LEVEL
from latent_rewards.proxies.honesty import pairwise_accuracy
from latent_rewards.training.randomness import derive_seed

PROXIES = ("default", "default_latents", "default_words", "default_single")
METHODS = (*PROXIES, *BASELINES)
SIZES = (256, 512, 1024, 2048)
HACK_SIZE = 1024


class Comparison:
    """Fits methods on samples of a world and judges them.

    Args:
        world: the samples.
        hack_size: number of labels of the proxy that is hacked.
        config: settings of the proxies, whose seed and device are replaced; None takes the defaults.
    """

    def __init__(self, world: ProxyWorld, hack_size: int = HACK_SIZE, config: lr.ProxyConfig | None = None) -> None:
        self.world, self.hack_size, self.config = world, hack_size, config or lr.ProxyConfig(progress=False)
        self.heldout = world.heldout()
        self._features: dict[tuple[str, int | None], Features] = {}
        self._strange: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        """Return what results must share to stand in one file."""
        return {
            "student": self.world.student_digest,
            "latent_space": self.world.codec.fingerprint,
            "metrics": self.world.oracle.fingerprints,
            **vars(self.world.amounts),
            "hack_size": self.hack_size,
            **flat(proxy=self.config),
        }

    def measure(self, method: str, seed: int, size: int) -> dict[str, Any]:
        """Return the scores of a method after ``size`` labels, per reward, and what only proxies have."""
        pool = self.world.pool(seed)
        if method in PROXIES:
            return {**self._measure_proxy(method, pool.select(range(size)), seed, size), **provenance()}
        training, unseen = self._read(method, pool, seed).first(size), self._read(method, self.heldout, None)
        labels = np.stack([pool.rewards[name][:size].numpy() for name in REWARDS], axis=1)
        begun = time.perf_counter()
        fitted = fit_predict(method, training, labels, pool.prompts[:size], unseen, seed)
        seconds = time.perf_counter() - begun
        scores = self._judge(dict(zip(REWARDS, fitted.T, strict=True)))
        return {"rewards": scores, "fit_seconds": seconds, **provenance()}

    def _measure_proxy(self, method: str, training: lr.RewardDataset, seed: int, size: int) -> dict[str, Any]:
        codec = self.world.codec if method in ("default", "default_single") else None
        trunk = self.config.trunk if codec is None else "pixels"
        config = dataclasses.replace(self.config, trunk=trunk, seed=seed, device=self.world.device)
        encode = None if method == "default_words" else self.world.embed
        parts = [only(training, name) for name in REWARDS] if method == "default_single" else [training]
        begun = time.perf_counter()
        proxies = [lr.train_proxy(part, config=config, encode=encode, codec=codec) for part in parts]
        seconds = time.perf_counter() - begun
        means: dict[str, np.ndarray] = {}
        stds: dict[str, np.ndarray] = {}
        for proxy in proxies:
            predicted = proxy.predict(self.heldout.latents().to(self.world.device), self.heldout.prompts)
            means |= {name: values.cpu().numpy() for name, values in predicted.mean.items()}
            stds |= {name: values.cpu().numpy() for name, values in predicted.std.items()}
        scores = self._judge(means)
        for name in REWARDS:
            inside = np.abs(self.heldout.rewards[name].numpy() - means[name]) <= Z_LEVEL * stds[name]
            scores[name]["coverage"] = coverage(inside, self.heldout.prompts, seed=seed)
        strangeness = self._strangeness(proxies[0], seed, size) if method == "default" else {}
        return {"rewards": scores, **strangeness, "fit_seconds": seconds}

    def _judge(self, predicted: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        return {name: judge(predicted[name], self.heldout.rewards[name].numpy()) for name in REWARDS}

    def _read(self, method: str, dataset: lr.RewardDataset, seed: int | None) -> Features:
        if (method, seed) not in self._features:
            self._features[method, seed] = features_of(method, dataset, self.world.teacher)
        return self._features[method, seed]

    def _strangeness(self, proxy: lr.RewardProxy, seed: int, size: int) -> dict[str, Any]:
        """Return the AUROC of the proxy's own score of strangeness, and how well the policy was hacked."""
        world, facts = self.world, {}
        if not self._strange:
            self._strange = {"noise": world.noise(), "textures": world.textures()}
        strange = dict(self._strange)
        if size == self.hack_size:
            hacked = world.hacked(proxy, seed)
            strange["hacked"] = hacked.latents()
            facts["hacked"] = {"heldout": self._told(proxy, self.heldout), "hacked": self._told(proxy, hacked)}
        usual = self._ood(proxy, self.heldout.latents())
        auroc = {name: separation(usual, self._ood(proxy, latents)) for name, latents in strange.items()}
        return {"auroc": auroc, **facts}

    def _ood(self, proxy: lr.RewardProxy, latents: Tensor) -> np.ndarray:
        prompts = [self.world.prompts[i % len(self.world.prompts)] for i in range(len(latents))]
        return proxy.predict(latents.to(self.world.device), prompts).ood[HACKED].cpu().numpy()

    def _told(self, proxy: lr.RewardProxy, samples: lr.RewardDataset) -> dict[str, float]:
        predicted = proxy.predict(samples.latents().to(self.world.device), samples.prompts)
        return {"proxy": float(predicted.mean[HACKED].mean()), "true": float(samples.rewards[HACKED].mean())}


def only(dataset: lr.RewardDataset, *names: str) -> lr.RewardDataset:
    """Return the dataset with some of its rewards."""
    return lr.RewardDataset.from_tensors(
        dataset.latents(),
        dataset.prompts,
        {name: dataset.rewards[name] for name in names},
        latent_space=dataset.latent_space,
        metric_fingerprints={name: dataset.metric_fingerprints[name] for name in names},
    )


def judge(predicted: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Return how well ``[n]`` predictions fit.

    Returns:
        ``spearman`` (0 for a constant prediction), ``ceiling`` (the highest Spearman that predictions without ties can
        reach where true values are tied, 0.866 for a balanced yes or no), ``pairwise`` (of two samples with different
        true values, how often the predictions are in that order, equal ones counting half), ``r2`` and ``mae``.
    """
    constant = bool((predicted == predicted[0]).all())
    ranks = rankdata(true)
    return {
        "spearman": 0.0 if constant else float(spearmanr(predicted, true).statistic),
        "ceiling": float(ranks.std() / np.arange(len(true)).std()),
        "pairwise": pairwise_accuracy(torch.from_numpy(predicted), torch.from_numpy(true)),
        "r2": float(r2_score(true, predicted)),
        "mae": float(mean_absolute_error(true, predicted)),
    }


def coverage(inside: np.ndarray, prompts: Sequence[str], *, seed: int, resamples: int = 2000) -> dict[str, float]:
    """Return the share of ``inside`` (bool ``[n]``) and its 95 % percentile interval over prompts.

    Prompts are drawn with all their samples, since samples of one prompt are wrong together.
    """
    _, groups = np.unique(np.asarray(prompts), return_inverse=True)
    covered, counts = np.bincount(groups, weights=inside), np.bincount(groups).astype(float)
    interval = bootstrap(
        (covered, counts),
        lambda hits, sizes, axis: hits.sum(axis) / sizes.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(derive_seed(seed, "coverage", 0)),
    ).confidence_interval
    return {"share": float(inside.mean()), "low": float(interval.low), "high": float(interval.high)}


def separation(usual: np.ndarray, strange: np.ndarray) -> float:
    """Return the AUROC: how often a strange sample scores above a usual one, equal scores counting half."""
    labels = np.concatenate([np.zeros(len(usual)), np.ones(len(strange))])
    return float(roc_auc_score(labels, np.concatenate([usual, strange])))


def open_result(path: Path, method: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file holds of a method and seed, or an empty result.

    Raises:
        ConfigError: it was measured with other samples.
    """
    if not path.is_file():
        return {"method": method, "seed": seed, "settings": dict(settings), "sizes": {}}
    result = read_result(path)
    check_settings(path, result.get("settings", {}), settings)
    return result


def run(
    measure: Callable[[str, int, int], dict[str, Any]],
    settings: Mapping[str, Any],
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    sizes: Sequence[int],
    folder: Path,
) -> None:
    """Measure what ``folder`` does not hold yet, and write each file after each size.

    Raises:
        ConfigError: see :func:`open_result`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {(method, seed): folder / f"{method}-seed{seed}.json" for seed in seeds for method in methods}
    results = {key: open_result(path, *key, settings) for key, path in files.items()}
    for (method, seed), result in results.items():
        for size in sizes:
            if str(size) in result["sizes"]:
                continue
            result["sizes"][str(size)] = entry = measure(method, seed, size)
            write_result(files[method, seed], result)
            told = {name: round(scores["spearman"], 3) for name, scores in entry["rewards"].items()}
            print(f"{method}, seed {seed}, {size} labels: Spearman {told}, {entry['fit_seconds']:.0f} s", flush=True)


def main() -> None:
    """Read the command line, measure, or aggregate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, help="folder that student.save_pretrained wrote")
    parser.add_argument("--teacher", default="recipes/moving_digits/weights/teacher", help="pipeline folder")
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of labels")
    parser.add_argument("--hack-size", type=int, default=HACK_SIZE, help="labels of the proxy that is hacked")
    parser.add_argument("--runs", type=Path, default=Path("runs/proxies"), help="where samples are kept")
    add_results(parser, RESULTS / "proxies")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--summary", action="store_true", help="only aggregate the results that are there")
    for field in dataclasses.fields(Amounts):
        kind = float if field.name == "hack_rate" else int
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="see Amounts")
    options = parser.parse_args()
    if not options.summary:
        amounts = Amounts(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Amounts)})
        check_request(options.methods, options.sizes, options.student, amounts)
        world = ProxyWorld(options.student, options.teacher, options.runs, amounts, options.device)
        comparison = Comparison(world, options.hack_size)
        chosen = {"methods": options.methods, "seeds": options.seeds, "sizes": options.sizes}
        run(comparison.measure, comparison.settings(), **chosen, folder=options.results)
    results = read_results(options.results, "*-seed*.json")
    write_whole(options.results / "summary.md", markdown := summarise(results, METHODS, REWARDS))
    print(markdown)


def check_request(methods: Sequence[str], sizes: Sequence[int], student: Path | None, amounts: Amounts) -> None:
    """Refuse before any work what could not be measured.

    Raises:
        ConfigError: an unknown method, more labels than samples, or no student.
    """
    for method in methods:
        if method not in METHODS:
            raise ConfigError(unknown_name("method", method, METHODS))
    if max(sizes) > amounts.pool:
        raise ConfigError(f"{max(sizes)} labels are more than the pool's {amounts.pool} samples; raise --pool")
    if student is None:
        raise ConfigError("no student; pass --student FOLDER, a folder that student.save_pretrained wrote")


if __name__ == "__main__":
    main()
