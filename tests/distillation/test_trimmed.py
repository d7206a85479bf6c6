"""Padding is put back bit for bit, and only into the rows that are taken."""

from types import SimpleNamespace

import pytest
import torch

from distillation import run_command
from distillation.cached import CachedText
from distillation.condition import TextCondition
from distillation.data import DistillationData
from distillation.errors import ConditionError
from distillation.run_command import InParts
from distillation.trimmed import TrimmedText, trimmed_rows

LENGTHS = {"a": 1, "bb": 2, "cccc": 4, "": 0}
PROMPTS = ["bb", "a", "bb", "cccc"]


def encode(prompts):
    """One token per letter, drawn from it, of six in all, and a tensor beside them."""
    embeddings = torch.zeros(len(prompts), 6, 3)
    for row, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(len(prompt))
        embeddings[row, : len(prompt)] = torch.randn(len(prompt), 3, generator=generator)
    return TextCondition(embeddings, {"count": torch.tensor([len(prompt) for prompt in prompts])})


def cached():
    rows = dict(zip(LENGTHS, trimmed_rows(encode(list(LENGTHS))), strict=True))
    return CachedText(rows, 6)


@pytest.fixture(params=["cached", "in parts"])
def trimmed(request, monkeypatch):
    monkeypatch.setattr(run_command, "_TEXT_BATCH", 2)
    return cached().trimmed if request.param == "cached" else InParts(SimpleNamespace(encode=encode))


def equal(one, other):
    return torch.equal(one.embeddings, other.embeddings) and torch.equal(one.extra["count"], other.extra["count"])


def test_a_batch_is_that_of_the_padded_prompts(trimmed):
    whole, lean = (DistillationData(PROMPTS, how, guided=True) for how in (encode, trimmed))
    for chosen in ([0], [3, 0, 2], [1, 1]):
        ours, theirs = (data.batch(torch.tensor(chosen), "cpu") for data in (lean, whole))
        assert equal(ours.condition, theirs.condition) and equal(ours.negative, theirs.negative)
    assert equal(trimmed(PROMPTS).to("cpu"), encode(PROMPTS))


def test_no_more_than_the_tokens_is_held(trimmed):
    held = trimmed(list(LENGTHS))
    assert isinstance(held, TrimmedText) and len(held) == 4
    assert [row["embeddings"].untyped_storage().nbytes() for row in held.rows] == [12, 24, 48, 12]


def test_what_does_not_fit_together_is_refused(monkeypatch):
    monkeypatch.setattr(run_command, "_TEXT_BATCH", 1)
    longest = SimpleNamespace(encode=lambda prompts: TextCondition(torch.ones(1, len(prompts[0]), 3)))
    with pytest.raises(ConditionError, match="the same maximum length"):
        InParts(longest)(["a", "bb"])
    with pytest.raises(ConditionError, match="at least one"):
        cached().trimmed([])
