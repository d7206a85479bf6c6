"""Wan: text-to-video rectified flow on a causal video VAE (diffusers' ``WanPipeline``).

The transformer takes latents [B, C, F, H, W] normalised per channel, the noise level as ``1000 sigma`` and zero-padded
T5 embeddings, and returns the flow ``v = eps - x0``. The VAE turns the first frame into one latent frame and every
further four into another. Everything here equals what the stock pipeline computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distillation.denoiser import Denoiser, Prediction
from distillation.errors import ConditionError, MissingPartError
from distillation.families import MODEL_INDEX, Teacher, TeacherError, import_diffusers, read_json
from distillation.families.codec import VideoCodec
from distillation.families.grids import TRAIN_TIMESTEPS, exportable
from distillation.families.parts import PipelineParts, fitting_shape, read_pipeline
from distillation.families.text import TextEncoding
from distillation.schedule import RectifiedFlow, Schedule, as_time, working_dtype
from distillation.student import LatentShape

FAMILY = "wan"
LONGEST_TEXT = 512

_STOCK_MULTIPLE = 16  # WanPipeline refuses other heights and widths, whatever the VAE


class WanDenoiser(Denoiser):
    """A ``WanTransformer3DModel`` and its noise schedule.

    The network runs in its own dtype (under the caller's autocast, if any); everything around it is float32.

    Args:
        transformer: diffusers' ``WanTransformer3DModel``, text to video.
        schedule: normally :class:`~distillation.schedule.RectifiedFlow`.
    """

    def __init__(self, transformer: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.transformer = transformer
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor | float, condition: Any = None) -> Prediction:  # noqa: ANN401
        """Predict the flow at x_t [B, C, F, H, W], t [] or [B], with a :class:`TextCondition` of length B.

        Raises:
            ConditionError: there is no condition, or it has another length.
        """
        if condition is None or len(condition) != len(x_t):
            described = "no condition" if condition is None else f"a condition of {len(condition)} samples"
            raise ConditionError(f"{len(x_t)} latents came with {described}; encode one prompt per sample")
        _, sigma = self.schedule(as_time(t))
        timestep = TRAIN_TIMESTEPS * sigma.to(device=x_t.device, dtype=torch.float32)
        dtype: torch.dtype = self.transformer.dtype  # type: ignore[assignment]
        (flow,) = self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=timestep.expand(len(x_t)),
            encoder_hidden_states=condition.embeddings.to(device=x_t.device, dtype=dtype),
            return_dict=False,
        )
        return Prediction(x_t, t, self.schedule, v=flow.to(working_dtype(x_t)))


class WanCodec(VideoCodec):
    """An ``AutoencoderKLWan``, whose latents are normalised per channel; see :class:`VideoCodec`."""

    family = FAMILY

    @property
    def channels(self) -> int:
        """C of the latents."""
        return int(self._config.z_dim)

    @property
    def scale(self) -> int:
        """Pixels a latent spans in height and in width."""
        return int(self._config.scale_factor_spatial)

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return mean and std, both [1, C, 1, 1, 1]."""
        device = next(self.vae.parameters()).device
        mean, std = (torch.tensor(self._config[name], device=device) for name in ("latents_mean", "latents_std"))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


class WanText(TextEncoding):
    """Prompts as the stock pipeline encodes them: cleaned, T5, zero-padded to one length.

    Args:
        tokenizer: the pipeline's tokenizer.
        text_encoder: ``UMT5EncoderModel``.
        max_sequence_length: see :class:`TextEncoding`; default: what the tokenizer states, at most 512 (the default of
            the stock pipeline's argument of that name).
        cache_size: prompts whose embeddings are kept.
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401 - any transformers tokenizer
        text_encoder: nn.Module,
        *,
        max_sequence_length: int | None = None,
        cache_size: int = 1024,
    ) -> None:
        length = max_sequence_length or min(LONGEST_TEXT, int(tokenizer.model_max_length))
        super().__init__(tokenizer, text_encoder, max_sequence_length=length, cache_size=cache_size)

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> list[Tensor]:
        """Return one [number of tokens, D] per text."""
        import_diffusers()
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = self.tokenizer(
            [prompt_clean(text) for text in texts],
            padding="max_length",
            max_length=self.max_sequence_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = self.text_encoder.device
        mask = tokens.attention_mask.to(device)
        states = self.text_encoder(tokens.input_ids.to(device), mask).last_hidden_state
        lengths = mask.gt(0).sum(dim=1).tolist()
        return [state[:length].to("cpu", copy=True) for state, length in zip(states, lengths, strict=True)]


@dataclass(frozen=True)
class WanParts(PipelineParts):
    """A Wan pipeline without its denoiser; its students sample with the flow-matching schedulers of ``grids``."""

    family: ClassVar[str] = FAMILY
    pipeline_class: ClassVar[str] = "WanPipeline"
    seeding: ClassVar[str] = (
        "Seed it with `torch.manual_seed`: `generator=` reaches only the initial noise, not what the scheduler injects."
    )

    def configurations(
        self,
        denoiser: Any,  # noqa: ANN401 - refused if not its own
        grids: Mapping[int, Sequence[float]],
        eta: float,
    ) -> dict[int, dict[str, Any]]:
        """Return the scheduler configuration of each step count; see :meth:`PipelineParts.configurations`."""
        if not isinstance(denoiser, WanDenoiser) or not isinstance(denoiser.schedule, RectifiedFlow):
            raise MissingPartError(
                f"a {type(denoiser).__name__} cannot be written as a stock {self.pipeline_class}; supported: "
                "WanDenoiser with RectifiedFlow"
            )
        return exportable(grids, eta, shift=denoiser.schedule.shift)

    def stated(self, denoiser: Any) -> dict[str, Any]:  # noqa: ANN401 - a WanDenoiser
        """Return the shift of the schedule."""
        return {"shift": denoiser.schedule.shift}


def parts_of(components: Mapping[str, Any], *, max_sequence_length: int | None = None) -> WanParts:
    """Return the parts of a pipeline with ``components`` "vae", "text_encoder" and "tokenizer"."""
    text = WanText(components["tokenizer"], components["text_encoder"], max_sequence_length=max_sequence_length)
    return WanParts(WanCodec(components["vae"]), text)


def latent_shape_of(
    folder: Path, size: tuple[int | None, int | None, int | None], stated: Sequence[int] | None
) -> LatentShape:
    """Return (C, F, H, W) of videos of ``size`` (frames, height, width), or the ``stated`` shape if no size is given.

    Raises:
        TeacherError: see :func:`~distillation.families.parts.fitting_shape`.
    """
    transformer, vae = read_json(folder / "transformer" / "config.json"), read_json(folder / "vae" / "config.json")
    patch, scale = transformer.get("patch_size", [1, 2, 2]), vae.get("scale_factor_spatial", 8)
    return fitting_shape(
        folder,
        size,
        stated,
        channels=transformer.get("in_channels", 16),
        vae_channels=vae.get("z_dim", 16),
        scale=scale,
        multiples=(math.lcm(_STOCK_MULTIPLE, scale * patch[1]), math.lcm(_STOCK_MULTIPLE, scale * patch[2])),
    )


def load(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, latent_shape: LatentShape, sidecar: dict[str, Any]
) -> Teacher:
    """Return the pipeline in ``folder`` as a teacher; its schedule has the shift of the stored scheduler.

    Raises:
        TeacherError: a Wan variant that needs more than one transformer or per-token timesteps, or missing weights.
    """
    pipeline, parts = _read(folder, device, dtype, sidecar)
    scheduler = pipeline.scheduler.config
    shift = scheduler.get("flow_shift", scheduler.get("shift")) or 1.0
    denoiser = WanDenoiser(pipeline.transformer.requires_grad_(False), RectifiedFlow(shift=float(shift)))
    return Teacher(denoiser.eval(), parts.codec, parts.encode, latent_shape, folder, FAMILY, parts)


def load_student(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, sidecar: dict[str, Any]
) -> tuple[Denoiser, PipelineParts]:
    """Return the denoiser of the student in ``folder``, and the other parts of its pipeline.

    Raises:
        TeacherError: see :func:`load`.
    """
    pipeline, parts = _read(folder, device, dtype, sidecar)
    return WanDenoiser(pipeline.transformer, RectifiedFlow(sidecar["shift"])), parts


def _read(
    folder: Path, device: torch.device | str, dtype: torch.dtype, sidecar: dict[str, Any]
) -> tuple[Any, WanParts]:
    index = read_json(folder / MODEL_INDEX)
    if index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise TeacherError(
            f"{folder} is a Wan 2.2 pipeline with boundary_ratio = {index.get('boundary_ratio')} and expand_timesteps "
            f"= {index.get('expand_timesteps')}; supported are pipelines of one transformer and one timestep per video "
            "(Wan 2.1 text-to-video)"
        )
    pipeline = read_pipeline(folder, WanParts.pipeline_class, device=device, dtype=dtype)
    return pipeline, parts_of(pipeline.components, max_sequence_length=sidecar.get("max_sequence_length"))
