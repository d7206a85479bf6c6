"""The parts of the embedded pipeline, built from configs: the same diffusers and transformers classes as Wan 2.1."""

from __future__ import annotations

import torch

from latent_rewards.training.torchvision_guard import mend_torchvision
from recipes.moving_digits.world import vocabulary

mend_torchvision()  # before what imports torchvision

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel  # noqa: E402
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel  # noqa: E402

LATENT_CHANNELS = 16
LATENT_SHAPE = (LATENT_CHANNELS, 5, 8, 8)
"""(C, F, H, W) of one clip: time is compressed 4 times (the first frame stands alone), each side 4 times."""

MAX_PROMPT_TOKENS = 16
TEXT_DIM = 64


def seeded_build(seed: int, build: type, **config: object) -> torch.nn.Module:
    """Construct a module with weights drawn from ``seed``, leaving the global generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(**config)


def build_vae(seed: int) -> AutoencoderKLWan:
    """Return Wan's causal video autoencoder at 1.9 M parameters, with 4x spatial compression."""
    return seeded_build(
        seed,
        AutoencoderKLWan,
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_transformer(seed: int) -> WanTransformer3DModel:
    """Return Wan's transformer at width 128 and depth 4: 80 tokens a clip."""
    return seeded_build(
        seed,
        WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def build_tokenizer() -> T5Tokenizer:
    """Return a word-level T5 tokenizer over the world's vocabulary; it needs no file and no network."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -1.0) for word in vocabulary())]
    return T5Tokenizer(vocab=words, extra_ids=0, model_max_length=MAX_PROMPT_TOKENS)


def build_text_encoder(seed: int, vocabulary_size: int) -> UMT5EncoderModel:
    """Return a UMT5 encoder of two layers and width 64."""
    config = UMT5Config(
        vocab_size=vocabulary_size, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return seeded_build(seed, UMT5EncoderModel, config=config)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the teacher's scheduler: rectified flow without shift, right for latents this small."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
