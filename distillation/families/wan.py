"""Wan 2.1 and 2.2: text-to-video rectified flow on a causal video VAE (diffusers' ``WanPipeline``).

The transformer takes latents [B, C, F, H, W] normalised per channel, the noise level as ``1000 sigma`` and zero-padded
T5 embeddings, and returns the flow ``v = eps - x0``. The VAE turns the first frame into one latent frame and every
further four into another. Wan 2.2 14B has two transformers, one for high and one for low noise; Wan 2.2 5B is told the
noise level of every token. Everything here equals what the stock pipeline computes.
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
from distillation.errors import ConditionError, DistillationConfigError, MissingPartError
from distillation.families import MODEL_INDEX, Teacher, TeacherError, import_diffusers, read_json
from distillation.families.codec import VideoCodec
from distillation.families.grids import TRAIN_TIMESTEPS, exportable
from distillation.families.parts import PipelineParts, dtype_read, fitting_shape, read_pipeline
from distillation.families.text import TextEncoding
from distillation.schedule import RectifiedFlow, Schedule, as_time, working_dtype
from distillation.student import LatentShape

FAMILY = "wan"
LONGEST_TEXT = 512

_STOCK_MULTIPLE = 16  # WanPipeline refuses other heights and widths, whatever the VAE


class WanDenoiser(Denoiser):
    """One or two ``WanTransformer3DModel`` and their noise schedule.

    The networks run in their own dtype (under the caller's autocast, if any); everything around them is float32.

    Args:
        transformer: diffusers' ``WanTransformer3DModel``.
        schedule: normally :class:`~distillation.schedule.RectifiedFlow`.
        transformer_2: the expert for noise levels below ``boundary_ratio`` (Wan 2.2 14B); chosen for each sample.
        boundary_ratio: noise level in (0, 1]; goes with ``transformer_2``.
        per_token: tell the transformer the noise level of every token (Wan 2.2 5B); here all are alike.

    Raises:
        DistillationConfigError: only one of ``transformer_2`` and ``boundary_ratio`` is given.
    """

    def __init__(
        self,
        transformer: nn.Module,
        schedule: Schedule,
        *,
        transformer_2: nn.Module | None = None,
        boundary_ratio: float | None = None,
        per_token: bool = False,
    ) -> None:
        super().__init__()
        if (transformer_2 is None) != (boundary_ratio is None):
            raise DistillationConfigError(
                "transformer_2 and boundary_ratio go together; got "
                f"{'no' if transformer_2 is None else 'a'} transformer_2 and boundary_ratio = {boundary_ratio}"
            )
        self.transformer = transformer
        self.transformer_2 = transformer_2
        self.schedule = schedule
        self.boundary_ratio = boundary_ratio
        self.per_token = per_token

    def forward(self, x_t: Tensor, t: Tensor | float, condition: Any = None) -> Prediction:  # noqa: ANN401
        """Predict the flow at x_t [B, C, F, H, W], t [] or [B], with a :class:`TextCondition` of length B.

        Raises:
            ConditionError: there is no condition, or it has another length.
        """
        if condition is None or len(condition) != len(x_t):
            described = "no condition" if condition is None else f"a condition of {len(condition)} samples"
            raise ConditionError(f"{len(x_t)} latents came with {described}; encode one prompt per sample")
        _, sigma = self.schedule(as_time(t))
        timestep = (TRAIN_TIMESTEPS * sigma.to(device=x_t.device, dtype=torch.float32)).expand(len(x_t))
        if self.transformer_2 is None or self.boundary_ratio is None:
            flow = self._flow(self.transformer, x_t, timestep, condition)
        else:
            high = timestep >= self.boundary_ratio * TRAIN_TIMESTEPS
            experts = ((self.transformer, high), (self.transformer_2, ~high))
            order, flows = [], []
            for expert, chosen in experts:
                rows = chosen.nonzero()[:, 0]
                if len(rows):
                    order.append(rows)
                    flows.append(self._flow(expert, x_t[rows], timestep[rows], condition.index_select(rows)))
            flow = torch.cat(flows)[torch.cat(order).argsort()]
        return Prediction(x_t, t, self.schedule, v=flow.to(working_dtype(x_t)))

    def _flow(self, network: Any, x_t: Tensor, timestep: Tensor, condition: Any) -> Tensor:  # noqa: ANN401
        """Call one transformer on x_t, with ``timestep`` [B] and what the condition holds."""
        dtype = dtype_read(network.patch_embedding)
        given = {name: value.to(device=x_t.device, dtype=dtype) for name, value in condition.extra.items()}
        states = x_t.to(dtype)
        if "image_latents" in given:
            states = torch.cat([states, given["image_latents"]], dim=1)
        if self.per_token:
            _, rows, columns = network.config.patch_size
            tokens = x_t.shape[2] * (x_t.shape[3] // rows) * (x_t.shape[4] // columns)
            timestep = timestep[:, None].expand(-1, tokens)
        (flow,) = network(
            hidden_states=states,
            timestep=timestep,
            encoder_hidden_states=condition.embeddings.to(device=x_t.device, dtype=dtype),
            encoder_hidden_states_image=given.get("image_embeds"),
            return_dict=False,
        )
        result: Tensor = flow
        return result


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
        return scale_of(self._config)

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

    def components(self, denoiser: Any) -> dict[str, Any]:  # noqa: ANN401 - a WanDenoiser
        """Return the arguments of the stock pipeline's constructor except the scheduler."""
        return {
            **super().components(denoiser),
            "transformer_2": denoiser.transformer_2,
            "boundary_ratio": denoiser.boundary_ratio,
            "expand_timesteps": denoiser.per_token,
        }


def parts_of(components: Mapping[str, Any], *, max_sequence_length: int | None = None) -> WanParts:
    """Return the parts of a pipeline with ``components`` "vae", "text_encoder" and "tokenizer"."""
    text = WanText(components["tokenizer"], components["text_encoder"], max_sequence_length=max_sequence_length)
    return WanParts(WanCodec(components["vae"]), text)


def scale_of(vae: Mapping[str, Any]) -> int:
    """Return how many pixels a latent spans in height and in width, by the configuration of the VAE."""
    return int(vae.get("scale_factor_spatial", 8))


def latent_shape_of(
    folder: Path, size: tuple[int | None, int | None, int | None], stated: Sequence[int] | None
) -> LatentShape:
    """Return (C, F, H, W) of videos of ``size`` (frames, height, width), or the ``stated`` shape if no size is given.

    Raises:
        TeacherError: see :func:`~distillation.families.parts.fitting_shape`.
    """
    transformer = read_json(folder / "transformer" / "config.json")
    return fitting_wan_shape(folder, size, stated, channels=transformer.get("in_channels", 16))


def fitting_wan_shape(
    folder: Path,
    size: tuple[int | None, int | None, int | None],
    stated: Sequence[int] | None,
    *,
    channels: int,
) -> LatentShape:
    """Return (C, F, H, W) as :func:`latent_shape_of` does, for a denoiser of latents with ``channels``.

    Raises:
        TeacherError: see :func:`~distillation.families.parts.fitting_shape`.
    """
    transformer, vae = read_json(folder / "transformer" / "config.json"), read_json(folder / "vae" / "config.json")
    patch, scale = transformer.get("patch_size", [1, 2, 2]), scale_of(vae)
    return fitting_shape(
        folder,
        size,
        stated,
        channels=channels,
        vae_channels=vae.get("z_dim", 16),
        scale=scale,
        multiples=(math.lcm(_STOCK_MULTIPLE, scale * patch[1]), math.lcm(_STOCK_MULTIPLE, scale * patch[2])),
    )


def load(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, latent_shape: LatentShape, sidecar: dict[str, Any]
) -> Teacher:
    """Return the pipeline in ``folder`` as a teacher; its schedule has the shift of the stored scheduler.

    Raises:
        TeacherError: one of two experts, or weights, are missing.
    """
    pipeline = read_wan(folder, WanParts.pipeline_class, device=device, dtype=dtype)
    parts = parts_of(pipeline.components, max_sequence_length=sidecar.get("max_sequence_length"))
    return teacher_of(pipeline, parts, folder, latent_shape)


def load_student(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, sidecar: dict[str, Any]
) -> tuple[Denoiser, PipelineParts]:
    """Return the denoiser of the student in ``folder``, and the other parts of its pipeline.

    Raises:
        TeacherError: see :func:`load`.
    """
    pipeline = read_wan(folder, WanParts.pipeline_class, device=device, dtype=dtype)
    parts = parts_of(pipeline.components, max_sequence_length=sidecar.get("max_sequence_length"))
    return denoiser_of(pipeline, sidecar["shift"]), parts


def read_wan(folder: Path, pipeline_class: str, *, device: torch.device | str, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """Return the diffusers pipeline in ``folder``.

    Raises:
        TeacherError: it has a second transformer without a boundary, or the reverse (before any weights are read); or
            weights are missing.
    """
    index = read_json(folder / MODEL_INDEX)
    second = (index.get("transformer_2") or [None])[0]
    if (index.get("boundary_ratio") is None) != (second is None):
        raise TeacherError(
            f"{folder} has boundary_ratio = {index.get('boundary_ratio')} and transformer_2 = "
            f"{index.get('transformer_2')}; two experts need both, a single one neither: download or write it again"
        )
    return read_pipeline(folder, pipeline_class, device=device, dtype=dtype)


def denoiser_of(pipeline: Any, shift: float) -> WanDenoiser:  # noqa: ANN401 - a diffusers pipeline
    """Return the transformers of a stock pipeline as a denoiser."""
    return WanDenoiser(
        pipeline.transformer,
        RectifiedFlow(shift=shift),
        transformer_2=pipeline.transformer_2,
        boundary_ratio=pipeline.config.boundary_ratio,
        per_token=bool(pipeline.config.expand_timesteps),
    )


def teacher_of(pipeline: Any, parts: WanParts, folder: Path, latent_shape: LatentShape) -> Teacher:  # noqa: ANN401
    """Return a stock pipeline as a frozen teacher; its schedule has the shift of the scheduler."""
    scheduler = pipeline.scheduler.config
    shift = scheduler.get("flow_shift", scheduler.get("shift")) or 1.0
    denoiser = denoiser_of(pipeline, float(shift)).requires_grad_(False).eval()
    return Teacher(denoiser, parts.codec, parts.encode, latent_shape, folder, FAMILY, parts)
