"""A backbone's features are those of the transformer's own blocks, its adapters are LoRA, its fingerprint says both."""

import pytest
import torch
from torch import nn

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.proxies import WanBackbone

LATENTS = torch.randn(2, 4, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TIMES = torch.tensor([0.2, 0.7])


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_features_are_those_of_the_stock_models_block(make_wan, blocks):
    model = make_wan().double()
    outputs = []
    hook = model.blocks[blocks - 1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    padded = torch.cat([TOKENS, torch.zeros(2, 3, 12, dtype=torch.float64)], dim=1)
    model(LATENTS, timestep=1000 * TIMES, encoder_hidden_states=padded, return_dict=False)
    hook.remove()
    hidden = outputs[0].unflatten(1, (3, 6))
    expected = torch.cat([hidden.mean(dim=2), hidden.amax(dim=2)], dim=2)
    backbone = WanBackbone(model, num_blocks=blocks, text_length=8)
    features = backbone.features(LATENTS, TOKENS, TIMES)
    assert features.shape == (2, 3, 2 * backbone.width) == (2, 3, 48)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)


def test_time_and_prompt_matter_and_no_prompt_is_zeros(make_wan):
    backbone = WanBackbone(make_wan().double(), num_blocks=2, text_length=8)
    features = backbone.features(LATENTS, TOKENS, TIMES)
    assert not torch.allclose(features, backbone.features(LATENTS, TOKENS, TIMES.flip(0)))
    assert not torch.allclose(features, backbone.features(LATENTS, -TOKENS, TIMES))
    without = backbone.features(LATENTS, None, TIMES)
    assert torch.equal(without, backbone.features(LATENTS, torch.zeros_like(TOKENS), TIMES))
    shifted = WanBackbone(backbone.transformer, num_blocks=2, text_length=8, time=lambda t: 1000 * t + 50)
    assert not torch.allclose(features, shifted.features(LATENTS, TOKENS, TIMES))
    with pytest.raises(DataError, match="5 tokens; text_length is 4"):
        WanBackbone(backbone.transformer, num_blocks=2, text_length=4).features(LATENTS, TOKENS, TIMES)


def test_the_gradient_reaches_the_latents_and_nothing_else(make_wan):
    backbone = WanBackbone(make_wan().train().double(), num_blocks=2)
    latents = LATENTS.clone().requires_grad_()
    backbone.features(latents, None, TIMES)[0].sum().backward()
    assert (latents.grad[0] != 0).all() and (latents.grad[1] == 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())
    assert not backbone.transformer.training


def weights_of(backbone, rank, seed):
    source = torch.Generator().manual_seed(seed)
    shapes = backbone.add_adapter(rank)
    return {name: torch.randn(shape, generator=source, dtype=torch.float64) for name, shape in shapes.items()}


def test_adapters_are_low_rank_changes_of_the_weights(make_wan):
    backbone = WanBackbone(make_wan().double(), num_blocks=2, text_length=8)
    plain = backbone.features(LATENTS, TOKENS, TIMES)
    weights = weights_of(backbone, 2, 0)
    assert len(weights) == 2 * 2 * 4 * 2 and not any(".blocks.2." in name for name in weights)
    merged = make_wan().double()
    for name, down in weights.items():
        if ".lora_A." in name:
            layer = merged.get_submodule(name.split(".lora_A.")[0].removeprefix("transformer."))
            layer.weight.data += weights[name.replace("lora_A", "lora_B")] @ down
    expected = WanBackbone(merged, num_blocks=2, text_length=8).features(LATENTS, TOKENS, TIMES)
    adapted = backbone.features(LATENTS, TOKENS, TIMES, weights)
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(adapted, plain)
    assert torch.equal(backbone.features(LATENTS, TOKENS, TIMES), plain)


def test_proxies_of_other_ranks_share_a_transformer(make_wan):
    model = make_wan().double()
    one, two = WanBackbone(model, num_blocks=2, text_length=8), WanBackbone(model, num_blocks=3, text_length=8)
    first = weights_of(one, 2, 0)
    before = one.features(LATENTS, TOKENS, TIMES, first)
    plain = two.features(LATENTS, TOKENS, TIMES)
    second = weights_of(two, 3, 1)
    assert not torch.allclose(two.features(LATENTS, TOKENS, TIMES, second), plain)
    assert torch.equal(one.features(LATENTS, TOKENS, TIMES, first), before)
    assert torch.equal(two.features(LATENTS, TOKENS, TIMES), plain)
    assert one.add_adapter(2).keys() == first.keys()


def test_adding_an_adapter_draws_from_no_global_generator(make_wan):
    backbone = WanBackbone(make_wan(), num_blocks=1)
    before = torch.get_rng_state()
    backbone.add_adapter(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_is_that_of_what_is_used(make_wan):
    fingerprint = WanBackbone(make_wan(), num_blocks=2).fingerprint
    assert fingerprint.startswith("wan-backbone-")
    same = make_wan()
    nn.init.zeros_(same.blocks[2].ffn.net[2].weight)
    nn.init.zeros_(same.proj_out.weight)
    backbone = WanBackbone(same.bfloat16(), num_blocks=2)
    backbone.add_adapter(4)
    assert backbone.fingerprint == fingerprint
    changed = make_wan()
    changed.blocks[1].ffn.net[2].weight.data[0, 0] += 1
    others = [
        WanBackbone(changed, num_blocks=2),
        WanBackbone(make_wan(1), num_blocks=2),
        WanBackbone(make_wan(), num_blocks=1),
        WanBackbone(make_wan(eps=1e-5), num_blocks=2),
        WanBackbone(make_wan(), num_blocks=2, time=lambda t: t),
        WanBackbone(make_wan(), num_blocks=2, text_length=7),
    ]
    assert len({fingerprint, *(other.fingerprint for other in others)}) == 7


def test_what_cannot_be_read_is_refused(make_wan):
    with pytest.raises(ConfigError, match=r"num_blocks must lie in \[1, 3\].*got 4"):
        WanBackbone(make_wan(), num_blocks=4)
    with pytest.raises(ConfigError, match="Linear has no patch_embedding, condition_embedder, rope"):
        WanBackbone(nn.Linear(1, 1), num_blocks=1)
    with pytest.raises(ConfigError, match="text_length"):
        WanBackbone(make_wan(), num_blocks=1, text_length=0)
    backbone = WanBackbone(make_wan(), num_blocks=1)
    backbone.check((4, 3, 4, 6))
    for shape in [(3, 3, 4, 6), (4, 3, 1, 6), (4, 33, 4, 6)]:
        with pytest.raises(DataError, match="4 channels in 1 to 32 patches"):
            backbone.check(shape)
    from peft import LoraConfig

    adapted = make_wan()
    adapted.add_adapter(LoraConfig(r=1, target_modules=["to_q"]), "style")
    with pytest.raises(ConfigError, match=r"adapters \['style'\]"):
        WanBackbone(adapted, num_blocks=1)
