import pytest
import torch

from distillation.data import DistillationData
from distillation.errors import ConditionError, DistillationConfigError, NoiseError


@pytest.fixture
def encode(numbers):
    def call(prompts):
        call.seen.append(list(prompts))
        texts = [p if isinstance(p, str) else p["prompt"] for p in prompts]
        return numbers(torch.tensor([float(len(text)) for text in texts]))

    call.seen = []
    return call


def test_each_distinct_text_is_encoded_once(encode):
    data = DistillationData(["a", "bb", "a", "ccc"], encode, guided=True)
    assert encode.seen == [["a", "bb", "ccc"], [""]]
    batch = data.batch(torch.tensor([3, 0, 2]), "cpu")
    assert batch.condition.values.tolist() == [3, 1, 1]
    assert batch.negative.values.tolist() == [0, 0, 0]
    assert batch.latents is None


def test_mappings_keep_the_rest_in_their_negative(encode):
    first, second = {"prompt": "a", "image": 1}, {"prompt": "bb", "image": 2}
    DistillationData([first, second], encode, guided=True)
    assert encode.seen == [[first, second], [{"prompt": "", "image": 1}, {"prompt": "", "image": 2}]]


def test_latents_come_with_their_prompts(encode, randn):
    latents = randn(3, 1, 2, 1, 1)
    data = DistillationData((latents, ["a", "bb", "a"]), encode, guided=False)
    batch = data.batch(torch.tensor([1, 1]), "cpu")
    assert torch.equal(batch.latents, latents[[1, 1]])
    assert batch.condition.values.tolist() == [2, 2]
    assert batch.negative is None


def test_conditions_and_none_are_taken_as_they_are(encode, numbers, randn):
    data = DistillationData(numbers(torch.tensor([5.0, 6.0])), encode, guided=True)
    batch = data.batch(torch.tensor([1]), "cpu")
    assert (batch.condition.values.tolist(), batch.negative.values.tolist()) == ([6], [0])
    assert DistillationData(None, None, guided=False).batch(torch.tensor([0, 0]), "cpu").condition is None
    assert len(DistillationData((randn(3, 1, 1, 1, 1), None), None, guided=False)) == 3


def test_what_cannot_be_used_is_an_error(encode, randn):
    with pytest.raises(DistillationConfigError, match="no prompts"):
        DistillationData([], encode, guided=False)
    with pytest.raises(DistillationConfigError, match="list of texts"):
        DistillationData("a text", encode, guided=False)
    with pytest.raises(DistillationConfigError, match=r"tensor \[3, 1, 1, 1, 1\] .* \(latents, None\)"):
        DistillationData(randn(3, 1, 1, 1, 1), encode, guided=False)
    with pytest.raises(ConditionError, match="guidance needs prompts"):
        DistillationData(None, encode, guided=True)
    with pytest.raises(ConditionError, match="encode"):
        DistillationData(["a"], None, guided=False)
    with pytest.raises(ConditionError, match="3 latents for 1 prompts"):
        DistillationData((randn(3, 1, 1, 1, 1), ["a"]), encode, guided=False)
    with pytest.raises(NoiseError, match="N, C, F, H, W"):
        DistillationData((randn(3, 1, 1, 1), ["a"] * 3), encode, guided=False)
    broken = randn(3, 1, 1, 1, 1)
    broken[1] = float("nan")
    with pytest.raises(NoiseError, match=r"latents\[1\]"):
        DistillationData((broken, ["a"] * 3), encode, guided=False)
