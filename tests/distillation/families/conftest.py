"""A tiny Wan pipeline, built from configurations: 5 frames of 16 x 16 are latents of [16, 2, 2, 2]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distillation.families import Teacher, import_diffusers, load_teacher

TEXT_LENGTH = 8
SHIFT = 3.0


def build_components() -> dict[str, Any]:
    diffusers = import_diffusers()
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = ["a", "digit", "moves", "left", "right", "two", "digits", "rest"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [(f"▁{word}", -1.0) for word in words]
    config = UMT5Config(vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return {
        "tokenizer": T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_LENGTH),
        "text_encoder": UMT5EncoderModel(config),
        "vae": vae,
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    }


@pytest.fixture(scope="session")
def components() -> dict[str, Any]:
    return build_components()


@pytest.fixture(scope="session")
def wan_folder(components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline as diffusers itself saves it."""
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    import_diffusers().WanPipeline(**components).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(wan_folder: Path) -> Teacher:
    return load_teacher(wan_folder, num_frames=5, height=16, width=16)


@pytest.fixture(scope="session")
def stock(wan_folder: Path) -> Any:
    """The unmodified pipeline, read by diffusers."""
    pipeline = import_diffusers().WanPipeline.from_pretrained(wan_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
