import pytest
import torch

from distillation.condition import TextCondition
from distillation.denoiser import Condition
from distillation.errors import ConditionError


def condition(batch: int = 3, length: int = 2) -> TextCondition:
    embeddings = torch.arange(batch * length * 4, dtype=torch.float32).view(batch, length, 4)
    return TextCondition(embeddings, {"mask": torch.arange(batch)})


def test_it_is_a_condition_of_its_length():
    assert isinstance(condition(), Condition)
    assert len(condition(5)) == 5


def test_index_select_repeats_rows_of_every_tensor():
    chosen = condition().index_select(torch.tensor([2, 0, 2]))
    assert torch.equal(chosen.embeddings, condition().embeddings[[2, 0, 2]])
    assert chosen.extra["mask"].tolist() == [2, 0, 2]


def test_to_moves_every_tensor():
    moved = condition().to("meta")
    assert moved.embeddings.device.type == moved.extra["mask"].device.type == "meta"


def test_concatenate_keeps_order():
    joined = TextCondition.concatenate([condition(2), condition(3)])
    assert len(joined) == 5
    assert joined.extra["mask"].tolist() == [0, 1, 0, 1, 2]
    assert torch.equal(joined.embeddings[2:], condition(3).embeddings)


def test_gradient_passes_through_index_select():
    embeddings = torch.zeros(2, 1, 1, requires_grad=True)
    TextCondition(embeddings).index_select(torch.tensor([1, 1])).embeddings.sum().backward()
    assert embeddings.grad is not None and embeddings.grad.flatten().tolist() == [0.0, 2.0]


def test_errors_name_what_is_wrong():
    with pytest.raises(ConditionError, match=r"\[B, L, D\]; got shape \(2, 3\)"):
        TextCondition(torch.zeros(2, 3))
    with pytest.raises(ConditionError, match="'mask' has shape"):
        TextCondition(torch.zeros(2, 3, 4), {"mask": torch.zeros(3)})
    with pytest.raises(ConditionError, match="no conditions"):
        TextCondition.concatenate([])
    with pytest.raises(ConditionError, match="same maximum length"):
        TextCondition.concatenate([condition(2, 2), condition(2, 3)])
    with pytest.raises(ConditionError, match="condition 1 has the extra tensors"):
        TextCondition.concatenate([condition(), TextCondition(torch.zeros(1, 2, 4))])
