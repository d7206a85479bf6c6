import pytest
import torch

from distillation.errors import ConditionError
from distillation.families.text import TextEncoding, text_of


class Counted(TextEncoding):
    """Each text becomes as many rows as it has letters, at most the maximum, all equal to its length."""

    def __init__(self, **settings):
        super().__init__(None, torch.nn.Linear(1, 1), **settings)
        self.text_encoder.device = torch.device("cpu")
        self.batches = []

    def _encode(self, texts):
        self.batches.append(texts)
        return [torch.full((min(len(text), self.max_sequence_length), 2), float(len(text))) for text in texts]


def test_texts_are_padded_with_zeros_and_encoded_once():
    encoding = Counted(max_sequence_length=3)
    condition = encoding(["ab", "", "abcd", {"prompt": "ab"}])
    assert condition.embeddings[:, :, 0].tolist() == [[2, 2, 0], [0, 0, 0], [4, 4, 4], [2, 2, 0]]
    assert encoding.batches == [["ab", "", "abcd"]]
    assert encoding(["abcd"]).embeddings[0, 0, 0] == 4
    assert len(encoding.batches) == 1


def test_many_texts_go_in_batches_and_more_than_the_cache_holds_are_right():
    encoding = Counted(max_sequence_length=50, cache_size=5)
    texts = ["a" * length for length in range(1, 41)]
    assert encoding(texts).embeddings[:, 0, 0].tolist() == list(range(1, 41))
    assert [len(batch) for batch in encoding.batches] == [16, 16, 8]


def test_the_encoder_is_frozen():
    encoding = Counted(max_sequence_length=3)
    assert not encoding.text_encoder.training
    assert not any(weight.requires_grad for weight in encoding.text_encoder.parameters())


@pytest.mark.parametrize("prompt", [3, None, {"text": "a"}, {"prompt": 3}])
def test_what_is_no_prompt_is_named(prompt):
    with pytest.raises(ConditionError, match="a prompt is a text or a mapping"):
        text_of(prompt)
