"""What the digits benchmark evaluates on, fixed before any result: 200 prompts, four seeds each, and the real clips.

Clips come in one order everywhere: prompt by prompt, and the four seeds of a prompt next to each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latent_rewards.contracts import Codec, DataError
from latent_rewards.training.randomness import generator, sample_noise
from latent_rewards.training.ranks import current_ranks
from recipes.moving_digits.world import ClipSpec, all_specs, parse_prompt, render, write_prompt

SEEDS = (0, 1, 2, 3)
FULL_PROMPTS = 200
DEMO_PROMPTS = 40
"""The demo evaluates the first 40 of the 200 prompts; every even-sized beginning of the list is half held out."""
AT_ONCE = 20
"""Clips that are sampled, decoded or measured in one piece, which one process of a launch does."""
_PROMPT_SEED, _REAL_ROW_SEED = 20260, 20262


def evaluation_prompts(count: int = FULL_PROMPTS) -> list[str]:
    """Return the first ``count`` of the 200 fixed prompts: held-in and held-out combinations alternate.

    Attributes are balanced along the list, and each wording is drawn from all phrasings, the held-out ones included.

    Raises:
        DataError: ``count`` is odd, below 2 or above 200.
    """
    if count % 2 or not 2 <= count <= FULL_PROMPTS:
        raise DataError(f"count must be even and between 2 and {FULL_PROMPTS}; got {count}")
    heldin = _balanced(all_specs(heldout=False), FULL_PROMPTS // 2)
    heldout = _balanced(all_specs(heldout=True), FULL_PROMPTS // 2)
    specs = [spec for pair in zip(heldin, heldout, strict=True) for spec in pair]
    return [
        write_prompt(spec, seed=_PROMPT_SEED, index=i, heldout_phrasing=True) for i, spec in enumerate(specs[:count])
    ]


def selection_prompts(count: int = DEMO_PROMPTS) -> list[str]:
    """Return prompts to choose a setting on (the teacher's guidance): held-in combinations and phrasings only."""
    specs = _balanced(all_specs(heldout=False), FULL_PROMPTS // 2 + count)[FULL_PROMPTS // 2 :]
    return [write_prompt(spec, seed=_PROMPT_SEED + 1, index=i) for i, spec in enumerate(specs)]


def clip_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompt of every clip: each one as many times as there are seeds."""
    return [prompt for prompt in prompts for _ in SEEDS]


def evaluation_noise(
    num_prompts: int, latent_shape: Sequence[int], *, num_steps: int = 1, stage: str = "evaluation"
) -> Tensor:
    """Return the fixed noise stack ``[num_steps, 4 num_prompts, C, F, H, W]``; ``[0]`` is the initial latents.

    It depends on (seed, prompt index, step) only: the demo's noise is the beginning of the full benchmark's.
    """
    steps = [
        torch.stack([sample_noise(seed, stage, step, range(num_prompts), latent_shape) for seed in SEEDS], dim=1)
        for step in range(num_steps)
    ]
    return torch.stack(steps).flatten(1, 2)


def generate_clips(
    sample: Callable[[list[str], Tensor], Tensor],
    prompts: Sequence[str],
    latent_shape: Sequence[int],
    *,
    num_steps: int = 1,
    batch_size: int = AT_ONCE,
    stage: str = "evaluation",
    progress: bool = True,
) -> Tensor:
    """Return decoded clips ``[4 P, T, 3, H, W]`` of ``sample(prompts, noise [num_steps, B, C, F, H, W])``.

    The processes of a launch share the batches.
    """
    noise = evaluation_noise(len(prompts), latent_shape, num_steps=num_steps, stage=stage)
    texts = clip_prompts(prompts)

    @torch.no_grad()
    def make(start: int) -> Tensor:
        stop = start + batch_size
        return sample(texts[start:stop], noise[:, start:stop]).float().cpu()

    starts = range(0, len(texts), batch_size)
    return torch.cat(current_ranks().share(starts, make, "clips" if progress else None))


def real_clips(prompts: Sequence[str]) -> Tensor:
    """Return real clips ``[4 P, T, 3, H, W]`` of held-out scans, not those of the reference: the ceiling's row."""
    return render([parse_prompt(text) for text in clip_prompts(prompts)], seed=_REAL_ROW_SEED, split="heldout")


def noise_clips(codec: Codec, latent_shape: Sequence[int], *, count: int = 200, batch_size: int = AT_ONCE) -> Tensor:
    """Return decoded N(0, 1) latents ``[count, T, 3, H, W]``: the zero of every closeness."""
    latents = sample_noise(0, "evaluation-noise-clips", 0, range(count), latent_shape)
    decode = torch.no_grad()(lambda batch: codec.decode(batch).float().cpu())
    return torch.cat(current_ranks().share(latents.split(batch_size), decode, "noise clips"))


def _balanced(specs: Sequence[ClipSpec], count: int) -> list[ClipSpec]:
    """Order specs so that every beginning of the list uses specs, and then attribute values, about equally often."""
    order = torch.randperm(len(specs), generator=generator(_PROMPT_SEED, "evaluation-order", 0))
    shuffled = [specs[i] for i in order.tolist()]
    chosen: list[ClipSpec] = []
    used: Counter[object] = Counter()
    for _ in range(count):
        best = min(
            shuffled, key=lambda s: (used[s], max(used[s.digit], used[s.colour]), used[s.direction] + used[s.speed])
        )
        chosen.append(best)
        used.update([best, best.digit, best.colour, best.direction, best.speed])
    return chosen
