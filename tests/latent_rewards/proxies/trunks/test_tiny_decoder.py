"""The tiny decoder draws as many frames as the codec decodes, whatever the clip's length, near 16 pixels a side."""

import pytest
import torch
from torch.nn import functional

from latent_rewards.contracts import DataError
from latent_rewards.proxies.trunks.tiny_decoder import TinyDecoder, drawing_scale


@pytest.mark.parametrize(
    ("sides", "scale"),
    [((8, 8), (1, 2)), ((4, 6), (1, 4)), ((16, 30), (1, 1)), ((30, 52), (2, 1)), ((60, 104), (4, 1))],
)
def test_what_is_drawn_is_near_sixteen_pixels_a_side(sides, scale):
    assert drawing_scale(*sides) == scale
    decoder = TinyDecoder(2, stride=scale[0], zoom=scale[1], frames_per_latent=1, dropped=0)
    height, width = decoder(torch.zeros(1, 2, 1, *sides)).shape[3:]
    assert (height, width) == tuple(side * scale[1] // scale[0] for side in sides)
    assert 8 <= min(height, width) < 24


def test_frames_are_as_many_as_the_codec_decodes():
    causal = TinyDecoder.like(torch.zeros(1, 4, 5, 8, 8), torch.zeros(1, 17, 3, 64, 64))
    assert (causal.frames_per_latent, causal.dropped, causal.geometry["zoom"]) == (4, 3, 2)
    assert causal(torch.zeros(2, 4, 5, 8, 8)).shape == (2, 17, 3, 16, 16)
    assert causal(torch.zeros(2, 4, 3, 8, 8)).shape == (2, 9, 3, 16, 16), "4 F - 3 of another length too"
    plain = TinyDecoder.like(torch.zeros(1, 4, 6, 8, 8), torch.zeros(1, 6, 3, 8, 8))
    assert (plain.frames_per_latent, plain.dropped) == (1, 0)
    assert TinyDecoder(**causal.geometry).geometry == causal.geometry


def test_only_the_first_frames_are_dropped():
    decoder = TinyDecoder(2, stride=1, zoom=1, frames_per_latent=4, dropped=3)
    whole = TinyDecoder(2, stride=1, zoom=1, frames_per_latent=4, dropped=0)
    whole.load_state_dict(decoder.state_dict())
    latents = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decoder(latents), whole(latents)[:, 3:])


@pytest.mark.parametrize("shape", [(1, 3, 3, 8, 8), (1, 17, 1, 8, 8), (1, 17, 8, 8)])
def test_a_codec_that_decodes_to_something_else_is_refused(shape):
    with pytest.raises(DataError, match="the codec decodes latents"):
        TinyDecoder.like(torch.zeros(1, 4, 5, 8, 8), torch.zeros(shape))


def test_latents_are_read_by_channel_at_unit_scale():
    latents = torch.randn(8, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    moved = latents * torch.tensor([3.0, 0.1])[:, None, None, None] + torch.tensor([5.0, -2.0])[:, None, None, None]
    decoder = TinyDecoder(2, stride=1, zoom=1, frames_per_latent=1, dropped=0)
    decoder.fit_scales(latents)
    first = decoder(latents)
    decoder.fit_scales(moved)
    torch.testing.assert_close(decoder(moved), first, atol=1e-4, rtol=1e-4)


def test_convolutions_of_images_draw_what_those_of_clips_would():
    torch.manual_seed(0)
    decoder = TinyDecoder(4, stride=1, zoom=2, frames_per_latent=4, dropped=3).double()
    decoder.latent_mean.normal_()
    decoder.latent_std.uniform_(0.5, 2)
    latents = torch.randn(3, 4, 5, 8, 6, dtype=torch.float64, requires_grad=True)
    x = torch.stack([decoder.stem(frame) for frame in decoder.normalise(latents).unbind(2)], dim=2)
    for block in decoder.blocks:
        norm, *convolutions = block
        hidden = norm(x.movedim(1, -1)).movedim(-1, 1)
        for layer in convolutions:
            hidden = layer(hidden)
        x = x + hidden
    images = decoder.output(functional.gelu(x).movedim(1, -1)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    expected = functional.pixel_shuffle(images, 2).reshape(3, 20, 3, 16, 12)[:, 3:]
    drawn = decoder(latents)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(drawn)
    values = [(frames * weights).sum() for frames in (drawn, expected)]
    slopes = [torch.autograd.grad(value, latents, retain_graph=True)[0] for value in values]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-11)
    mean, std = torch.randn(4, 1, 1, 1).double(), torch.rand(4, 1, 1, 1).double() + 0.5
    torch.testing.assert_close(decoder((latents - mean) / std, (mean, std)), drawn, rtol=0, atol=1e-11)
    untouched = latents.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(decoder(latents), expected, rtol=0, atol=1e-12)
    assert torch.equal(latents, untouched), "what is overwritten is the decoder's own"
