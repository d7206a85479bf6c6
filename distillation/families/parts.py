"""What every family's pipeline folder has in common: how it is read, how large its videos are, what a student needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from distillation.families import TeacherError, import_diffusers
from distillation.families.codec import FRAMES_PER_LATENT, VideoCodec
from distillation.families.text import TextEncoding
from distillation.student import LatentShape


@dataclass(frozen=True)
class PipelineParts:
    """Everything of a pipeline but its denoiser and scheduler: what saving a student needs besides the student.

    Attributes:
        codec: of the family's VAE.
        encode: of the family's text encoder.
        family: name of the family, e.g. "wan".
        pipeline_class: the stock diffusers pipeline.
        task: what model hubs call what it does.
        inputs: how the stock pipeline is given a prompt.
        seeding: how a call of the stock pipeline is made reproducible.
    """

    codec: VideoCodec
    encode: TextEncoding
    family: ClassVar[str]
    pipeline_class: ClassVar[str]
    task: ClassVar[str] = "text-to-video"
    inputs: ClassVar[str] = "prompt"
    seeding: ClassVar[str]

    def configurations(
        self,
        denoiser: Any,  # noqa: ANN401 - refused if not its own
        grids: Mapping[int, Sequence[float]],
        eta: float,
    ) -> dict[int, dict[str, Any]]:
        """Return, for each step count, the scheduler with which the stock pipeline samples like the student.

        Args:
            denoiser: the student's.
            grids: ``{step count: times}``.
            eta: share of fresh noise.

        Raises:
            MissingPartError: the denoiser is not of this family.
            TimestepsError: a grid or eta cannot be exported.
        """
        raise NotImplementedError

    def stated(self, denoiser: Any) -> dict[str, Any]:  # noqa: ANN401 - the family's denoiser
        """Return what ``latent_rewards.json`` must say for the denoiser to be made again, e.g. the shift."""
        raise NotImplementedError

    def components(self, denoiser: Any) -> dict[str, Any]:  # noqa: ANN401 - the family's denoiser
        """Return the arguments of the stock pipeline's constructor except the scheduler."""
        return {
            "tokenizer": self.encode.tokenizer,
            "text_encoder": self.encode.text_encoder,
            "vae": self.codec.vae,
            "transformer": denoiser.transformer,
        }


def read_pipeline(folder: Path, pipeline_class: str, *, device: torch.device | str, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """Return the diffusers pipeline in ``folder``, on ``device``; only local safetensors weights are read.

    Args:
        folder: with ``model_index.json``.
        pipeline_class: name of the diffusers class.
        device: where the networks go.
        dtype: of all of them except the VAE, which is float32.

    Raises:
        TeacherError: weights are missing, or are no safetensors.
    """
    diffusers = import_diffusers()
    precision = {"vae": torch.float32, "default": dtype}
    try:
        pipeline = getattr(diffusers, pipeline_class).from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, **{_dtype_argument(diffusers): precision}
        )
    except OSError as error:
        raise TeacherError(
            f"{folder} is incomplete ({error}); its weights must be safetensors: download or convert it again"
        ) from error
    return pipeline.to(device)


def fitting_shape(
    folder: Path,
    size: tuple[int | None, int | None, int | None],
    stated: Sequence[int] | None,
    *,
    channels: int,
    vae_channels: int,
    scale: int,
    multiples: tuple[int, int],
    frame_period: int = FRAMES_PER_LATENT,
) -> LatentShape:
    """Return (C, F, H, W) of videos of ``size`` (frames, height, width), or the ``stated`` shape if no size is given.

    Args:
        folder: of the pipeline, for the messages.
        size: in pixels; three numbers or three times None.
        stated: what ``latent_rewards.json`` says.
        channels: C of the latents, which the denoiser takes.
        vae_channels: C of the VAE.
        scale: pixels a latent spans.
        multiples: of which height and width must be.
        frame_period: frames are a multiple of it and one more.

    Raises:
        TeacherError: neither is given, the size does not fit the networks, or they do not fit each other.
    """
    if channels != vae_channels:
        raise TeacherError(
            f"the denoiser in {folder} takes latents of {channels} channels, and its VAE makes {vae_channels}: the two "
            "are not of one pipeline; download or write it again"
        )
    if size == (None, None, None):
        if stated is None:
            raise TeacherError(
                f"{folder} does not say how large its videos are; pass num_frames=, height= and width= to "
                "load_teacher, e.g. 81, 480, 832"
            )
        if len(stated) != 4 or stated[0] != channels:
            raise TeacherError(f"{folder} states the latent shape {list(stated)}; expected [{channels}, F, H, W]")
        return stated[0], stated[1], stated[2], stated[3]
    frames, height, width = size
    if frames is None or height is None or width is None:
        raise TeacherError(f"num_frames, height and width go together; got {frames}, {height} and {width}")
    fits = frames > 0 and frames % frame_period == 1 and not height % multiples[0] and not width % multiples[1]
    if not fits or min(height, width) < 1:
        raise TeacherError(
            f"a video of {frames} frames of {height} x {width} does not fit {folder}: it takes {frame_period} n + 1 "
            f"frames, heights that are multiples of {multiples[0]} and widths that are multiples of {multiples[1]}"
        )
    return channels, (frames - 1) // FRAMES_PER_LATENT + 1, height // scale, width // scale


def _dtype_argument(diffusers: Any) -> str:  # noqa: ANN401 - the module
    from packaging.version import Version

    return "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


def kept_in_float32(network: Any, name: str) -> bool:  # noqa: ANN401 - a model
    """Return whether diffusers or transformers holds a weight in float32, whatever dtype its network is loaded in."""
    return bool(set(name.split(".")) & set(getattr(network, "_keep_in_fp32_modules", None) or ()))


def dtype_read(embedding: Any) -> torch.dtype:  # noqa: ANN401 - a module
    """Return what a transformer computes in: the dtype of the layer that reads its latents.

    diffusers' own property asks every module, of which adapters make thousands, at every call.
    """
    dtype: torch.dtype = next(embedding.parameters()).dtype
    return dtype
