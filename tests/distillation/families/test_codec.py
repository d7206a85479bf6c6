import hashlib
import json

import pytest
import torch

from distillation.families.codec import CodecError
from distillation.families.wan import WanCodec


def test_stored_fingerprints_stay_valid(stock, teacher):
    """Proxies on disk name their latent space by this value: the formula may not change by a character."""
    config = {key: value for key, value in dict(stock.vae.config).items() if not key.startswith("_")}
    expected = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    weights = stock.vae.state_dict()
    for name in sorted(weights):
        expected.update(f"{name}{list(weights[name].shape)}".encode())
        expected.update(weights[name].to(torch.bfloat16).reshape(-1).view(torch.uint8).numpy().tobytes())
    assert teacher.codec.fingerprint == "wan-vae-" + expected.hexdigest()[:32]


def test_the_size_of_a_video_is_that_of_its_decoding(teacher):
    latents = torch.zeros(1, *teacher.latent_shape)
    frames, height, width = teacher.codec.video_size(teacher.latent_shape)
    assert (frames, height, width) == (5, 16, 16)
    assert teacher.codec.decode(latents).shape == (1, frames, 3, height, width)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunks_hold_samples(teacher, chunk_size):
    with pytest.raises(CodecError, match=f"chunk_size must be at least 1; got {chunk_size}"):
        WanCodec(teacher.codec.vae, chunk_size=chunk_size)
