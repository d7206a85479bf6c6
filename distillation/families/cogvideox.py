"""CogVideoX: text-to-video diffusion with zero terminal SNR on a causal video VAE (diffusers' ``CogVideoXPipeline``).

The transformer takes latents [B, F, C, H, W], T5 embeddings of one fixed length (padding is attended to) and the index
of the noise level, and returns ``v = alpha eps - sigma x0``. The 5B model is given rotary positions, the 2B model makes
its own. The VAE turns the first frame into one latent frame and every further four into another, but decodes an even
number of latent frames to three frames too many, so videos here have 8 n + 1. Everything equals what the stock pipeline
computes. CogVideoX 1.5, whose patches span frames, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distillation.denoiser import Denoiser, Kind, Prediction
from distillation.errors import ConditionError, MissingPartError
from distillation.families import Teacher, TeacherError, import_diffusers, read_json
from distillation.families.codec import VideoCodec
from distillation.families.grids_vp import PREDICTION_TYPES, exportable_vp
from distillation.families.parts import PipelineParts, dtype_read, fitting_shape, read_pipeline
from distillation.families.text import TextEncoding
from distillation.schedule import VariancePreserving, as_time, working_dtype
from distillation.student import LatentShape

FAMILY = "cogvideox"
FRAME_PERIOD = 8

_STOCK_MULTIPLE = 8  # CogVideoXPipeline refuses other heights and widths
_KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")


class CogVideoXDenoiser(Denoiser):
    """A ``CogVideoXTransformer3DModel`` and its noise schedule.

    The network runs in its own dtype (under the caller's autocast, if any); everything around it is float32.

    Args:
        transformer: diffusers' ``CogVideoXTransformer3DModel``, text to video, of CogVideoX 1.0.
        schedule: its schedule; index i of its table is t = (i + 1) / N, and what the network is told.
        native: what the network puts out.
    """

    schedule: VariancePreserving

    def __init__(self, transformer: nn.Module, schedule: VariancePreserving, *, native: Kind = "v") -> None:
        super().__init__()
        self.transformer = transformer
        self.schedule = schedule
        self.native: Kind = native

    def forward(self, x_t: Tensor, t: Tensor | float, condition: Any = None) -> Prediction:  # noqa: ANN401
        """Predict at x_t [B, C, F, H, W], t [] or [B], with a :class:`TextCondition` of length B.

        Raises:
            ConditionError: there is no condition, it has another length, or its texts have another number of tokens
                than a transformer that makes its own positions was built for.
        """
        if condition is None or len(condition) != len(x_t):
            described = "no condition" if condition is None else f"a condition of {len(condition)} samples"
            raise ConditionError(f"{len(x_t)} latents came with {described}; encode one prompt per sample")
        config: Any = self.transformer.config
        tokens, expected = condition.embeddings.shape[1], config.max_text_seq_length
        if not config.use_rotary_positional_embeddings and tokens != expected:
            raise ConditionError(
                f"the texts have {tokens} tokens, and this transformer takes exactly {expected}; encode them with "
                "teacher.encode"
            )
        dtype = dtype_read(self.transformer.patch_embed)
        index = (self.schedule.num_train_timesteps * as_time(t).double() - 1).clamp(min=0)
        (output,) = self.transformer(
            hidden_states=x_t.to(dtype).transpose(1, 2),
            encoder_hidden_states=condition.embeddings.to(device=x_t.device, dtype=dtype),
            timestep=index.to(device=x_t.device, dtype=torch.float32).expand(len(x_t)),
            image_rotary_emb=self._positions(x_t) if config.use_rotary_positional_embeddings else None,
            return_dict=False,
        )
        value: dict[str, Any] = {self.native: output.to(working_dtype(x_t)).transpose(1, 2)}
        return Prediction(x_t, t, self.schedule, **value)

    def _positions(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of the rotary positions of latents like ``x_t``, as the stock pipeline does."""
        import_diffusers()
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config: Any = self.transformer.config
        frames, height, width = x_t.shape[2], *(side // config.patch_size for side in x_t.shape[3:])
        base = config.sample_width // config.patch_size, config.sample_height // config.patch_size
        cosines, sines = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=get_resize_crop_region_for_grid((height, width), *base),
            grid_size=(height, width),
            temporal_size=frames,
            device=x_t.device,
        )
        return cosines, sines


class CogVideoXCodec(VideoCodec):
    """An ``AutoencoderKLCogVideoX``, whose latents are scaled by one number; see :class:`VideoCodec`.

    Latents are what the stock pipeline decodes, the VAE's own times ``scaling_factor``. (``invert_scale_latents``
    concerns only how an image-to-video pipeline encodes its image.)
    """

    family = FAMILY
    frame_period = FRAME_PERIOD

    @property
    def channels(self) -> int:
        """C of the latents."""
        return int(self._config.latent_channels)

    @property
    def scale(self) -> int:
        """Pixels a latent spans in height and in width."""
        return scale_of(self._config)

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return 0 and ``1 / scaling_factor``, both []."""
        std = torch.tensor(1 / self._config.scaling_factor, device=next(self.vae.parameters()).device)
        return torch.zeros_like(std), std


class CogVideoXText(TextEncoding):
    """Prompts as the stock pipeline encodes them: T5 over the padded text, nothing cleaned and nothing masked."""

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> list[Tensor]:
        """Return one [max_sequence_length, D] per text."""
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.max_sequence_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        states = self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0]
        return [state.to("cpu", copy=True) for state in states]


@dataclass(frozen=True)
class CogVideoXParts(PipelineParts):
    """A CogVideoX pipeline without its denoiser; its students sample with the schedulers of ``grids_vp``."""

    family: ClassVar[str] = FAMILY
    pipeline_class: ClassVar[str] = "CogVideoXPipeline"
    seeding: ClassVar[str] = "Seed it with `generator=`, which draws the initial noise and what the scheduler injects."

    def configurations(
        self,
        denoiser: Any,  # noqa: ANN401 - refused if not its own
        grids: Mapping[int, Sequence[float]],
        eta: float,
    ) -> dict[int, dict[str, Any]]:
        """Return the scheduler configuration of each step count; see :meth:`PipelineParts.configurations`."""
        if not isinstance(denoiser, CogVideoXDenoiser) or not isinstance(denoiser.schedule, VariancePreserving):
            raise MissingPartError(
                f"a {type(denoiser).__name__} cannot be written as a stock {self.pipeline_class}; supported: "
                "CogVideoXDenoiser with VariancePreserving"
            )
        return exportable_vp(grids, eta, schedule=denoiser.schedule, native=denoiser.native)

    def stated(self, denoiser: Any) -> dict[str, Any]:  # noqa: ANN401 - a CogVideoXDenoiser
        """Return the schedule and what the network puts out."""
        return {"schedule": asdict(denoiser.schedule), "native": denoiser.native}


def parts_of(components: Mapping[str, Any], *, max_sequence_length: int | None = None) -> CogVideoXParts:
    """Return the parts of a pipeline with ``components`` "vae", "text_encoder", "tokenizer" and "transformer".

    The transformer says how many tokens a prompt has, unless ``max_sequence_length`` does.
    """
    length = max_sequence_length or int(components["transformer"].config.max_text_seq_length)
    text = CogVideoXText(components["tokenizer"], components["text_encoder"], max_sequence_length=length)
    return CogVideoXParts(CogVideoXCodec(components["vae"]), text)


def scale_of(vae: Mapping[str, Any]) -> int:
    """Return how many pixels a latent spans in height and in width, by the configuration of the VAE."""
    return int(2 ** (len(vae.get("block_out_channels", [128, 256, 256, 512])) - 1))


def latent_shape_of(
    folder: Path, size: tuple[int | None, int | None, int | None], stated: Sequence[int] | None
) -> LatentShape:
    """Return (C, F, H, W) of videos of ``size``, or the ``stated`` shape, or what the transformer was made for.

    Raises:
        TeacherError: the size does not fit the networks, or they are of CogVideoX 1.5 or image to video.
    """
    transformer, vae = read_json(folder / "transformer" / "config.json"), read_json(folder / "vae" / "config.json")
    for name in ("patch_size_t", "ofs_embed_dim"):
        if transformer.get(name) is not None:
            raise TeacherError(
                f"{folder} has {name} = {transformer[name]}, so it is CogVideoX 1.5 (or image to video); supported is "
                "text to video of CogVideoX 1.0 (2B and 5B)"
            )
    scale = scale_of(vae)
    multiple = math.lcm(_STOCK_MULTIPLE, scale * transformer.get("patch_size", 2))
    if size == (None, None, None) and stated is None:
        height, width = transformer.get("sample_height", 60), transformer.get("sample_width", 90)
        size = transformer.get("sample_frames", 49), height * scale, width * scale
    return fitting_shape(
        folder,
        size,
        stated,
        channels=transformer.get("in_channels", 16),
        vae_channels=vae.get("latent_channels", 16),
        scale=scale,
        multiples=(multiple, multiple),
        frame_period=FRAME_PERIOD,
    )


def load(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, latent_shape: LatentShape, sidecar: dict[str, Any]
) -> Teacher:
    """Return the pipeline in ``folder`` as a teacher; its schedule is that of the stored scheduler.

    Raises:
        TeacherError: the stored scheduler is not supported (before any weights are read), or missing weights.
    """
    schedule, native = schedule_of(folder)
    pipeline = read_pipeline(folder, CogVideoXParts.pipeline_class, device=device, dtype=dtype)
    parts = parts_of(pipeline.components, max_sequence_length=sidecar.get("max_sequence_length"))
    denoiser = CogVideoXDenoiser(pipeline.transformer.requires_grad_(False), schedule, native=native)
    return Teacher(denoiser.eval(), parts.codec, parts.encode, latent_shape, folder, FAMILY, parts)


def load_student(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, sidecar: dict[str, Any]
) -> tuple[Denoiser, PipelineParts]:
    """Return the denoiser of the student in ``folder``, and the other parts of its pipeline.

    Raises:
        TeacherError: missing weights.
    """
    pipeline = read_pipeline(folder, CogVideoXParts.pipeline_class, device=device, dtype=dtype)
    parts = parts_of(pipeline.components, max_sequence_length=sidecar.get("max_sequence_length"))
    schedule = VariancePreserving(**sidecar["schedule"])
    return CogVideoXDenoiser(pipeline.transformer, schedule, native=sidecar["native"]), parts


def schedule_of(folder: Path) -> tuple[VariancePreserving, Kind]:
    """Return the noise schedule of the stored scheduler, and what the network predicts.

    Raises:
        TeacherError: the class, the table or the prediction type is not supported, or the network predicts the noise
            of a schedule with zero terminal SNR: pure noise then says nothing about x0.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    name = read_json(file).get("_class_name")
    if name not in _SCHEDULERS:
        raise TeacherError(f"{file} names the scheduler {name!r}; supported: {', '.join(_SCHEDULERS)}")
    config = getattr(import_diffusers(), name).from_pretrained(str(folder), subfolder="scheduler").config
    natives: dict[str, Kind] = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    if config.trained_betas is not None or config.beta_schedule not in _KINDS:
        raise TeacherError(
            f"{file} has beta_schedule = {config.beta_schedule!r}"
            f"{' and trained_betas' if config.trained_betas is not None else ''}; supported: {', '.join(_KINDS)}, "
            "without trained_betas"
        )
    if config.prediction_type not in natives:
        raise TeacherError(f"{file} has prediction_type {config.prediction_type!r}; supported: {', '.join(natives)}")
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise TeacherError(
            f"{file} has rescale_betas_zero_snr with prediction_type 'epsilon': at t = 1 a noise prediction says "
            "nothing about x0; the network must predict v or x0, or the schedule keep some signal"
        )
    schedule = VariancePreserving(
        _KINDS[config.beta_schedule],  # type: ignore[arg-type]
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        num_train_timesteps=config.num_train_timesteps,
        zero_snr=config.rescale_betas_zero_snr,
        snr_shift=config.snr_shift_scale,
    )
    return schedule, natives[config.prediction_type]
