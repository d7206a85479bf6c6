"""A table of prompts gives the features the proxy would make of each, without keeping a row for every sample."""

import pytest
import torch

from latent_rewards.contracts import DataError
from latent_rewards.proxies import ProxyConfig, RewardProxy, prompt_table as module
from latent_rewards.proxies.prompt_table import PromptTable
from latent_rewards.proxies.text import PromptFeatures

TEXTS = [f"clip {i % 5} of a cat" for i in range(20)]
ROWS = torch.tensor([3, 19, 3, 0])


def proxy(features, encode=None):
    return RewardProxy(ProxyConfig(width=8, depth=1), (2, 1, 2, 2), ("a",), features, encode=encode)


@pytest.mark.parametrize("kept", [0, 2**23])
def test_hashed_texts_are_the_same_kept_or_not(monkeypatch, kept):
    monkeypatch.setattr(module, "KEPT_BYTES", kept)
    reads = proxy(PromptFeatures("text", 32))
    asked, original = [], RewardProxy.raw_prompts
    monkeypatch.setattr(RewardProxy, "raw_prompts", lambda self, p, n: asked.append(list(p)) or original(self, p, n))
    table = PromptTable(reads, TEXTS, 20)
    assert torch.equal(table(ROWS), original(reads, [TEXTS[i] for i in ROWS], 4))
    assert asked == ([TEXTS[:5]] if kept else [[TEXTS[i] for i in ROWS]])


def test_an_encoder_reads_each_distinct_text_once():
    seen = []

    def encode(texts):
        seen.extend(texts)
        return torch.tensor([[float(ord(text[5])), 1.0] for text in texts])

    table = PromptTable(proxy(PromptFeatures("embedding", 2, encoded=True), encode), [{"prompt": t} for t in TEXTS], 20)
    assert table(ROWS)[:, 0].tolist() == [ord("3"), ord("4"), ord("3"), ord("0")]
    assert seen == TEXTS[:5]


def test_embeddings_are_not_copied():
    given = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    table = PromptTable(proxy(PromptFeatures("embedding", 3)), given, 20)
    assert torch.equal(table(ROWS), given[ROWS])
    assert table._features.data_ptr() == given.data_ptr()


def test_missing_and_foreign_prompts_are_refused_and_none_are_needed_by_some():
    assert PromptTable(proxy(PromptFeatures("none", 0)), TEXTS, 20)(ROWS) is None
    with pytest.raises(DataError, match="fitted with prompts"):
        PromptTable(proxy(PromptFeatures("text", 32)), None, 20)
    with pytest.raises(DataError, match="texts were given"):
        PromptTable(proxy(PromptFeatures("embedding", 3)), TEXTS, 20)
    with pytest.raises(DataError, match="embeddings were given"):
        PromptTable(proxy(PromptFeatures("text", 32)), torch.zeros(20, 32), 20)
