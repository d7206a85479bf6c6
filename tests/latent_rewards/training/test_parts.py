from pathlib import Path

import pytest
import torch
from torch import nn

from latent_rewards.training.checkpoint import CheckpointError
from latent_rewards.training.parts import load_parts, pack_parts

SOURCE = Path("runs/step-00000001")


def made(value, width=2, groups=1):
    """Return two networks and an optimiser of one of them."""
    first, second = nn.Linear(2, 1), nn.Linear(width, 1)
    for parameter in (*first.parameters(), *second.parameters()):
        nn.init.constant_(parameter, value)
    parameters = list(first.parameters())
    optimizer = torch.optim.AdamW([{"params": parameters[i::groups]} for i in range(groups)])
    first(torch.ones(1, 2)).sum().backward()
    return {"module.a": first, "module.b": second, "optimizer.a": optimizer}


def values(parts):
    return {float(p.detach()[0].flatten()[0]) for name in ("module.a", "module.b") for p in parts[name].parameters()}


def test_what_is_packed_is_loaded_by_name():
    parts = made(1.0)
    packed = pack_parts(dict(reversed(parts.items())))
    again = made(2.0)
    load_parts(again, packed, SOURCE)
    assert values(again) == {1.0}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (made(1.0, width=3), r"another module.b .*output_dir \(weight is of shape \(1, 3\) there, \(1, 2\) here\)"),
        (
            made(1.0, groups=2),
            r"another optimizer.a .*output_dir \(groups of \[1, 1\] parameters there, \[2\] here",
        ),
        (
            {**made(1.0), "module.b": nn.Linear(2, 1, bias=False)},
            r"another module.b .*\(bias is of shape None there, \(1,\) here\)",
        ),
        ({"module.a": nn.Linear(2, 1)}, r"holds \['module.a'\], this run has"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_part_is_changed(stored, message):
    parts = made(2.0)
    with pytest.raises(CheckpointError, match=message):
        load_parts(parts, pack_parts(stored), SOURCE)
    assert values(parts) == {2.0}


def test_an_optimiser_keeps_nothing_of_what_was_read():
    parts = made(1.0)
    parts["optimizer.a"].step()
    packed = pack_parts(parts)
    again = made(2.0)
    load_parts(again, packed, SOURCE)
    stored, loaded = (p["optimizer.a"].state_dict()["state"][0]["exp_avg"] for p in (parts, again))
    assert torch.equal(stored, loaded) and stored.data_ptr() != loaded.data_ptr()
