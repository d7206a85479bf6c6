"""Space-time attention: any latent size, each half mixes only what it should, and positions are told apart."""

import pytest
import torch
from torch import nn

from latent_rewards.proxies.trunks.conv3d import pool_positions
from latent_rewards.proxies.trunks.transformer import Attention, SpaceTimeBlock, TransformerTrunk, grid_code


def stir(module):
    """Give every parameter a random value: the zeros at the start hide everything."""
    source = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=source, dtype=parameter.dtype)
    return module


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 2, 5, 4), (16, 5, 8, 8), (4, 3, 7, 9), (4, 2, 33, 40)])
def test_any_latent_size_gives_two_features_per_channel_and_frame(shape):
    trunk = stir(TransformerTrunk(shape, 8, 1, 0))
    latents = torch.randn(2, *shape, requires_grad=True)
    features = trunk(latents, None)
    assert features.shape == (2, shape[1], trunk.num_features) == (2, shape[1], 16)
    features.sum().backward()
    assert torch.isfinite(latents.grad).all() and (latents.grad != 0).any()


def test_a_trunk_reads_other_sizes_than_it_was_made_for():
    trunk = stir(TransformerTrunk((2, 3, 8, 8), 8, 1, 0))
    assert trunk(torch.randn(2, 2, 5, 11, 9), None).shape == (2, 5, 16)


def test_features_depend_on_prompt_and_on_frame_order():
    trunk = stir(TransformerTrunk((2, 4, 4, 4), 16, 2, 3))
    latents, prompt = torch.randn(1, 2, 4, 4, 4), torch.randn(1, 3)
    assert not torch.allclose(trunk(latents, prompt), trunk(latents, -prompt))
    assert not torch.allclose(trunk(latents, prompt).mean(1), trunk(latents.flip(2), prompt).mean(1))


def test_a_new_trunk_is_its_patch_embedding_and_the_positions():
    torch.manual_seed(0)
    trunk = TransformerTrunk((2, 3, 8, 8), 8, 3, 5)
    latents = torch.randn(2, 2, 3, 8, 8)
    patches = trunk.stem(latents)
    assert patches.shape == (2, 8, 3, 4, 4)
    expected = pool_positions(patches + grid_code((3, 4, 4), 8).permute(3, 0, 1, 2))
    torch.testing.assert_close(trunk(latents, torch.randn(2, 5)), expected)


def test_attention_equals_torchs():
    attention = stir(Attention(16).double())
    theirs = nn.MultiheadAttention(16, attention.heads, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = (
        attention.projections.weight.data,
        attention.projections.bias.data,
    )
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = attention.output.weight.data, attention.output.bias.data
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(attention(x), theirs(x, x, x, need_weights=False)[0], rtol=0, atol=1e-12)
    assert Attention(64).heads == 4 and Attention(8).heads == 1


@pytest.mark.parametrize("silent", ["spatial", "temporal"])
def test_each_attention_mixes_its_own_dimension_only(silent):
    block = stir(SpaceTimeBlock(16, 0).double())
    getattr(block, silent).output.weight.data.zero_()
    x = torch.randn(1, 4, 6, 16, dtype=torch.float64)
    moved = x.clone()
    moved[0, 2, 3] = x[0, 2, 3].flip(0)
    changed = (block(moved, None) - block(x, None)).abs().amax(dim=3)[0] > 1e-9
    expected = torch.zeros(4, 6, dtype=torch.bool)
    if silent == "spatial":
        expected[:, 3] = True
    else:
        expected[2] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("width", [8, 64])
def test_every_place_and_time_has_its_own_code(width):
    codes = grid_code((5, 7, 6), width)
    assert codes.shape == (5, 7, 6, width)
    distances = torch.cdist(codes.flatten(0, 2), codes.flatten(0, 2))
    assert float(distances.fill_diagonal_(9.0).min()) > 1e-2
    torch.testing.assert_close(grid_code((2, 3, 3), width), codes[:2, :3, :3])
