import copy

import pytest
import torch
from torch import nn

from distillation.adversarial import AdversarialHead, generator_loss
from distillation.condition import TextCondition
from distillation.errors import DistillationConfigError, NoiseError
from distillation.families.wan import WanDenoiser
from distillation.features import BlockFeatures, find_blocks
from distillation.schedule import RectifiedFlow
from distillation.temporal import feature_similarity_loss

T = torch.tensor([0.3, 0.8])


@pytest.fixture
def denoiser(tiny_wan):
    """A Wan transformer of three blocks; [B, 4, 3, 4, 4] become 3 frames of 4 tokens of 24 channels."""
    return tiny_wan(num_layers=3).float().requires_grad_(False)


@pytest.fixture
def condition():
    return TextCondition(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def x():
    return torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()


def calls(denoiser):
    """How often each block was called, counted from now on."""
    counts = [0, 0, 0]
    for index, block in enumerate(find_blocks(denoiser)):
        block.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    return counts


@pytest.mark.parametrize("block", [0, 1, 2, -1])
def test_features_are_the_blocks_output_and_the_exit_saves_the_rest(denoiser, condition, x, block):
    late = BlockFeatures(denoiser, block, early_exit=False)(x, T, condition)
    counts = calls(denoiser)
    early = BlockFeatures(denoiser, block)(x, T, condition)
    assert early.shape == (2, 3, 4, 24)
    assert torch.equal(early, late)
    assert counts == [int(index <= block % 3) for index in range(3)]
    assert not torch.equal(early, BlockFeatures(denoiser, (block + 1) % 3)(x, T, condition))


def test_tokens_of_a_frame_are_that_frames(denoiser, condition, x):
    # Before any block attends across frames: the patch embedding of each frame alone.
    embed = denoiser.transformer.patch_embedding
    find_blocks(denoiser)[0].forward = lambda hidden_states, *rest: hidden_states
    features = BlockFeatures(denoiser, 0)(x, T, condition)
    for frame in range(3):
        alone = embed(x[:, :, frame : frame + 1]).flatten(2).transpose(1, 2)
        assert torch.allclose(features[:, frame], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_the_latents_through_the_hook(denoiser, condition, x, checkpointing):
    def gradient(early_exit):
        features = BlockFeatures(denoiser, 1, early_exit=early_exit)(x, T, condition)
        return torch.autograd.grad(features.square().sum(), x)[0]

    expected = gradient(early_exit=False)
    if checkpointing:
        denoiser.transformer.train().enable_gradient_checkpointing()
    actual = gradient(early_exit=True)
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert float(expected.flatten(1).norm(dim=1).min()) > 1e-2, "both samples get one"
    # It is the derivative: along a direction, against a difference quotient.
    features, direction, step = BlockFeatures(denoiser, 1), torch.randn_like(x), 1e-2
    with torch.no_grad():
        ends = [features(x + sign * step * direction, T, condition).double().square().sum() for sign in (1, -1)]
    assert float((actual * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=2e-2)


def test_the_network_is_left_as_it_was(denoiser, condition, x):
    before = denoiser(x, T, condition).x0
    BlockFeatures(denoiser, 0)(x, T, condition)
    assert torch.equal(denoiser(x, T, condition).x0, before)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in find_blocks(denoiser))


def test_a_head_on_the_features_moves_the_student_and_not_the_frozen_network(denoiser, condition, x):
    head = AdversarialHead(24, hidden_dim=8)
    nn.init.ones_(head.judge.weight)
    loss = generator_loss(head(BlockFeatures(denoiser, 1)(x, T, condition)))
    loss.backward()
    assert float(x.grad.abs().min(dim=0).values.max()) > 0
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert all(parameter.grad is not None for parameter in head.parameters() if parameter is not head.attend.bias)


def test_feature_similarity_takes_a_bound_block(denoiser, condition, x):
    features = BlockFeatures(denoiser, 0)
    still = x.detach()[:, :, :1].expand(-1, -1, 3, -1, -1)
    loss = feature_similarity_loss(x, still, lambda latents: features(latents, T, condition))
    loss.backward()
    assert float(loss.detach()) > 1e-4
    assert float(x.grad.abs().max()) > 0
    same = feature_similarity_loss(x, x.detach(), lambda latents: features(latents, T, condition))
    assert float(same.detach()) == 0


def test_the_first_of_several_outputs_is_the_video(denoiser, condition, x):
    blocks = find_blocks(denoiser)
    expected = BlockFeatures(denoiser, 0)(x, T, condition)
    plain = blocks[0].forward
    blocks[0].forward = lambda *inputs, **options: (plain(*inputs, **options), "text")
    assert torch.equal(BlockFeatures(denoiser, 0)(x, T, condition), expected)


def test_mistakes_are_errors(denoiser, affine, condition, x):
    with pytest.raises(DistillationConfigError, match=r"0\.\.2, the blocks of this network; got 3"):
        BlockFeatures(denoiser, 3)
    with pytest.raises(DistillationConfigError, match="AffineDenoiser has no lists of blocks"):
        BlockFeatures(affine(RectifiedFlow()), 0)
    experts = {"transformer_2": copy.deepcopy(denoiser.transformer), "boundary_ratio": 0.5}
    with pytest.raises(DistillationConfigError, match="WanDenoiser has 2 lists of blocks .*set feature_weight"):
        BlockFeatures(WanDenoiser(denoiser.transformer, RectifiedFlow(), **experts), 0)
    find_blocks(denoiser)[0].forward = lambda hidden_states, *rest: hidden_states[:, :-1]
    with pytest.raises(NoiseError, match="for 3 latent frames"):
        BlockFeatures(denoiser, 0)(x, T, condition)
