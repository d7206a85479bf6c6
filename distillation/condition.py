"""What a denoiser is conditioned on: text embeddings, and any tensors that travel with them.

A condition is a batch. It is indexed like one, so that a group of samples of one prompt is a repeated index, and two of
them concatenate, so that a guided teacher needs one network call for both halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distillation.errors import ConditionError
from latent_rewards.training.devices import moved


@dataclass(frozen=True)
class TextCondition:
    """Text embeddings and whatever else the network takes per sample; a :class:`~distillation.denoiser.Condition`.

    Args:
        embeddings: [B, L, D], padded as the network was trained.
        extra: further tensors [B, ...] by name, e.g. a mask.

    Raises:
        ConditionError: the embeddings are not [B, L, D], or an extra tensor describes another number of samples.
    """

    embeddings: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.embeddings.ndim != 3:
            raise ConditionError(f"embeddings must be [B, L, D]; got shape {tuple(self.embeddings.shape)}")
        for name, tensor in self.extra.items():
            if tensor.ndim == 0 or len(tensor) != len(self.embeddings):
                raise ConditionError(
                    f"extra tensor {name!r} has shape {tuple(tensor.shape)}; its first dimension must be "
                    f"{len(self.embeddings)}, the number of embeddings"
                )

    def __len__(self) -> int:
        """Return B."""
        return len(self.embeddings)

    def index_select(self, index: Tensor) -> TextCondition:
        """Return the rows at ``index`` (int64 [M]); repeated indices repeat a sample."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index.to(tensor.device))

        return TextCondition(rows(self.embeddings), {name: rows(value) for name, value in self.extra.items()})

    def to(self, device: torch.device | str) -> TextCondition:
        """Return the condition on ``device``."""
        extra = {name: moved(value, device) for name, value in self.extra.items()}
        return TextCondition(moved(self.embeddings, device), extra)

    @staticmethod
    def concatenate(conditions: Sequence[TextCondition]) -> TextCondition:
        """Return the conditions one after the other, as one batch.

        Raises:
            ConditionError: there is none, or they differ in their extra tensors or in the shape of one sample.
        """
        if not conditions:
            raise ConditionError("no conditions to concatenate; pass at least one")
        names = list(conditions[0].extra)
        for position, condition in enumerate(conditions):
            if set(condition.extra) != set(names):
                raise ConditionError(
                    f"condition {position} has the extra tensors {sorted(condition.extra)}, the first one "
                    f"{sorted(names)}; encode them with the same encoder"
                )

        def joined(name: str, tensors: list[Tensor]) -> Tensor:
            shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
            if len(shapes) > 1:
                raise ConditionError(
                    f"{name} of one sample comes in the shapes {sorted(shapes)}; encode all prompts with the same "
                    "encoder and the same maximum length"
                )
            return torch.cat(tensors)

        return TextCondition(
            joined("embeddings", [condition.embeddings for condition in conditions]),
            {name: joined(name, [condition.extra[name] for condition in conditions]) for name in names},
        )
