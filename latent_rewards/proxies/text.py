"""Prompts as features: embeddings where there is an encoder (best the policy's own), else hashed words.

Embeddings are taken as they are, one vector per prompt or one per token, padded with zeros. Without an encoder a text
becomes the hashed counts of its lower-cased words and neighbouring word pairs (Weinberger et al. 2009), scaled to unit
length; the hash has no state, so there is no vocabulary to fit or to store, but no word is like any other either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from latent_rewards.contracts import DataError, Prompt, prompt_text

Prompts = Sequence[Prompt] | Tensor
"""N texts (or mappings with one), or embeddings ``[N, D]`` or ``[N, L, D]``."""

_CHUNK = 64

PromptEncoder = Callable[[Sequence[str]], Tensor]
"""N texts -> embeddings ``[N, D]``, or ``[N, L, D]`` with zeros for padding."""


@cache
def _hasher(num_features: int) -> Any:  # noqa: ANN401 - scikit-learn has no types
    from sklearn.feature_extraction.text import HashingVectorizer

    # The default pattern drops words of one character, and with them the 3 of "digit 3".
    words = r"(?u)\b\w+\b"
    return HashingVectorizer(n_features=num_features, ngram_range=(1, 2), lowercase=True, token_pattern=words)


def hash_texts(texts: Sequence[str], num_features: int) -> Tensor:
    """Return float32 ``[N, num_features]`` of unit length; a text without words is zero."""
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    hashed = torch.from_numpy(_hasher(num_features).transform(distinct).toarray()).float()
    return hashed[[distinct[text] for text in texts]]


@dataclass(frozen=True)
class PromptFeatures:
    """How a proxy reads prompts.

    Attributes:
        kind: "none" (the proxy ignores prompts), "text" (hashed words), "embedding" (a vector) or "tokens" (a vector
            per token).
        dim: number of features, 0 for "none".
        encoded: the embeddings are made from texts by a prompt encoder.
    """

    kind: str
    dim: int
    encoded: bool = False

    @classmethod
    def infer(cls, prompts: Prompts | None, text_features: int, encode: PromptEncoder | None = None) -> PromptFeatures:
        """Return the kind of features for the prompts a proxy is fitted with.

        Raises:
            DataError: what the encoder returns is no embedding.
        """
        if prompts is None:
            return cls("none", 0)
        encoded = encode is not None and not isinstance(prompts, Tensor)
        if encode is not None and not isinstance(prompts, Tensor):
            prompts = _encoded(encode, prompts[:1])
        if isinstance(prompts, Tensor):
            return cls("tokens" if prompts.ndim == 3 else "embedding", prompts.shape[-1], encoded)
        return cls("text", text_features)

    def __call__(self, prompts: Prompts | None, count: int, encode: PromptEncoder | None = None) -> Tensor | None:
        """Return features ``[count, dim]`` or ``[count, L, dim]``, or None for a proxy that ignores prompts.

        Raises:
            DataError: prompts are missing, of another kind or dimension than at fit, or not ``count`` many; texts for
                a proxy that needs an encoder and has none.
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
        if self.kind == "text":
            return hash_texts([prompt_text(prompt) for prompt in prompts], self.dim)
        if not self.encoded:
            raise DataError(f"this proxy was fitted with embeddings of dimension {self.dim}; texts were given")
        if encode is None:
            raise DataError(
                "this proxy reads prompts through the encoder it was fitted with; pass it: "
                "RewardProxy.from_pretrained(path, encode=...), texts -> embeddings"
            )
        return self._check_embeddings(_encoded(encode, prompts))

    def _check_embeddings(self, embeddings: Tensor) -> Tensor:
        if self.kind == "text":
            raise DataError("this proxy was fitted with texts; embeddings were given")
        shape = f"[N, L, {self.dim}]" if self.kind == "tokens" else f"[N, {self.dim}]"
        if embeddings.ndim != (3 if self.kind == "tokens" else 2) or embeddings.shape[-1] != self.dim:
            raise DataError(f"prompt embeddings must be {shape}; got {tuple(embeddings.shape)}")
        if not bool(torch.isfinite(embeddings).all()):
            raise DataError("prompt embeddings hold NaN or infinity")
        return embeddings


def real_tokens(tokens: Tensor) -> Tensor:
    """Return bool ``[N, L]``: which of the tokens ``[N, L, D]`` are not padding, that is not all zero."""
    return (tokens != 0).any(dim=2)


def mean_token(tokens: Tensor) -> Tensor:
    """Return ``[N, D]``, the mean over the tokens ``[N, L, D]`` that are not padding; zero where there are none."""
    return tokens.sum(dim=1) / real_tokens(tokens).sum(dim=1, keepdim=True).clamp(min=1)


@torch.no_grad()
def _encoded(encode: PromptEncoder, prompts: Sequence[Prompt]) -> Tensor:
    """Return the encoder's embeddings of ``prompts``, each distinct text encoded once, without common padding."""
    texts = [prompt_text(prompt) for prompt in prompts]
    distinct = list(dict.fromkeys(texts))
    # In chunks, because some encoders pad every text to hundreds of tokens.
    parts = [_embed(encode, distinct[start : start + _CHUNK]) for start in range(0, len(distinct), _CHUNK)]
    if parts[0].ndim == 3:
        longest = max(part.shape[1] for part in parts)
        parts = [functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]
    position = {text: row for row, text in enumerate(distinct)}
    rows = torch.tensor([position[text] for text in texts], device=parts[0].device)
    return torch.cat(parts)[rows]


def _embed(encode: PromptEncoder, texts: list[str]) -> Tensor:
    embeddings = encode(texts)
    if not isinstance(embeddings, Tensor) or embeddings.ndim not in (2, 3) or len(embeddings) != len(texts):
        got = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise DataError(f"the prompt encoder returned {got} for {len(texts)} texts; expected [N, D] or [N, L, D]")
    embeddings = embeddings.detach().float()
    if embeddings.ndim == 2:
        return embeddings
    used = real_tokens(embeddings).any(dim=0).nonzero()
    return embeddings[:, : int(used[-1]) + 1 if len(used) else 1].clone()
