"""Metrics in child processes that score while the caller goes on: a bounded queue of batches before N children.

Every worker is a child of :mod:`latent_rewards.metrics.isolation` that holds all the metrics. A batch of videos goes to
one worker; no more than N + 1 batches are under way at once, so memory does not grow with the work.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

from torch import Tensor

from latent_rewards.contracts import ConfigError, MetricCrashError, MetricError, Prompt, prompt_text
from latent_rewards.metrics.isolation import ChildTraceback, MetricChild, recipe_of
from latent_rewards.metrics.metric import Metric

Answer = TypeVar("Answer")
Ask = Callable[[Sequence[str], Tensor, Sequence[Prompt]], Iterable[Tensor]]
"""Names of metrics, videos ``[B, T, C, H, W]`` and their prompts -> one ``float32 [B]`` per name."""


class MetricWorkers:
    """N child processes that each hold the same metrics.

    Args:
        metrics: ``{name: metric}``; each must be one that another process can make again.
        num_workers: N, at least 1.
        timeout: seconds a metric may take for one batch; the child that takes longer is killed.
        startup_timeout: seconds a child may take to start and make the metrics, which includes importing torch.
        sources: ``{name: what create_metric made the metric of}``, where that is known; it makes again also what a
            registered function gets elsewhere, such as from :func:`~latent_rewards.metrics.http_metric`.

    Raises:
        ConfigError: a number is out of range, or a metric cannot be made by another process.
    """

    def __init__(
        self,
        metrics: Mapping[str, Any],
        num_workers: int,
        *,
        timeout: float,
        startup_timeout: float = 120.0,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1 here; got {num_workers}")
        for label, seconds in (("timeout", timeout), ("startup_timeout", startup_timeout)):
            if not seconds > 0:
                raise ConfigError(f"{label} must be positive seconds; got {seconds!r}")
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                raise ConfigError(
                    f"metric {name!r} is a {type(metric).__name__}, which cannot be imported by another process: use a "
                    "registered name or 'module:function', or num_workers=0"
                )
        self.num_workers = num_workers
        self._fingerprints = {name: str(metric.fingerprint) for name, metric in metrics.items()}
        sources = sources or {}
        recipes = [
            recipe_of(metric if getattr(metric, "recreatable", True) else sources.get(name, metric))
            for name, metric in metrics.items()
        ]
        self._make_child = lambda: MetricChild(recipes, timeout, startup_timeout)
        self._slots = {name: slot for slot, name in enumerate(metrics)}
        self._running: _Running | None = None

    def start(self) -> None:
        """Start the children, side by side, unless they run already.

        Raises:
            MetricError: a metric could not be made; its subclasses say that a child died or took too long.
            ConfigError: a child makes another metric under the same name (the fingerprints differ).
        """
        if self._running is not None:
            return
        running = _Running([self._make_child() for _ in range(self.num_workers)])
        try:
            for described in running.executor.map(MetricChild.start, running.children):
                self._check_same([entry["fingerprint"] for entry in described])
        except BaseException:
            running.close()
            raise
        self._running = running
        self._finalizer = weakref.finalize(self, running.close)

    def submit(self, work: Callable[[Ask], Answer]) -> Future[Answer]:
        """Run ``work(ask)`` in a thread with a worker of its own; waits while N + 1 pieces of work are under way.

        What ``ask`` raises is a :class:`MetricError`; the future hands it on.
        """
        self.start()
        running, slots = self._running, self._slots
        assert running is not None  # noqa: S101 - start() has just set it

        def run() -> Answer:
            child = running.free.get()
            try:
                return work(
                    lambda names, videos, prompts: running.ask(child, [slots[n] for n in names], videos, prompts)
                )
            finally:
                running.free.put(child)

        running.places.acquire()
        try:
            future = running.executor.submit(run)
        except BaseException:
            running.places.release()
            raise
        future.add_done_callback(lambda _: running.places.release())
        return future

    def close(self) -> None:
        """Drop the waiting work and kill the children; later work starts new ones."""
        running, self._running = self._running, None
        if running is not None:
            self._finalizer.detach()
            running.close()

    def _check_same(self, fingerprints: Sequence[str]) -> None:
        for (name, here), there in zip(self._fingerprints.items(), fingerprints, strict=True):
            if here != there:
                raise ConfigError(
                    f"metric {name!r} is {here!r} here and {there!r} when another process makes it; name it "
                    "'module:function' with options that say all it depends on, or use num_workers=0"
                )


class _Running:
    """Children, the threads that talk to them, and the places in the queue."""

    def __init__(self, children: Sequence[MetricChild]) -> None:
        self.children = list(children)
        self.executor = ThreadPoolExecutor(len(children), thread_name_prefix="metric-worker")
        self.places = threading.BoundedSemaphore(len(children) + 1)
        self.free: SimpleQueue[MetricChild] = SimpleQueue()
        self.closed = False
        for child in children:
            self.free.put(child)

    def ask(
        self, child: MetricChild, slots: Sequence[int], videos: Tensor, prompts: Sequence[Prompt]
    ) -> Sequence[Tensor]:
        if self.closed:
            raise MetricCrashError("the metric workers were closed")
        try:
            return child.call(videos, prompts=[prompt_text(prompt) for prompt in prompts], slots=slots)
        except MetricError as error:
            cause = error.__cause__
            if isinstance(cause, ChildTraceback):  # a failure reads the same wherever the metric ran
                raise type(error)(cause.message) from cause
            raise

    def close(self) -> None:
        self.closed = True
        self.executor.shutdown(wait=False, cancel_futures=True)
        for child in self.children:
            child.stop()
