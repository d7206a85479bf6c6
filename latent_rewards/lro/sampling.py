"""Which samples a run draws: prompts, step counts and noise, each a function of (seed, stage, update, sample index)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from latent_rewards.contracts import Condition, Policy, Prompt, check_prompts, prompt_text
from latent_rewards.training.randomness import generator, sample_index, sample_noise
from latent_rewards.training.ranks import ALONE, Ranks


@dataclass
class Batch:
    """Samples to roll out.

    Attributes:
        condition: one row per sample.
        prompts: B texts.
        sample_ids: B indices within the update (or evaluation); noise is a function of them.
        noise: ``[num_steps, B, C, F, H, W]``.
        num_steps: length of the chains.
    """

    condition: Condition
    prompts: list[str]
    sample_ids: list[int]
    noise: Tensor
    num_steps: int


@runtime_checkable
class VaryingPolicy(Protocol):
    """A policy of which part of the condition is drawn, like the weights of :mod:`latent_rewards.lro.pareto`."""

    def vary(self, condition: Any, /, *, seed: int, stage: str, step: int, groups: Sequence[int]) -> Condition:  # noqa: ANN401 - its own
        """Return the condition with that part drawn: a function of (seed, stage, step, group) for each sample."""
        ...


class SampleSource:
    """Draws batches for a fixed list of prompts, which the policy encodes once.

    Args:
        policy: encodes the prompts; already on ``device``.
        prompts: texts or mappings; equal texts are encoded once.
        step_counts: numbers of sampling steps to draw from.
        seed: root of all randomness.
        device: where conditions and noise go.
        dtype: of the noise.

    Raises:
        DataError: there are no prompts, or one is blank.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        *,
        step_counts: Sequence[int],
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.prompts = check_prompts(prompts)
        distinct: list[Prompt] = []
        row_of_text: dict[str, int] = {}
        self._rows = []
        for prompt in self.prompts:
            row = row_of_text.get(prompt) if isinstance(prompt, str) else None
            if row is None:
                row = len(distinct)
                distinct.append(prompt)
            if isinstance(prompt, str):
                row_of_text[prompt] = row
            self._rows.append(row)
        with torch.no_grad():
            self._condition = policy.encode(distinct).to(device)
        self._shape = policy.latent_shape(self._condition)
        self.step_counts, self.seed, self.device, self.dtype = list(step_counts), seed, device, dtype
        self._varying = policy if isinstance(policy, VaryingPolicy) else None
        self._pass: tuple[int, list[int]] = (-1, [])

    def update_batch(self, step: int, num_prompts: int, num_generations: int, ranks: Ranks = ALONE) -> Batch:
        """Return the samples of update ``step``: ``num_prompts`` groups of ``num_generations`` neighbours.

        Prompts come from a stream of shuffled passes over the list: none repeats before all were seen. With several
        ranks each gets as many neighbouring groups; what a group contains does not depend on their number.
        """
        groups = ranks.part(num_prompts)
        indices = [self._streamed(step * num_prompts + group) for group in groups for _ in range(num_generations)]
        ids = [group * num_generations + i for group in groups for i in range(num_generations)]
        count = self.step_counts[sample_index(self.seed, "lro/step-count", step, len(self.step_counts))]
        return self._batch("lro/rollout", step, indices, ids, count, [i // num_generations for i in ids])

    def evaluation_batches(
        self, stage: str, step: int, num_samples: int, micro_batch: int, ranks: Ranks = ALONE
    ) -> Iterator[Batch]:
        """Yield ``num_samples`` samples, spread over prompts and step counts, in batches of at most ``micro_batch``.

        The samples depend neither on ``micro_batch`` nor on the number of ranks, each of which gets its share.
        """
        order = torch.randperm(len(self.prompts), generator=generator(self.seed, f"{stage}/prompts", step)).tolist()
        for position, count in enumerate(self.step_counts):
            ids = list(range(position, num_samples, len(self.step_counts)))[ranks.index :: ranks.count]
            for start in range(0, len(ids), micro_batch):
                part = ids[start : start + micro_batch]
                yield self._batch(stage, step, [order[i % len(order)] for i in part], part, count, part)

    def noise(self, stage: str, step: int, sample_ids: Sequence[int], count: int) -> Tensor:
        """Return noise ``[count, B, C, F, H, W]``, a function of each sample's id."""
        stack = sample_noise(self.seed, stage, step, sample_ids, (count, *self._shape), dtype=self.dtype)
        return stack.movedim(1, 0).contiguous().to(self.device)

    def _streamed(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.prompts))
        if epoch != self._pass[0]:
            order = torch.randperm(len(self.prompts), generator=generator(self.seed, "lro/prompts", epoch))
            self._pass = (epoch, order.tolist())
        return self._pass[1][offset]

    def _batch(
        self, stage: str, step: int, prompts: list[int], sample_ids: list[int], num_steps: int, groups: list[int]
    ) -> Batch:
        rows = torch.tensor([self._rows[i] for i in prompts], device=self.device)
        condition = self._condition.index_select(rows)
        if self._varying is not None:
            condition = self._varying.vary(condition, seed=self.seed, stage=stage, step=step, groups=groups)
        return Batch(
            condition=condition,
            prompts=[prompt_text(self.prompts[i]) for i in prompts],
            sample_ids=sample_ids,
            noise=self.noise(stage, step, sample_ids, num_steps),
            num_steps=num_steps,
        )


def noise_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a policy's noise: float64 for a policy with parameters in it, else float32."""
    double = any(p.dtype == torch.float64 for p in module.parameters())
    return torch.float64 if double else torch.float32
