"""Shared features are scaled, belong to the backbone, and read prompts only where they are its own."""

import copy

import pytest
import torch

from latent_rewards.contracts import FingerprintMismatchError
from latent_rewards.proxies import WanBackbone
from latent_rewards.proxies.text import PromptFeatures
from latent_rewards.proxies.trunks.shared import PassThrough, SharedTrunk, check_backbone

SHAPE = (4, 3, 4, 6)
LATENTS = torch.randn(6, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(6, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def backbone(make_wan):
    return WanBackbone(make_wan().double(), num_blocks=2, text_length=8)


def test_features_are_scaled_over_samples_and_frames(backbone):
    shared = SharedTrunk(backbone, SHAPE, PromptFeatures("none", 0), 0).double()
    plain = shared(LATENTS, None)
    torch.testing.assert_close(plain, backbone.features(LATENTS, None, torch.zeros(6)))
    for _ in range(2):
        shared.fit_scales(shared(LATENTS, None))
        flat = shared(LATENTS, None).flatten(0, 1)
        torch.testing.assert_close(flat.mean(dim=0), torch.zeros(48).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(flat.std(dim=0, unbiased=False), torch.ones(48).double(), rtol=0, atol=1e-6)


def test_tokens_of_its_own_dimension_reach_the_transformer_and_others_do_not(backbone):
    own = SharedTrunk(backbone, SHAPE, PromptFeatures("tokens", 12), 0).double()
    t = torch.full((6,), 0.3)
    torch.testing.assert_close(own(LATENTS, TOKENS, t), backbone.features(LATENTS, TOKENS, t))
    for foreign in (PromptFeatures("tokens", 11), PromptFeatures("text", 12), PromptFeatures("embedding", 12)):
        other = SharedTrunk(backbone, SHAPE, foreign, 0).double()
        assert torch.equal(other(LATENTS, TOKENS, t), backbone.features(LATENTS, None, t))


def test_the_backbone_is_neither_copied_nor_stored_and_adapters_are(backbone):
    shared = SharedTrunk(backbone, SHAPE, PromptFeatures("none", 0), 2).double()
    names = set(shared.state_dict())
    assert len(names) == 2 + 2 * 2 * 4 * 2 and all("lora_" in name or name.startswith("feature_") for name in names)
    plain = backbone.features(LATENTS, None, torch.zeros(6))
    torch.testing.assert_close(shared(LATENTS, None), plain)
    copied = copy.deepcopy(shared)
    assert copied._held.value is backbone
    with torch.no_grad():
        for value in copied.adapters.values():
            value.add_(0.1)
    assert torch.equal(shared(LATENTS, None), plain) and not torch.allclose(copied(LATENTS, None), plain)


def test_the_gradient_of_the_adapters_is_that_of_finite_differences(backbone):
    torch.manual_seed(0)
    shared = SharedTrunk(backbone, SHAPE, PromptFeatures("none", 0), 2).double()
    source = torch.Generator().manual_seed(3)
    direction = {key: torch.randn(p.shape, generator=source, dtype=p.dtype) for key, p in shared.adapters.items()}

    def moved(step):
        for key, parameter in shared.adapters.items():
            parameter.data += step * direction[key]
        return shared(LATENTS, None).square().sum()

    moved(0.1).backward()
    slope = sum((direction[key] * p.grad).sum() for key, p in shared.adapters.items())
    # Wan computes its norms in float32, whatever its dtype, so steps cannot be small: four points instead of two.
    step = 5e-3
    with torch.no_grad():
        above, twice, below, twice_below = (moved(way * step) for way in (1, 1, -3, -1))
        numeric = (8 * (above - below) - (twice - twice_below)) / (12 * step)
    torch.testing.assert_close(slope, numeric, rtol=3e-3, atol=3e-2)


def test_another_backbone_is_named_beside_the_stored_one(backbone, make_wan):
    check_backbone(None, backbone)
    check_backbone(backbone.fingerprint, None)
    check_backbone(backbone.fingerprint, backbone)
    other = WanBackbone(make_wan(1), num_blocks=2)
    with pytest.raises(FingerprintMismatchError, match=f"'{backbone.fingerprint}'.*'{other.fingerprint}'"):
        check_backbone(backbone.fingerprint, other)


def test_the_pass_through_hands_features_on():
    features = torch.randn(2, 3, 5)
    assert PassThrough(5)(features, None) is features and PassThrough(5).num_features == 5
