"""Latents that stay in their files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distillation.data import DistillationData
from distillation.errors import NoiseError
from distillation.latents import ShardedLatents


@pytest.fixture
def whole(randn):
    return randn(7, 2, 3, 4, 4)


@pytest.fixture
def sharded(whole):
    return ShardedLatents(whole.split([3, 1, 3]))


@pytest.mark.parametrize("rows", [slice(None), slice(2, 5), torch.tensor([6, 0, 3, 3, 2])])
def test_rows_of_several_parts_are_those_of_the_whole(whole, sharded, rows):
    assert torch.equal(sharded[rows], whole[rows])
    assert (len(sharded), sharded.shape, sharded.dtype) == (7, whole.shape, whole.dtype)


def test_a_distillation_takes_them_as_it_takes_a_tensor(whole, sharded):
    chosen = torch.tensor([4, 0])
    data, plain = (DistillationData((latents, None), None, guided=False) for latents in (sharded, whole))
    assert len(data) == 7 and torch.equal(data.batch(chosen, "cpu").latents, plain.batch(chosen, "cpu").latents)


def test_a_row_that_is_not_finite_is_named(whole):
    whole[5, 0, 0, 0, 0] = torch.nan
    with pytest.raises(NoiseError, match=r"latents\[5\] holds NaN"):
        DistillationData((ShardedLatents(whole.split([3, 1, 3])), None), None, guided=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the process has mapped")
def test_what_is_loaded_stays_in_its_file(whole, tmp_path):
    save_file({"latents": whole}, tmp_path / "a.safetensors")
    mapped = lambda: str(tmp_path / "a.safetensors") in Path("/proc/self/maps").read_text()  # noqa: E731
    latents = ShardedLatents([load_file(tmp_path / "a.safetensors")["latents"]])
    assert mapped()
    del latents
    assert not mapped()
