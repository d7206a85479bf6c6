"""Frames are prepared as the originals prepared them, to the bit where those work on 8-bit images."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latent_rewards.contracts import ConfigError
from latent_rewards.metrics.frames import MEAN, STD, FrameTransform

GOLDEN = Path(__file__).parent / "golden"
SIZES = ("40x59", "59x40", "16x23", "11x15")


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads((GOLDEN / "clip_family.json").read_text())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("original", "resize", "crop"),
    [
        ("clipscore", "pillow", "torchvision"),
        ("vbench", "plain", "torchvision"),
        ("hps", "antialias", "torchvision"),
        ("hps_plain", "plain", "torchvision"),
        ("pickscore", "pillow", "transformers"),
    ],
)
def test_frames_are_what_the_originals_made_of_them(
    facts: dict, formula_frames: Callable, original: str, resize: str, crop: str, size: str
) -> None:
    frames = formula_frames(1, *map(int, size.split("x")))
    assert hashlib.sha256(frames.numpy().tobytes()).hexdigest() == facts["frames"][size]
    wanted = load_file(GOLDEN / "clip_family.safetensors")[f"{original}/{size}"]
    torch.testing.assert_close(FrameTransform(16, resize, crop)(frames / 255), wanted, atol=2e-6, rtol=0)


def test_the_golden_cases_tell_every_choice_apart(formula_frames: Callable) -> None:
    frames = formula_frames(1, 40, 59) / 255
    kinds = [
        ("pillow", "torchvision"),
        ("antialias", "torchvision"),
        ("plain", "torchvision"),
        ("pillow", "transformers"),
    ]
    prepared = [FrameTransform(16, *kind)(frames) for kind in kinds]
    for index, one in enumerate(prepared):
        assert all((one - other).abs().max() > 0.01 for other in prepared[:index])


def test_frames_are_rounded_to_eight_bits_and_gradients_pass() -> None:
    frames = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    stored = (255 * frames).round().to(torch.uint8) / 255
    transform = FrameTransform(16)
    assert torch.equal(transform(frames), transform(stored))
    (gradient,) = torch.autograd.grad(transform(frames).square().sum(), frames)
    assert gradient.isfinite().all() and gradient[:, :, :, 4:26].ne(0).all()


def test_grey_frames_are_repeated() -> None:
    grey = torch.rand(2, 1, 20, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(FrameTransform(16)(grey), FrameTransform(16)(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(("height", "width"), [(480, 832), (97, 301), (112, 150), (224, 300)])
def test_pillow_is_met_to_the_bit(formula_frames: Callable, height: int, width: int) -> None:
    frames = formula_frames(1, height, width)
    wide = 224 * width // height
    # Wide images: Pillow 13 may begin with the other pass when the height shrinks more.
    image = Image.fromarray(frames[0].permute(1, 2, 0).numpy()).resize((wide, 224), Image.Resampling.BICUBIC)
    left = round((wide - 224) / 2)
    wanted = torch.from_numpy(np.asarray(image)[:, left : left + 224].copy()).permute(2, 0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    levels = 255 * (FrameTransform(224)(frames / 255)[0] * std + mean)
    torch.testing.assert_close(levels, wanted.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "bilinear"}, "unknown resize 'bilinear'"),
        ({"crop": "left"}, "unknown crop 'left'"),
        ({"size": 0}, "whole number of pixels; got 0"),
    ],
)
def test_other_ways_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FrameTransform(**{"size": 16, **options})
