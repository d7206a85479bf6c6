"""Between metrics and TRL's reward functions.

TRL calls ``reward_func(prompts=..., completions=..., **columns)`` and takes a list with one float, or None where the
reward does not apply, per sample; the function may be asynchronous. Here a completion is a video ``[T, C, H, W]``, and
"does not apply" is NaN.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from latent_rewards.contracts import DataError, MetricOutputError, Prompt
from latent_rewards.metrics.metric import Metric
from latent_rewards.metrics.registry import create_metric


class RewardFunc(Protocol):
    """TRL's reward function over videos."""

    __name__: str

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Tensor | Sequence[Tensor],
        **columns: Any,  # noqa: ANN401 - TRL passes the columns of its data set
    ) -> list[float | None]:
        """Return one reward per completion, None where it does not apply."""
        ...


def as_reward_func(metric: str | Callable[..., Any] | Metric, **options: Any) -> RewardFunc:  # noqa: ANN401
    """Return a metric as a TRL reward function.

    Args:
        metric: what :func:`~latent_rewards.metrics.registry.create_metric` takes.
        options: of the metric.

    Returns:
        A function ``(prompts, completions, **columns)`` of videos ``[B, T, C, H, W]``, or B videos ``[T, C, H, W]`` of
        any lengths and sizes (each is then scored by itself); the columns are not read. TRL logs its ``__name__``, the
        metric's name.

    Raises:
        UnknownMetricError: nothing has that name.
        ConfigError: an option the metric does not take.
    """
    made = create_metric(metric, **options)

    def reward_func(
        prompts: Sequence[Prompt],
        completions: Tensor | Sequence[Tensor],
        **columns: Any,  # noqa: ANN401
    ) -> list[float | None]:
        if len(prompts) != len(completions):
            raise DataError(f"reward {made.name!r} got {len(prompts)} prompts for {len(completions)} completions")
        if isinstance(completions, Tensor):
            values = made(completions, prompts)
        else:
            parts = [made(video[None], [prompt]) for video, prompt in zip(completions, prompts, strict=True)]
            values = torch.cat(parts) if parts else torch.empty(0)
        return [None if value != value else value for value in values.tolist()]

    reward_func.__name__ = made.name
    return reward_func


def from_reward_func(reward_func: Callable[..., Any], *, name: str | None = None, version: str = "0") -> Metric:
    """Return a TRL reward function, synchronous or not, as a metric that needs prompts and may answer NaN.

    Args:
        reward_func: called as ``reward_func(prompts=[...], completions=[videos [T, C, H, W]])``; returns, or resolves
            to, one float or None per sample.
        name: of the metric; its ``__name__`` where none is given.
        version: of the metric; change it whenever the function's values change.
    """

    def score(videos: Tensor, *, prompts: Sequence[str]) -> list[float]:
        answer = reward_func(prompts=list(prompts), completions=list(videos))
        if inspect.isawaitable(answer):
            answer = _wait_for(answer)
        if not isinstance(answer, list | tuple | Tensor):
            raise MetricOutputError(f"reward function {called!r} returned a {type(answer).__name__}; expected a list")
        return [float("nan") if value is None else float(value) for value in answer]

    called = name or str(getattr(reward_func, "__name__", type(reward_func).__name__))
    return Metric(
        name=called,
        version=version,
        needs_prompt=True,
        may_be_nan=True,
        deterministic=False,
        batch_invariant=False,
        description=(inspect.getdoc(reward_func) or "").partition("\n")[0],
        score=score,
        origin=getattr(reward_func, "__module__", ""),
        recreatable=False,
    )


def _wait_for(answer: Any) -> Any:  # noqa: ANN401 - what the function resolves to
    """Run an awaitable to its end, also where this thread runs an event loop already (a notebook)."""

    async def outcome() -> Any:  # noqa: ANN401
        return await answer

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(outcome())).result()
