"""True rewards of latents: decode a chunk, score its pixels with every metric, drop the videos.

Scoring may run in worker processes while the caller samples and decodes the next chunk, and scores may be kept on disk;
neither changes a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from latent_rewards.contracts import (
    Codec,
    ConfigError,
    DataError,
    MetricOutputError,
    Prompt,
    check_latents,
)
from latent_rewards.digests import tensor_digests
from latent_rewards.metrics.checks import warn_if_cheatable
from latent_rewards.metrics.workers import Ask, MetricWorkers
from latent_rewards.score_cache import ScoreCache


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
Scores = dict[str, Tensor]
"""``{reward name: float32 [B]}``."""


class MetricOracle:
    """True rewards of latents; also a context manager that closes its workers.

    Args:
        codec: latents -> videos.
        metrics: metric names or metrics, whose names become the reward names; or ``{reward name: metric}``.
        chunk_size: most videos decoded and scored at once. With workers, ``num_workers + 2`` chunks may be in memory.
        num_workers: processes that score while the caller goes on; 0 scores in this one. Each holds every metric,
            uses as many threads as this process, and starts with the first query. A metric that crashes, or takes too
            long, is an error for its chunk only.
        timeout: seconds a metric may take for a chunk in a worker.
        cache_dir: folder that keeps the scores of deterministic metrics; see :mod:`latent_rewards.score_cache`.

    Raises:
        ConfigError: no metric, one name twice, a number out of range, a metric that a worker cannot import, or a
            ``cache_dir`` that cannot be written.
        UnknownMetricError: no metric has one of the names.
    """

    def __init__(
        self,
        codec: Codec,
        metrics: Sequence[MetricLike] | Mapping[str, MetricLike],
        *,
        chunk_size: int = 16,
        num_workers: int = 0,
        timeout: float = 600.0,
        cache_dir: str | Path | None = None,
    ) -> None:
        if chunk_size < 1:
            raise ConfigError(f"chunk_size must be at least 1; got {chunk_size}")
        if num_workers < 0:
            raise ConfigError(f"num_workers must not be negative; got {num_workers}")
        self.codec = codec
        self.chunk_size = chunk_size
        self.metrics = _named(metrics)
        warn_if_cheatable(self.metrics.values(), stacklevel=3)
        given = metrics.values() if isinstance(metrics, Mapping) else metrics
        names = {name: metric for name, metric in zip(self.metrics, given, strict=False) if isinstance(metric, str)}
        workers = MetricWorkers(self.metrics, num_workers, timeout=timeout, sources=names) if num_workers else None
        self._workers = workers
        self._cache = ScoreCache(cache_dir) if cache_dir is not None else None
        self.num_queries = 0

    @property
    def lower_is_better(self) -> frozenset[str]:
        """The names of the rewards that should fall."""
        return frozenset(name for name, metric in self.metrics.items() if not getattr(metric, "higher_is_better", True))

    @property
    def fingerprints(self) -> dict[str, str]:
        """``{reward name: fingerprint of its metric}``."""
        return {name: str(metric.fingerprint) for name, metric in self.metrics.items()}

    @property
    def latent_space(self) -> str:
        """The codec's fingerprint."""
        return self.codec.fingerprint

    @property
    def num_workers(self) -> int:
        """Processes that score beside this one."""
        return self._workers.num_workers if self._workers else 0

    def start(self) -> None:
        """Start the workers, if there are any and they do not run yet.

        Raises:
            MetricError: a metric could not be made in a worker.
            ConfigError: a worker makes another metric of that name.
        """
        if self._workers:
            self._workers.start()

    def close(self) -> None:
        """Kill the workers; a later query starts new ones."""
        if self._workers:
            self._workers.close()

    def __enter__(self) -> MetricOracle:
        """Return the oracle."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __call__(self, latents: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score ``[B, C, F, H, W]``; returns ``{reward name: float32 [B]}`` on the latents' device.

        ``num_queries`` grows by the samples that every metric has scored.

        Raises:
            DataError: latents or prompts cannot be used.
            MetricError: a metric failed or answered with the wrong shape.
        """
        return self.submit(latents, prompts).result()

    def submit(self, latents: Tensor, prompts: Sequence[Prompt]) -> PendingScores:
        """Decode ``[B, C, F, H, W]`` and hand the videos to the workers; returns before they have scored the last.

        Without workers everything is scored here, when the result is asked for.

        Raises:
            DataError: latents or prompts cannot be used.
        """
        check_latents(latents)
        if len(prompts) != len(latents):
            raise DataError(f"{len(prompts)} prompts for {len(latents)} latents; give one prompt per sample")

        @torch.no_grad()
        def decode(chunk: slice) -> tuple[Tensor, Sequence[Prompt]]:
            return self.codec.decode(latents[chunk]).detach().float(), prompts[chunk]

        starts = range(0, len(latents), self.chunk_size)
        return self._begin((decode(slice(start, start + self.chunk_size)) for start in starts), latents.device)

    def submit_videos(self, videos: Tensor, prompts: Sequence[Prompt]) -> PendingScores:
        """Score pixels ``[B, T, 3, H, W]`` in [0, 1] as they are; otherwise like :meth:`submit`.

        Raises:
            DataError: another number of prompts than of videos.
        """
        if len(prompts) != len(videos):
            raise DataError(f"{len(prompts)} prompts for {len(videos)} videos; give one prompt per sample")
        starts = range(0, len(videos), self.chunk_size)
        chunks = (slice(start, start + self.chunk_size) for start in starts)
        return self._begin(((videos[chunk], prompts[chunk]) for chunk in chunks), videos.device)

    def _begin(self, chunks: Iterator[tuple[Tensor, Sequence[Prompt]]], device: torch.device) -> PendingScores:
        if self._workers is None:
            scored = ((len(videos), self._score(videos, texts, self._ask)) for videos, texts in chunks)
            return PendingScores(self, scored, device)
        begun: list[tuple[int, Future[Scores]]] = []
        try:
            for videos, texts in chunks:
                begun.append((len(videos), self._workers.submit(partial(self._score, videos.cpu(), texts))))
        except BaseException:
            _cancel(begun)
            raise
        return PendingScores(self, begun, device)

    def _ask(self, names: Sequence[str], videos: Tensor, prompts: Sequence[Prompt]) -> Iterator[Tensor]:
        return (self.metrics[name](videos, prompts=prompts) for name in names)

    @torch.no_grad()
    def _score(self, videos: Tensor, prompts: Sequence[Prompt], ask: Ask) -> Scores:
        """Return the scores of one chunk, from the cache where it has them."""
        scores: Scores = {}
        keys: dict[str, list[str]] = {}
        if self._cache is not None:
            digests = tensor_digests(videos)
            for name, metric in self.metrics.items():
                if (named := self._cache.keys(metric, digests, prompts)) is not None:
                    keys[name] = named
                    scores |= {} if (known := self._cache.read(named)) is None else {name: known}
        missing = [name for name in self.metrics if name not in scores]
        if missing:
            for name, values in zip(missing, ask(missing, videos, prompts), strict=True):
                scores[name] = _checked(name, values, len(videos))
                if self._cache is not None and name in keys:
                    self._cache.write(keys[name], scores[name])
        return {name: scores[name] for name in self.metrics}


class PendingScores:
    """Scores under way; :meth:`result` waits for them."""

    def __init__(
        self, oracle: MetricOracle, chunks: Iterable[tuple[int, Scores | Future[Scores]]], device: torch.device
    ) -> None:
        self._oracle, self._chunks, self._device = oracle, chunks, device
        self._scores: Scores | None = None

    def result(self) -> Scores:
        """Return ``{reward name: float32 [B]}`` on the latents' device, however often it is asked for.

        Raises:
            MetricError: a metric failed or answered with the wrong shape.
        """
        if self._scores is None:
            self._scores = self._collected()
        return self._scores

    def _collected(self) -> Scores:
        columns: dict[str, list[Tensor]] = {name: [] for name in self._oracle.metrics}
        try:
            for count, chunk in self._chunks:
                scores = chunk.result() if isinstance(chunk, Future) else chunk
                for name, values in scores.items():
                    columns[name].append(values.to(self._device))
                self._oracle.num_queries += count
        except Exception:
            _cancel(self._chunks)
            raise
        except BaseException:
            self._oracle.close()  # or leaving would wait for what is still being scored
            raise
        empty = torch.empty(0, device=self._device)
        return {name: torch.cat(values) if values else empty for name, values in columns.items()}


def _cancel(chunks: Iterable[tuple[int, Scores | Future[Scores]]]) -> None:
    """Take back the chunks that no worker has begun."""
    if isinstance(chunks, list):
        for _, chunk in chunks:
            chunk.cancel()


def _named(metrics: Sequence[MetricLike] | Mapping[str, MetricLike]) -> dict[str, ScoresVideos]:
    if isinstance(metrics, str):
        raise ConfigError(f"metrics is one text; pass a list: [{metrics!r}]")
    if callable(metrics) or metrics is None:
        raise ConfigError(f"metrics must be a list of metrics, or {{reward name: metric}}; got {metrics!r}")
    named: dict[str, ScoresVideos] = {}
    pairs = metrics.items() if isinstance(metrics, Mapping) else [(None, metric) for metric in metrics]
    for given_name, metric in pairs:
        scorer = _create(metric)
        name = given_name or scorer.name
        if name in named:
            raise ConfigError(f"two metrics are named {name!r}; pass {{reward name: metric}} instead")
        named[name] = scorer
    if not named:
        raise ConfigError("an oracle needs at least one metric")
    return named


def _create(metric: MetricLike) -> ScoresVideos:
    if not isinstance(metric, str) and hasattr(metric, "fingerprint"):
        return metric
    from latent_rewards.metrics import create_metric

    return create_metric(metric)


def _checked(name: str, returned: Tensor, count: int) -> Tensor:
    values = torch.as_tensor(returned).detach().float()
    if values.shape != (count,):
        raise MetricOutputError(f"metric {name!r} returned shape {tuple(values.shape)}; expected [{count}]")
    if bool(torch.isinf(values).any()):
        raise MetricOutputError(f"metric {name!r} returned infinity; NaN is the answer for 'does not apply'")
    return values
