"""Prompts become features that keep words and pairs apart, and wrong prompts are refused."""

import pytest
import torch

from latent_rewards.contracts import DataError
from latent_rewards.proxies.text import PromptFeatures, hash_texts


def test_hashing_keeps_one_character_words_and_ignores_case():
    features = hash_texts(["digit 3", "digit 8", "DIGIT 3", "3 digit"], 256)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert torch.equal(features[0], features[2])
    assert not torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[3])
    assert float(features[0] @ features[1]) == pytest.approx(1 / 3, abs=1e-6)


def test_texts_and_mappings_read_alike_and_embeddings_are_pooled():
    read = PromptFeatures.infer(["a"], 64)
    assert read == PromptFeatures("text", 64)
    assert torch.equal(read(["red ball"], 1), read([{"prompt": "red ball"}], 1))
    tokens = torch.randn(2, 5, 3)
    read = PromptFeatures.infer(tokens, 64)
    assert torch.equal(read(tokens, 2), tokens.mean(dim=1))
    assert torch.equal(read(tokens[:, 0], 2), tokens[:, 0])
    assert PromptFeatures.infer(None, 64)(["ignored"], 3) is None


@pytest.mark.parametrize(
    ("kind", "prompts", "message"),
    [
        ("text", None, "fitted with prompts"),
        ("text", "one", "one text"),
        ("text", ["a"], "1 prompts for 2 latents"),
        ("text", torch.zeros(2, 4), "fitted with texts"),
        ("embedding", ["a", "b"], "fitted with embeddings of dimension 4"),
        ("embedding", torch.zeros(2, 5), r"\[N, 4\]"),
        ("embedding", torch.full((2, 4), float("nan")), "NaN"),
    ],
)
def test_wrong_prompts_are_refused(kind, prompts, message):
    with pytest.raises(DataError, match=message):
        PromptFeatures(kind, 4)(prompts, 2)
