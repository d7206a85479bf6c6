"""Prompts become features that keep words and pairs apart, and wrong prompts are refused."""

import pytest
import torch

from latent_rewards.contracts import DataError
from latent_rewards.proxies.text import PromptFeatures, hash_texts, mean_token


def test_hashing_keeps_one_character_words_and_ignores_case():
    features = hash_texts(["digit 3", "digit 8", "DIGIT 3", "3 digit"], 256)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert torch.equal(features[0], features[2])
    assert not torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[3])
    assert float(features[0] @ features[1]) == pytest.approx(1 / 3, abs=1e-6)


def test_texts_and_mappings_read_alike_and_embeddings_are_kept():
    read = PromptFeatures.infer(["a"], 64)
    assert read == PromptFeatures("text", 64)
    assert torch.equal(read(["red ball"], 1), read([{"prompt": "red ball"}], 1))
    tokens = torch.randn(2, 5, 3)
    read = PromptFeatures.infer(tokens, 64)
    assert read == PromptFeatures("tokens", 3)
    assert torch.equal(read(tokens, 2), tokens)
    read = PromptFeatures.infer(tokens[:, 0], 64)
    assert read == PromptFeatures("embedding", 3)
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
        ("embedding", torch.zeros(2, 3, 4), r"\[N, 4\]"),
        ("tokens", torch.zeros(2, 4), r"\[N, L, 4\]"),
        ("embedding", torch.full((2, 4), float("nan")), "NaN"),
    ],
)
def test_wrong_prompts_are_refused(kind, prompts, message):
    with pytest.raises(DataError, match=message):
        PromptFeatures(kind, 4)(prompts, 2)


def _letters(texts):
    """One token per letter, padded to 9: its place in the alphabet, and a one."""
    tokens = torch.zeros(len(texts), 9, 2)
    for row, text in enumerate(texts):
        for column, letter in enumerate(text):
            tokens[row, column] = torch.tensor([ord(letter) - 97.0, 1.0])
    return tokens


def test_an_encoder_sees_each_text_once_and_common_padding_is_cut():
    asked = []

    def encode(texts):
        asked.append(list(texts))
        return _letters(texts)

    read = PromptFeatures.infer(["ab"], 64, encode)
    assert read == PromptFeatures("tokens", 2, encoded=True)
    tokens = read(["ab", "c", {"prompt": "ab"}], 3, encode)
    assert asked[-1] == ["ab", "c"]
    assert tokens.tolist() == [[[0, 1], [1, 1]], [[2, 1], [0, 0]], [[0, 1], [1, 1]]]
    assert mean_token(tokens).tolist() == [[0.5, 1], [2, 1], [0.5, 1]]
    assert read(torch.ones(1, 4, 2), 1).shape == (1, 4, 2)


def test_many_texts_are_encoded_in_chunks_and_padded_to_the_longest():
    sizes = []

    def encode(texts):
        sizes.append(len(texts))
        return _letters(texts)

    texts = ["a" * (1 + i // 64) + chr(97 + i % 26) * (i % 64 // 26) for i in range(130)]
    tokens = PromptFeatures("tokens", 2, encoded=True)(texts, 130, encode)
    assert max(sizes) <= 64 and sum(sizes) == len(set(texts))
    assert tokens.shape[1] == max(map(len, texts)) < 9
    assert torch.equal(tokens, _letters(texts)[:, : tokens.shape[1]])


def test_a_missing_or_broken_encoder_is_named():
    with pytest.raises(DataError, match="pass it: RewardProxy.from_pretrained"):
        PromptFeatures("tokens", 2, encoded=True)(["a"], 1)
    with pytest.raises(DataError, match=r"returned \(3,\) for 2 texts"):
        PromptFeatures("tokens", 2, encoded=True)(["a", "b"], 2, lambda texts: torch.zeros(3))
    with pytest.raises(DataError, match="returned list for 1 texts"):
        PromptFeatures.infer(["a"], 64, lambda texts: [0.0])
