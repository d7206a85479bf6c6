"""Prompts -> :class:`~distillation.condition.TextCondition`, cached and padded to one length, for any text encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from distillation.condition import TextCondition
from distillation.errors import ConditionError

_BATCH = 16


class TextEncoding:
    """A tokenizer and a frozen text encoder; a family says how its stock pipeline encodes a list of texts.

    Args:
        tokenizer: the pipeline's tokenizer.
        text_encoder: the pipeline's text encoder; it is put into evaluation mode and frozen.
        max_sequence_length: tokens per prompt, padding included. It is part of the model: the stock pipeline must be
            called with the same number.
        cache_size: prompts whose embeddings are kept (on the CPU, without padding).
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401 - any transformers tokenizer
        text_encoder: nn.Module,
        *,
        max_sequence_length: int,
        cache_size: int = 1024,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder: Any = text_encoder.eval().requires_grad_(False)
        self.max_sequence_length = max_sequence_length
        self.cache_size = cache_size
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[Any]) -> TextCondition:
        """Return embeddings [B, L, D] on the text encoder's device; an empty text is allowed (the unguided prompt).

        Raises:
            ConditionError: there is no prompt, or one is neither a text nor a mapping with a text under "prompt".
        """
        texts = [text_of(prompt) for prompt in prompts] if not isinstance(prompts, str) else []
        if not texts:
            raise ConditionError(f"prompts must be a list of at least one text; got {prompts!r}")
        found = {text: self._cache[text] for text in texts if text in self._cache}
        missing = list(dict.fromkeys(text for text in texts if text not in found))
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            found.update(zip(batch, self._encode(batch), strict=True))
        for text in dict.fromkeys(texts):
            self._cache[text] = found[text]
            self._cache.move_to_end(text)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        width = found[texts[0]].shape[1]
        embeddings = found[texts[0]].new_zeros(len(texts), self.max_sequence_length, width)
        for row, text in enumerate(texts):
            embeddings[row, : len(found[text])] = found[text]
        return TextCondition(embeddings.to(self.text_encoder.device))

    def _encode(self, texts: list[str]) -> list[Tensor]:
        """Return one [number of rows, D] per text, on the CPU; what is missing to the maximum length becomes zeros."""
        raise NotImplementedError


def text_of(prompt: Any) -> str:  # noqa: ANN401 - refused unless it is a prompt
    """Return the text of a prompt, a text or a mapping with a text under "prompt".

    Raises:
        ConditionError: it is neither.
    """
    text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    if not isinstance(text, str):
        raise ConditionError(f"a prompt is a text or a mapping with a text under 'prompt'; got {prompt!r}")
    return text
