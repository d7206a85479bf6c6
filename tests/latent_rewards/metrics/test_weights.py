"""Weight files: found, checked and loaded whole, or refused by name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latent_rewards.contracts import DataError
from latent_rewards.metrics.weights import VARIABLE, WeightsFile, file_sha256, load_weights

FILE = WeightsFile("head.safetensors", "its authors' page", 3, licence="MIT", note="Convert it first.")


@pytest.fixture
def stored(tmp_path):
    module = nn.Linear(3, 2)
    save_file(module.state_dict(), tmp_path / FILE.name)
    return module, tmp_path / FILE.name


def test_it_is_found_by_path_by_folder_and_by_variable(stored, monkeypatch):
    module, path = stored
    monkeypatch.setenv(VARIABLE, str(path.parent))
    for place in (path, path.parent, None):
        assert torch.equal(FILE.read(place)["weight"], module.weight)


def test_a_missing_file_is_named_with_its_source_size_and_place(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(
        DataError,
        match=r"(?s)head.safetensors.*does not exist.*about 3 MB, MIT.*authors' page.*"
        r"Convert it first.*LATENT_REWARDS_WEIGHTS.*`weights`",
    ):
        FILE.read(tmp_path)


def test_only_safetensors_are_read(tmp_path):
    (tmp_path / "head.pt").write_bytes(b"whatever")
    with pytest.raises(DataError, match="read as .safetensors only"):
        FILE.read(tmp_path / "head.pt")


def test_a_truncated_file_is_an_error_that_names_it(stored):
    _, path = stored
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="head.safetensors cannot be read as safetensors"):
        FILE.read(path)


def test_the_hash_is_checked_when_one_is_given(stored):
    _, path = stored
    digest = file_sha256(path)
    assert FILE.read(path, sha256=digest) and FILE.read(path, sha256=digest[:8].upper())
    with pytest.raises(DataError, match=f"has sha256 {digest}, not 00000000"):
        FILE.read(path, sha256="00000000")
    with pytest.raises(DataError, match="at least 8 characters"):
        FILE.read(path, sha256=digest[:7])


def test_weights_are_loaded_whole_frozen_and_for_evaluation(stored):
    module, path = stored
    other = nn.Linear(3, 2)
    load_weights(other, {key: value.double() for key, value in FILE.read(path).items()}, name=FILE.name)
    assert torch.equal(other.weight, module.weight) and other.weight.dtype == torch.float32
    assert not other.weight.requires_grad and not other.training


def test_a_file_of_another_layout_is_refused_by_the_names_of_its_tensors():
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    tensors = {"weight": torch.zeros(2, 4), "gain": torch.zeros(2)}
    with pytest.raises(
        DataError,
        match=r"x.safetensors does not fit Linear: a file without bias; with gain; "
        r"where weight is \[2, 4\], not \[2, 3\]",
    ):
        load_weights(module, tensors, name="x.safetensors")
    assert torch.equal(module.weight, before)
