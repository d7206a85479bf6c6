"""Prompts as features, without any download.

A text becomes the hashed counts of its lower-cased words and neighbouring word pairs (Weinberger et al. 2009), scaled
to unit length; the hash has no state, so there is no vocabulary to fit or to store. Embeddings are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from latent_rewards.contracts import DataError, Prompt, prompt_text

Prompts = Sequence[Prompt] | Tensor
"""N texts (or mappings with one), or embeddings ``[N, D]`` or ``[N, L, D]``."""


@cache
def _hasher(num_features: int) -> Any:  # noqa: ANN401 - scikit-learn has no types
    from sklearn.feature_extraction.text import HashingVectorizer

    # The default pattern drops words of one character, and with them the 3 of "digit 3".
    words = r"(?u)\b\w+\b"
    return HashingVectorizer(n_features=num_features, ngram_range=(1, 2), lowercase=True, token_pattern=words)


def hash_texts(texts: Sequence[str], num_features: int) -> Tensor:
    """Return float32 ``[N, num_features]`` of unit length; a text without words is zero."""
    return torch.from_numpy(_hasher(num_features).transform(texts).toarray()).float()


@dataclass(frozen=True)
class PromptFeatures:
    """How a proxy reads prompts.

    Attributes:
        kind: "none" (the proxy ignores prompts), "text" or "embedding".
        dim: number of features, 0 for "none".
    """

    kind: str
    dim: int

    @classmethod
    def infer(cls, prompts: Prompts | None, text_features: int) -> PromptFeatures:
        """Return the kind of features for the prompts a proxy is fitted with."""
        if prompts is None:
            return cls("none", 0)
        if isinstance(prompts, Tensor):
            return cls("embedding", prompts.shape[-1])
        return cls("text", text_features)

    def __call__(self, prompts: Prompts | None, count: int) -> Tensor | None:
        """Return features ``[count, dim]``, or None for a proxy that ignores prompts.

        Raises:
            DataError: prompts are missing, of another kind or dimension than at fit, or not ``count`` many.
        """
        if self.kind == "none":
            return None
        if prompts is None:
            raise DataError(f"this proxy was fitted with prompts ({self.kind}); pass the prompts of the latents")
        if isinstance(prompts, str):
            raise DataError("prompts is one text; pass a list of texts, one per sample")
        if len(prompts) != count:
            raise DataError(f"{len(prompts)} prompts for {count} latents; give one prompt per sample")
        if isinstance(prompts, Tensor):
            return self._check_embeddings(prompts)
        if self.kind != "text":
            raise DataError(f"this proxy was fitted with embeddings of dimension {self.dim}; texts were given")
        return hash_texts([prompt_text(prompt) for prompt in prompts], self.dim)

    def _check_embeddings(self, embeddings: Tensor) -> Tensor:
        if self.kind != "embedding":
            raise DataError("this proxy was fitted with texts; embeddings were given")
        if embeddings.ndim not in (2, 3) or embeddings.shape[-1] != self.dim:
            raise DataError(
                f"prompt embeddings must be [N, {self.dim}] or [N, L, {self.dim}]; got {tuple(embeddings.shape)}"
            )
        if not bool(torch.isfinite(embeddings).all()):
            raise DataError("prompt embeddings hold NaN or infinity")
        return embeddings.mean(dim=1) if embeddings.ndim == 3 else embeddings
