"""The prompt features of a data set without a row for every sample: equal prompts share one, many are not kept."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rewards.contracts import prompt_text
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.text import Prompts

KEPT_BYTES = 2**23
"""Hashed prompts that take more than this are hashed again for each batch, which costs about 25 us per prompt."""


class PromptTable:
    """Indices -> prompt features, as :meth:`RewardProxy.raw_prompts` returns them.

    Embeddings are kept as they are given. Texts are reduced to the distinct ones; those that an encoder reads are
    encoded once, and those that are hashed are kept if they take at most :data:`KEPT_BYTES`.

    Args:
        proxy: reads the prompts.
        prompts: N of them, or None.
        count: N.

    Raises:
        DataError: prompts that are missing or of another kind than the proxy's.
    """

    def __init__(self, proxy: RewardProxy, prompts: Prompts | None, count: int) -> None:
        self._proxy = proxy
        self._features: Tensor | None = None
        self._texts: list[str] = []
        self._rows = torch.arange(0)
        if proxy.prompt_features.kind == "none" or prompts is None or isinstance(prompts, Tensor):
            self._features = proxy.raw_prompts(prompts, count)
            return
        rows: dict[str, int] = {}
        self._rows = torch.empty(len(prompts), dtype=torch.long)
        for index, prompt in enumerate(prompts):
            self._rows[index] = rows.setdefault(prompt_text(prompt), len(rows))
        self._texts = list(rows)
        size = 4 * len(rows) * proxy.prompt_features.dim
        if proxy.prompt_features.kind != "text" or size <= KEPT_BYTES:
            self._features = proxy.raw_prompts(self._texts, len(self._texts))

    def __call__(self, indices: Tensor) -> Tensor | None:
        """Return features ``[B, D]`` or ``[B, L, D]`` at ``indices`` (int64 ``[B]``), or None without prompts."""
        if not self._texts:
            return None if self._features is None else self._features[indices.to(self._features.device)]
        rows = self._rows[indices]
        if self._features is not None:
            return self._features[rows.to(self._features.device)]
        return self._proxy.raw_prompts([self._texts[row] for row in rows.tolist()], len(rows))
