"""What a distillation trains on: prompts, encoded once, and the latents that belong to them, if there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillation.denoiser import Condition
from distillation.errors import ConditionError, DistillationConfigError, NoiseError
from distillation.latents import ShardedLatents
from latent_rewards.training.devices import moved


@dataclass
class Batch:
    """Some rows of the data.

    Attributes:
        condition: of length B; None for an unconditional model.
        negative: likewise; None without guidance.
        latents: data [B, C, F, H, W] where there is some.
        prompts: the B prompts, where they were given as such.
    """

    condition: Any
    negative: Any
    latents: Tensor | None
    prompts: list[Any] | None = None


class DistillationData:
    """Prompts or conditions, their negatives for guidance, and optionally latents; indexed by row.

    Each distinct text is encoded once. The negative of a text is the empty text, and that of a mapping is the mapping
    with an empty ``"prompt"``, so that an image condition stays.

    Args:
        source: prompts (texts or mappings), a condition, or None (unconditional); or a pair (latents, one of these),
            the latents a tensor or, where they are larger than memory, :class:`~distillation.latents.ShardedLatents`.
        encode: prompts -> condition.
        guided: whether negatives are needed.

    Raises:
        DistillationConfigError: there are no prompts.
        NoiseError: the latents are not [N, C, F, H, W], or not finite.
        ConditionError: latents and prompts differ in number, or guidance has nothing to encode a negative with.
    """

    def __init__(self, source: Any, encode: Callable[[Sequence[Any]], Any] | None, *, guided: bool) -> None:  # noqa: ANN401
        self.latents: Tensor | ShardedLatents | None = None
        self.prompts: list[Any] | None = None
        if isinstance(source, tuple | list) and len(source) == 2 and isinstance(source[0], Tensor | ShardedLatents):
            self.latents, source = _checked(source[0]), source[1]
        negatives: Any = None
        if source is None:
            if guided:
                raise ConditionError("guidance needs prompts; set guidance_scale = 1 for an unconditional model")
            self.condition, self.rows = None, torch.zeros(1, dtype=torch.long)
            if self.latents is not None:
                self.rows = torch.zeros(len(self.latents), dtype=torch.long)
        elif isinstance(source, Sequence) and not isinstance(source, str):
            self.prompts = list(source)
            self.condition, self.rows = _encode_distinct(source, encode)
            negatives = [{**prompt, "prompt": ""} if isinstance(prompt, dict) else "" for prompt in source]
        elif isinstance(source, Tensor):
            raise DistillationConfigError(
                f"a tensor {list(source.shape)} is neither prompts nor a condition; latents go with their prompts, as "
                "(latents, prompts), or (latents, None) for an unconditional model"
            )
        elif isinstance(source, Condition) and not isinstance(source, str):
            self.condition, self.rows = source, torch.arange(len(source))
            negatives = [""] * len(source)
        else:
            raise DistillationConfigError(f"prompts must be a list of texts or a condition; got {source!r}")
        self.negative: Any
        self.negative, self.negative_rows = _encode_distinct(negatives, encode) if guided else (None, self.rows)
        if self.latents is not None and len(self.latents) != len(self):
            raise ConditionError(f"{len(self.latents)} latents for {len(self)} prompts; give one prompt per sample")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def batch(self, chosen: Tensor, device: torch.device | str) -> Batch:
        """Return the rows at ``chosen`` (int64 [B], on the CPU) on ``device``."""

        def take(condition: Any, rows: Tensor) -> Any:  # noqa: ANN401 - any Condition
            return None if condition is None else condition.index_select(rows[chosen]).to(device)

        latents = None if self.latents is None else moved(self.latents[chosen.to(self.latents.device)], device)
        prompts = None if self.prompts is None else [self.prompts[row] for row in chosen.tolist()]
        return Batch(take(self.condition, self.rows), take(self.negative, self.negative_rows), latents, prompts)


@torch.no_grad()
def _encode_distinct(prompts: Sequence[Any], encode: Callable[[Sequence[Any]], Any] | None) -> tuple[Any, Tensor]:
    """Return the condition of the distinct prompts, and for each prompt its row (int64 [N])."""
    if not len(prompts):
        raise DistillationConfigError("no prompts: give at least one")
    if encode is None:
        raise ConditionError(
            "the teacher has no encode(); pass a teacher with one, or a condition and guidance_scale = 1"
        )
    positions: dict[Any, int] = {}
    distinct: list[Any] = []
    rows = []
    for prompt in prompts:
        key = prompt if isinstance(prompt, str) else id(prompt)
        if key not in positions:
            positions[key] = len(distinct)
            distinct.append(prompt)
        rows.append(positions[key])
    return encode(distinct), torch.tensor(rows)


def _checked(latents: Tensor | ShardedLatents) -> Tensor | ShardedLatents:
    if len(latents.shape) != 5 or not latents.dtype.is_floating_point:
        raise NoiseError(f"latents must be floating [N, C, F, H, W]; got {latents.dtype} {list(latents.shape)}")
    parts = latents.parts if isinstance(latents, ShardedLatents) else [latents]
    finite = torch.cat([torch.isfinite(part).flatten(1).all(dim=1) for part in parts])
    if not bool(finite.all()):
        raise NoiseError(f"latents[{int((~finite).nonzero()[0])}] holds NaN or infinity; drop or repair it")
    return latents
