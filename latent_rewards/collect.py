"""Policy + codec + metrics -> RewardDataset.

Sample ``i`` has prompt ``i mod len(prompts)`` and noise that depends on ``(seed, i)`` only, so an interrupted
collection continues where it stopped and ends with the same dataset. Latents are decoded in bounded chunks and the
videos dropped.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latent_rewards.contracts import (
    Codec,
    ConfigError,
    DataError,
    MetricError,
    MetricOutputError,
    Policy,
    Prompt,
    check_latents,
    check_prompts,
    prompt_text,
)
from latent_rewards.dataset import COMPLETE, RewardDataset, join
from latent_rewards.training.checkpoint import commit_directory, verify_directory
from latent_rewards.training.randomness import sample_noise

GIVE_UP_AFTER = 16
"""Failing samples, with none scored yet, after which a collection stops instead of failing to its end."""

_SETTINGS = "settings"


class ScoresVideos(Protocol):
    """What the oracle needs of a metric; ``latent_rewards.metrics.Metric`` has it."""

    @property
    def name(self) -> str:
        """The metric's name, which becomes the reward's."""
        ...

    @property
    def fingerprint(self) -> str:
        """Name, version, options and weights."""
        ...

    def __call__(self, videos: Tensor, prompts: Sequence[Prompt] | None = None) -> Tensor:
        """Score videos ``[B, T, C, H, W]`` in [0, 1]; returns ``[B]``."""
        ...


MetricLike = str | ScoresVideos


class MetricOracle:
    """True rewards of latents: decode a chunk, score it with every metric, drop the videos.

    Args:
        codec: latents -> videos.
        metrics: metric names or metrics, whose names become the reward names; or ``{reward name: metric}``.
        chunk_size: most videos in memory at once.

    Raises:
        ConfigError: no metric, one name twice, or ``chunk_size`` below 1.
        UnknownMetricError: no metric has one of the names.
    """

    def __init__(
        self, codec: Codec, metrics: Sequence[MetricLike] | Mapping[str, MetricLike], *, chunk_size: int = 16
    ) -> None:
        if chunk_size < 1:
            raise ConfigError(f"chunk_size must be at least 1; got {chunk_size}")
        self.codec = codec
        self.chunk_size = chunk_size
        self.metrics: dict[str, ScoresVideos] = {}
        pairs = metrics.items() if isinstance(metrics, Mapping) else [(None, metric) for metric in _as_list(metrics)]
        for given_name, metric in pairs:
            scorer = _create(metric)
            name = given_name or scorer.name
            if name in self.metrics:
                raise ConfigError(f"two metrics are named {name!r}; pass {{reward name: metric}} instead")
            self.metrics[name] = scorer
        if not self.metrics:
            raise ConfigError("an oracle needs at least one metric")
        self.num_queries = 0

    @property
    def fingerprints(self) -> dict[str, str]:
        """``{reward name: fingerprint of its metric}``."""
        return {name: str(metric.fingerprint) for name, metric in self.metrics.items()}

    @property
    def latent_space(self) -> str:
        """The codec's fingerprint."""
        return self.codec.fingerprint

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Score ``[B, C, F, H, W]``; returns ``{reward name: float32 [B]}`` on the latents' device.

        ``num_queries`` grows by the samples that every metric has scored.

        Raises:
            DataError: latents or prompts cannot be used.
            MetricError: a metric failed or answered with the wrong shape.
        """
        check_latents(latents)
        if len(prompts) != len(latents):
            raise DataError(f"{len(prompts)} prompts for {len(latents)} latents; give one prompt per sample")
        columns: dict[str, list[Tensor]] = {name: [] for name in self.metrics}
        for start in range(0, len(latents), self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            videos = self.codec.decode(latents[chunk]).detach().float()
            for name, metric in self.metrics.items():
                columns[name].append(_scores(name, metric, videos, prompts[chunk]).to(latents.device))
            self.num_queries += len(videos)
        return {name: torch.cat(values) if values else latents.new_empty(0) for name, values in columns.items()}


def _as_list(metrics: Sequence[MetricLike]) -> list[MetricLike]:
    if isinstance(metrics, str):
        raise ConfigError(f"metrics is one text; pass a list: [{metrics!r}]")
    return list(metrics)


def _create(metric: MetricLike) -> ScoresVideos:
    if not isinstance(metric, str):
        return metric
    from latent_rewards.metrics import create_metric

    return create_metric(metric)


def _scores(name: str, metric: ScoresVideos, videos: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    values = torch.as_tensor(metric(videos, prompts=prompts)).detach().float()
    if values.shape != (len(videos),):
        raise MetricOutputError(f"metric {name!r} returned shape {tuple(values.shape)}; expected [{len(videos)}]")
    if bool(torch.isinf(values).any()):
        raise MetricOutputError(f"metric {name!r} returned infinity; NaN is the answer for 'does not apply'")
    return values


def collect_rewards(
    policy: Policy,
    prompts: Sequence[Prompt],
    oracle: MetricOracle,
    *,
    num_samples: int,
    output_dir: str | Path | None = None,
    seed: int = 0,
    num_steps: int = 4,
    batch_size: int = 32,
    progress: bool = True,
) -> RewardDataset:
    """Sample a policy and score every sample with the true metrics.

    With ``output_dir`` each batch is committed as it finishes; the same call continues an interrupted collection and
    ends with the same dataset, and ``RewardDataset.load(output_dir)`` opens it. When a batch fails its samples are
    tried one by one; those that fail are left out, listed in ``dataset.failures`` and reported in a warning at the end.

    Args:
        policy: the generator; sampled without gradient.
        prompts: at least one; sample i uses ``prompts[i % len(prompts)]``.
        oracle: scores latents; its fingerprints go into the dataset.
        num_samples: how many to sample, at least 1.
        output_dir: folder to collect into, or None to keep everything in memory.
        seed: root of the noise.
        num_steps: sampling steps.
        batch_size: samples per batch and per stored part.
        progress: draw a progress bar.

    Raises:
        ConfigError: a count is below 1, or ``output_dir`` holds a collection with other settings (it says which).
        DataError: there are no prompts or one is blank.
        MetricError: every sample failed.
        CheckpointError: a stored part is damaged; the message names the file.
    """
    for name, value in {"num_samples": num_samples, "num_steps": num_steps, "batch_size": batch_size}.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}")
    listed = check_prompts(prompts)
    root = Path(output_dir) if output_dir is not None else None
    if root is not None:
        settings = {"num_samples": num_samples, "seed": seed, "num_steps": num_steps, "batch_size": batch_size}
        _check_settings(root, {**settings, **_describe(policy, listed, oracle)})
        if (root / COMPLETE).is_dir():
            return RewardDataset.load(root)

    parts: list[RewardDataset] = []
    failures: dict[int, str] = {}
    with tqdm(total=num_samples, desc="collect", disable=not progress, dynamic_ncols=True) as bar:
        for start in range(0, num_samples, batch_size):
            indices = list(range(start, min(start + batch_size, num_samples)))
            folder = root / f"part-{start // batch_size:06d}" if root is not None else None
            part, failed = _collect_part(folder, policy, listed, oracle, indices, seed, num_steps)
            failures |= failed
            parts += [part] if part is not None else []
            if not parts and (len(failures) >= GIVE_UP_AFTER or indices[-1] + 1 == num_samples):
                raise MetricError(f"all of the first {len(failures)} samples failed; {_first_failure(failures)}")
            bar.update(len(indices))
            bar.set_postfix(_means(parts[-1:]), refresh=False)
    return _finish(root, parts, failures, num_samples)


def _finish(root: Path | None, parts: list[RewardDataset], failures: dict[int, str], num_samples: int) -> RewardDataset:
    dataset = join(parts)
    dataset.failures = failures
    if root is not None:
        stored = sorted(path.name for path in root.glob("part-*"))
        with commit_directory(root / COMPLETE) as temporary:
            content = {"parts": stored, "failures": list(failures.items())}
            (temporary / "parts.json").write_text(json.dumps(content, indent=1))
    if failures:
        warnings.warn(
            f"{len(failures)} of {num_samples} samples could not be scored and are left out (see dataset.failures); "
            f"{_first_failure(failures)}",
            stacklevel=3,
        )
    return dataset


def _first_failure(failures: dict[int, str]) -> str:
    index, error = next(iter(failures.items()))
    return f"sample {index}: {error}"


def _collect_part(
    folder: Path | None,
    policy: Policy,
    prompts: list[Prompt],
    oracle: MetricOracle,
    indices: list[int],
    seed: int,
    num_steps: int,
) -> tuple[RewardDataset | None, dict[int, str]]:
    """Return the samples that could be scored (None if none) and the errors of the others."""
    if folder is not None and folder.is_dir():
        stored = RewardDataset.load(folder)
        return stored, stored.failures
    chosen = [prompts[i % len(prompts)] for i in indices]
    latents = _sample(policy, chosen, indices, seed, num_steps)
    columns, failures = _score(oracle, latents, chosen, indices)
    kept = [row for row, index in enumerate(indices) if index not in failures]
    if not kept:
        return None, failures
    part = RewardDataset.from_tensors(
        latents[kept].cpu(),
        [chosen[row] for row in kept],
        columns,
        latent_space=oracle.latent_space,
        metric_fingerprints=oracle.fingerprints,
        failures=failures,
    )
    if folder is not None:
        part.save(folder)
        part = RewardDataset.load(folder)  # so that a long collection does not stay in memory
    return part, failures


@torch.no_grad()
def _sample(policy: Policy, prompts: list[Prompt], indices: list[int], seed: int, num_steps: int) -> Tensor:
    from latent_rewards.rollout import rollout

    device = _device(policy)
    condition = policy.encode(prompts).to(device)
    shape = policy.latent_shape(condition)
    noise = torch.stack(
        [sample_noise(seed, "collect", step, indices, shape, device=device) for step in range(num_steps)]
    )
    return rollout(policy, condition, noise, num_steps).final


def _score(
    oracle: MetricOracle, latents: Tensor, prompts: list[Prompt], indices: list[int]
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Return the rewards of the samples that could be scored, and the errors of the others by global index."""
    try:
        return oracle(latents, prompts), {}
    except Exception:  # a metric is user code and may raise anything; each sample gets its own try below
        rows: list[dict[str, Tensor]] = []
        failures: dict[int, str] = {}
    for row, index in enumerate(indices):
        try:
            rows.append(oracle(latents[row : row + 1], prompts[row : row + 1]))
        except Exception as error:
            failures[index] = f"{type(error).__name__}: {error}"
    names = rows[0] if rows else {}
    return {name: torch.cat([scores[name] for scores in rows]) for name in names}, failures


def _device(policy: Policy) -> torch.device:
    parameters: Callable[[], Any] | None = getattr(policy, "parameters", None)
    first = next(iter(parameters()), None) if parameters is not None else None
    return first.device if first is not None else torch.device("cpu")


def _means(parts: list[RewardDataset]) -> dict[str, str]:
    rewards = parts[0].rewards if parts else {}
    return {name: f"{float(values.nanmean()):.4g}" for name, values in list(rewards.items())[:3]}


def _describe(policy: Policy, prompts: list[Prompt], oracle: MetricOracle) -> dict[str, Any]:
    return {
        "prompts": [prompt_text(prompt) for prompt in prompts],
        "metrics": oracle.fingerprints,
        "latent_space": oracle.latent_space,
        "policy": _policy_digest(policy),
    }


def _policy_digest(policy: Policy) -> str:
    """Return a hash of up to 1,024 values of each parameter and buffer: enough to notice other weights, and fast."""
    digest = hashlib.sha256(type(policy).__name__.encode())
    tensors = policy.state_dict() if isinstance(policy, nn.Module) else {}
    for name, tensor in tensors.items():
        values = tensor.detach().flatten()
        values = values[:: math.ceil(max(1, len(values)) / 1024)].to("cpu", torch.float64)
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_settings(root: Path, settings: dict[str, Any]) -> None:
    """Store the settings of a new collection, or compare them with those of the one already in ``root``."""
    folder = root / _SETTINGS
    if not folder.is_dir():
        with commit_directory(folder) as temporary:
            (temporary / "settings.json").write_text(json.dumps(settings, indent=1))
        return
    verify_directory(folder)
    stored = json.loads((folder / "settings.json").read_text())
    for name, value in settings.items():
        if stored.get(name) != value:
            before, now = _first_difference(stored.get(name), value)
            raise ConfigError(
                f"{root} holds a collection with another {name}: {before} there, {now} now; use the same settings to "
                "continue it, or another output_dir"
            )


def _first_difference(before: object, now: object) -> tuple[object, object]:
    """Return the two values, or of two lists their lengths or first differing entries."""
    if not (isinstance(before, list) and isinstance(now, list)):
        return before, now
    if len(before) != len(now):
        return f"{len(before)} entries", f"{len(now)} entries"
    row = next(i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b)
    return f"entry {row} is {before[row]!r}", f"{now[row]!r}"
