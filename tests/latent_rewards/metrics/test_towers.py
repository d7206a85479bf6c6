"""Towers work in bounded parts, and are made of what they can hold or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latent_rewards.contracts import ConfigError
from latent_rewards.metrics.frames import FrameTransform
from latent_rewards.metrics.towers import ImageTextTower, load_tower, tower_config
from latent_rewards.metrics.weights import WeightsFile

SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}
FILE = WeightsFile("small.safetensors", "nowhere", 1)


def test_frames_and_texts_go_through_in_bounded_parts(
    formula_frames: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tower = ImageTextTower(tower_config(SMALL), FrameTransform(16), frames_per_batch=4).eval()
    videos = formula_frames(6, 20, 30).reshape(2, 3, 3, 20, 30) / 255
    texts = ["a dog", "a cat"]
    seen: list[int] = []

    def counting(encode: Callable) -> Callable:
        def counted(batch: Tensor) -> Tensor:
            seen.append(len(batch))
            return encode(batch)

        return counted

    for name in ("encode_image", "encode_text"):
        monkeypatch.setattr(tower.model, name, counting(getattr(tower.model, name)))
    with torch.no_grad():
        first = tower.cosines(videos, texts)
        assert seen == [4, 2, 2]
        tower.frames_per_batch = 1
        torch.testing.assert_close(tower.cosines(videos, texts), first)
        same = tower.embed_texts(["a dog", "a cat", "a dog"])
    assert seen[3:] == [1] * 6 + [1, 1] + [1, 1]
    assert torch.equal(same[0], same[2]) and not torch.equal(same[0], same[1])
    torch.testing.assert_close(same.norm(dim=-1), torch.ones(3))
    assert first.shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "ViT-B-23"}, "unknown open_clip architecture 'ViT-B-23'. Did you mean 'ViT-B-32'"),
        ({"model": "hf-hub:somebody/something"}, "unknown open_clip architecture"),
        ({"model": "roberta-ViT-B-32"}, "hf_model_name"),
        ({"model": "ViTamin-B"}, "timm_model_name.*is not supported"),
        ({"model": {"embed_dim": 8}}, r"has vision_cfg and text_cfg; got \['embed_dim'\]"),
        ({"model": {**SMALL, "custom_text": True}}, "custom_text is not supported"),
        ({"model": {**SMALL, "vision_cfg": {"image_size": [16, 32]}}}, r"square.*got \[16, 32\]"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"frames_per_batch": 0}, "frames_per_batch must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / FILE.name)
    options = {"model": SMALL, "device": "cpu", "frames_per_batch": 4, **change}
    with pytest.raises(ConfigError, match=message):
        load_tower(FILE, tmp_path, **options)
