"""Consistency by hand, on small networks from files, and what is refused before a network is built."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.metrics import check_metric, consistency, create_metric
from latent_rewards.metrics.weights import VARIABLE

NAMES = ("vbench.subject_consistency", "vbench.background_consistency")
FILES = dict(zip(NAMES, (consistency.DINO_FILE, consistency.VIT_B_32), strict=True))
SIZES = {NAMES[0]: {"width": 16, "depth": 1, "heads": 2}, NAMES[1]: {"width": 16, "depth": 1, "heads": 2, "output": 8}}


def tensors_of(name: str, seed: int) -> dict[str, Tensor]:
    """Random weights that tell frames apart."""
    build, prefix = {NAMES[0]: (consistency.dino_network, ""), NAMES[1]: (consistency.clip_image_network, "visual.")}[
        name
    ]
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + key: 0.6 * torch.randn(value.shape, generator=generator)
        for key, value in build(**SIZES[name]).state_dict().items()
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for name in NAMES:
        save_file(tensors_of(name, 0), folder / FILES[name].name)
    return folder


def small(name: str, weights: Path):
    return create_metric(name, weights=weights, model=SIZES[name])


def test_the_formula_by_hand():
    root = 0.5**0.5
    features = torch.tensor([[2.0, 0.0], [3.0, 3.0], [1.0, 0.0]])
    assert float(consistency.frame_consistency(features)) == pytest.approx((root + (root + 1) / 2) / 2)
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]], [[1.0, 0.0], [4.0, 0.0], [2.0, 0.0]]])
    # Of the first clip only the third frame resembles another, the one before it.
    assert consistency.frame_consistency(opposite).tolist() == [0.25, 1.0]


@pytest.mark.parametrize("shape", [(1, 4), (4,)])
def test_one_frame_has_no_consistency(shape):
    with pytest.raises(DataError, match="at least 2 frames"):
        consistency.frame_consistency(torch.ones(shape))


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract(name, weights):
    check_metric(small(name, weights), num_samples=3)


@pytest.mark.parametrize("name", NAMES)
def test_a_still_clip_is_consistent_and_one_that_changes_is_not(name, weights, textures, cheats):
    metric = small(name, weights)
    assert metric(cheats["still"]).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert (metric(textures) < 0.9999).all() and (metric(cheats["noise"]) < 0.9999).all()
    grey = textures.mean(dim=2, keepdim=True)
    torch.testing.assert_close(metric(grey), metric(grey.repeat(1, 1, 3, 1, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_reaches_every_frame(name, weights, textures):
    videos = textures[:1, :5].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(small(name, weights).score(videos).sum(), videos)
    assert (gradient.abs().amax(dim=(0, 2, 3, 4)) > 0).all()


def test_frames_go_through_the_network_in_chunks():
    counts = []

    def features(network: torch.nn.Module, frames: Tensor) -> Tensor:
        counts.append(len(frames))
        return frames.flatten(1)

    videos = torch.rand(3, 15, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    values = consistency.Consistency(torch.nn.Identity(), features, torch.device("cpu"))(videos)
    assert counts == [16, 16, 13]
    assert torch.equal(values, consistency.frame_consistency(videos.flatten(2)))


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_tells_weights_apart_and_not_where_they_lie(name, weights, tmp_path):
    first = small(name, weights).fingerprint
    for seed, same in ((0, True), (1, False)):
        save_file(tensors_of(name, seed), tmp_path / FILES[name].name)
        assert (small(name, tmp_path / FILES[name].name).fingerprint == first) is same


@pytest.mark.parametrize("name", NAMES)
def test_missing_weights_are_named_before_a_network_is_built(name, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    for builder in ("dino_network", "clip_image_network"):
        monkeypatch.setattr(consistency, builder, lambda **sizes: pytest.fail("a network was built"))
    with pytest.raises(DataError, match=f"(?s){FILES[name].name}.*MB.*from.*{VARIABLE}"):
        create_metric(name)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_another_network_are_refused(name, weights):
    other = FILES[NAMES[1 - NAMES.index(name)]].name
    with pytest.raises(DataError, match=f"{FILES[name].name} does not fit VisionTransformer"):
        create_metric(name, weights=weights / other, model=SIZES[name])
    with pytest.raises(DataError, match="where .* is "):
        create_metric(name, weights=weights, model={**SIZES[name], "width": 32})


def test_an_unknown_size_is_refused(weights):
    with pytest.raises(ConfigError, match="'witdh'.*width"):
        create_metric(NAMES[0], weights=weights, model={"witdh": 16})
