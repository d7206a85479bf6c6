"""Tiny pipelines of every family, built from configurations, and what the contract asks of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distillation.families import Teacher, import_diffusers, load_teacher
from distillation.schedule import VariancePreserving
from distillation.student import LatentShape

TEXT_LENGTH = 8
SHIFT = 3.0
WORDS = ["a", "digit", "moves", "left", "right", "two", "digits", "rest"]


def build_tokenizer() -> Any:
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [(f"▁{word}", -1.0) for word in WORDS]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_LENGTH)


def build_components() -> dict[str, Any]:
    """Wan 2.1, text to video: 5 frames of 16 x 16 are latents of [16, 2, 2, 2]."""
    diffusers = import_diffusers()
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(config),
        "vae": vae,
        "transformer": build_wan_transformer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    }


def build_wan_transformer(**settings: Any) -> Any:
    return import_diffusers().WanTransformer3DModel(
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 32,
            "freq_dim": 256,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            **settings,
        }
    )


def build_experts() -> dict[str, Any]:
    """Wan 2.2 14B: a second transformer below the noise level 0.875."""
    components = build_components()
    return {**components, "transformer_2": build_wan_transformer(), "boundary_ratio": 0.875}


def build_per_token() -> dict[str, Any]:
    """Wan 2.2 5B: a time per token, and a VAE of 16 pixels per latent."""
    components = build_components()
    vae = import_diffusers().AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=16,
        dim_mult=[1] * 4,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
    )
    return {**components, "vae": vae, "expand_timesteps": True}


def build_image_to_video() -> dict[str, Any]:
    """Wan 2.1 image to video: the image on the channels, and CLIP features of it."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    components = build_components()
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        **components,
        "transformer": build_wan_transformer(in_channels=36, image_dim=8, added_kv_proj_dim=24),
        "image_encoder": CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)),
        "image_processor": CLIPImageProcessor(size=32, crop_size=32),
    }


def build_image_experts() -> dict[str, Any]:
    """Wan 2.2 14B image to video: two transformers, and no CLIP features."""
    components = build_components()
    return {
        **components,
        "transformer": build_wan_transformer(in_channels=36),
        "transformer_2": build_wan_transformer(in_channels=36),
        "boundary_ratio": 0.875,
        "image_encoder": None,
        "image_processor": None,
    }


def picture(seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (20, 30, 3), generator=generator, dtype=torch.uint8).numpy())


def build_cogvideox(**settings: Any) -> dict[str, Any]:
    """CogVideoX 2B in small: 9 frames of 16 x 16 are latents of [4, 3, 2, 2]; ``settings`` of the transformer."""
    diffusers = import_diffusers()
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=TEXT_LENGTH,
        **settings,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": T5EncoderModel(config),
        "vae": vae,
        "transformer": transformer,
        "scheduler": build_cogvideox_scheduler(),
    }


def build_cogvideox_scheduler(name: str = "CogVideoXDDIMScheduler", **settings: Any) -> Any:
    """The scheduler that the published CogVideoX-2B comes with."""
    return getattr(import_diffusers(), name)(
        **{
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": 3.0,
            "timestep_spacing": "trailing",
            **settings,
        }
    )


@pytest.fixture(scope="session")
def components() -> dict[str, Any]:
    return build_components()


@pytest.fixture(scope="session")
def cogvideox_components() -> dict[str, Any]:
    return build_cogvideox()


@pytest.fixture(scope="session")
def image_components() -> dict[str, Any]:
    return build_image_to_video()


@pytest.fixture
def make_cogvideox_scheduler() -> Callable[..., Any]:
    return build_cogvideox_scheduler


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], Path]:
    """Save components as diffusers itself saves a pipeline."""

    def save(pipeline_class: str, components: dict[str, Any]) -> Path:
        folder = tmp_path_factory.mktemp(pipeline_class) / "pipeline"
        getattr(import_diffusers(), pipeline_class)(**components).save_pretrained(folder)
        return folder

    return save


def read_stock(folder: Path, pipeline_class: str) -> Any:
    """The unmodified pipeline, read by diffusers."""
    pipeline = getattr(import_diffusers(), pipeline_class).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def stock_pipeline() -> Callable[[Path, str], Any]:
    return read_stock


@pytest.fixture(scope="session")
def wan_folder(components: dict[str, Any], pipeline_folder: Callable[..., Path]) -> Path:
    return pipeline_folder("WanPipeline", components)


@pytest.fixture(scope="session")
def teacher(wan_folder: Path) -> Teacher:
    return load_teacher(wan_folder, num_frames=5, height=16, width=16)


@pytest.fixture(scope="session")
def stock(wan_folder: Path) -> Any:
    return read_stock(wan_folder, "WanPipeline")


@dataclass(frozen=True)
class Case:
    """One family on a tiny pipeline of 16 x 32 pixels: what the contract needs to know to ask stock diffusers the same.

    Attributes:
        pipeline_class: of diffusers.
        build: makes the components.
        frames: of a video.
        shape: of its latents, (C, F, H, W).
        frames_first: whether the stock pipeline has its latents as [B, F, C, H, W].
        raw: latents and the VAE's configuration -> the VAE's own latents, as the stock pipeline computes them.
        height: in pixels.
        width: in pixels.
        text_length: tokens of a prompt.
        image: what every prompt starts from, or None.
    """

    pipeline_class: str
    build: Callable[[], dict[str, Any]]
    frames: int
    shape: LatentShape
    frames_first: bool
    raw: Callable[[torch.Tensor, Any], torch.Tensor]
    height: int = 16
    width: int = 32
    text_length: int = TEXT_LENGTH
    image: Image.Image | None = None

    def prompts(self, *texts: str) -> list[Any]:
        """Return what ``teacher.encode`` is given."""
        return list(texts) if self.image is None else [{"prompt": text, "image": self.image} for text in texts]

    def stock_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents in the other layout; the map is its own inverse."""
        return latents.transpose(1, 2).contiguous() if self.frames_first else latents

    def run(self, stock: Any, texts: list[str], latents: torch.Tensor | None = None, **settings: Any) -> torch.Tensor:
        """Sample with the stock pipeline, from ``latents`` or what it draws; final latents [B, C, F, H, W]."""
        given = None if latents is None else self.stock_latents(latents)
        size = {"num_frames": self.frames, "height": self.height, "width": self.width}
        image = {} if self.image is None else {"image": self.image}
        output = stock(
            prompt=texts,
            latents=given,
            max_sequence_length=self.text_length,
            output_type="latent",
            **image,
            **size,
            **settings,
        ).frames
        return self.stock_latents(output)

    def times(self, stock: Any, num_steps: int, schedule: Any) -> list[float]:
        """Return the times of the stock scheduler's own grid, and 0."""
        stock.scheduler.set_timesteps(num_steps)
        if isinstance(schedule, VariancePreserving):
            return [(index + 1) / 1000 for index in stock.scheduler.timesteps.tolist()] + [0.0]
        return [schedule.time_of(sigma) for sigma in stock.scheduler.sigmas.tolist()]


def wan_raw(latents: torch.Tensor, config: Any) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return latents * std + mean


def cogvideox_raw(latents: torch.Tensor, config: Any) -> torch.Tensor:
    return 1 / config.scaling_factor * latents


CASES = {
    "wan": Case("WanPipeline", build_components, 5, (16, 2, 2, 4), False, wan_raw),
    "cogvideox-2b": Case("CogVideoXPipeline", build_cogvideox, 9, (4, 3, 2, 4), True, cogvideox_raw),
    "cogvideox-5b": Case(
        "CogVideoXPipeline",
        partial(build_cogvideox, use_rotary_positional_embeddings=True),
        9,
        (4, 3, 2, 4),
        True,
        cogvideox_raw,
    ),
    "wan-2.2-14b": Case("WanPipeline", build_experts, 5, (16, 2, 2, 4), False, wan_raw),
    "wan-2.2-5b": Case("WanPipeline", build_per_token, 5, (16, 2, 2, 4), False, wan_raw, height=32, width=64),
    "wan-2.1-image": Case(
        "WanImageToVideoPipeline",
        build_image_to_video,
        5,
        (16, 2, 2, 4),
        False,
        wan_raw,
        text_length=512,
        image=picture(),
    ),
    "wan-2.2-14b-image": Case(
        "WanImageToVideoPipeline", build_image_experts, 5, (16, 2, 2, 4), False, wan_raw, image=picture()
    ),
}


@dataclass(frozen=True)
class Loaded:
    """A case, its pipeline folder, and what our loader and diffusers' make of it."""

    case: Case
    folder: Path
    teacher: Teacher
    stock: Any


@pytest.fixture(scope="session", params=CASES)
def family(request: pytest.FixtureRequest, pipeline_folder: Callable[..., Path]) -> Loaded:
    case = CASES[request.param]
    folder = pipeline_folder(case.pipeline_class, case.build())
    teacher = load_teacher(folder, num_frames=case.frames, height=case.height, width=case.width)
    return Loaded(case, folder, teacher, read_stock(folder, case.pipeline_class))
