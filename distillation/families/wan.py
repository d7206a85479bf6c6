"""Wan: text-to-video rectified flow on a causal video VAE (diffusers' ``WanPipeline``).

The transformer takes latents [B, C, F, H, W] normalised per channel, the noise level as ``1000 sigma`` and zero-padded
T5 embeddings, and returns the flow ``v = eps - x0``. The VAE turns the first frame into one latent frame and every
further four into another. Everything here equals what the stock pipeline computes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillation.condition import TextCondition
from distillation.denoiser import Denoiser, Prediction
from distillation.errors import ConditionError, DistillationError
from distillation.families import MODEL_INDEX, Teacher, TeacherError, import_diffusers, read_json
from distillation.families.grids import TRAIN_TIMESTEPS
from distillation.schedule import RectifiedFlow, Schedule, as_time, working_dtype
from distillation.student import LatentShape

FAMILY = "wan"
LONGEST_TEXT = 512
FRAMES_PER_LATENT = 4

_TEXT_BATCH = 16
_STOCK_MULTIPLE = 16  # WanPipeline refuses other heights and widths, whatever the VAE


class CodecError(DistillationError, ValueError):
    """Videos or latents of a shape the VAE does not take."""


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


class WanCodec:
    """An ``AutoencoderKLWan`` between normalised latents and videos in [0, 1]; a frozen, deterministic codec.

    Decoding is differentiable in the latents; call it under ``torch.no_grad()`` where no gradient is wanted, or the
    graph of every chunk is kept.

    Args:
        vae: diffusers' ``AutoencoderKLWan``; it is put into evaluation mode, frozen, and on a CPU its convolution
            weights are laid out channels last (in float32 measured 1.5 to 3 times as fast).
        chunk_size: samples encoded or decoded at once.

    Raises:
        CodecError: ``chunk_size`` is less than 1.
    """

    def __init__(self, vae: nn.Module, *, chunk_size: int = 8) -> None:
        if chunk_size < 1:
            raise CodecError(f"chunk_size must be at least 1; got {chunk_size}")
        self.vae: Any = vae.eval().requires_grad_(False)
        self.chunk_size = chunk_size
        self._config: Any = self.vae.config
        for weight in self.vae.parameters():
            # module.to(memory_format=...) refuses modules that also hold weights of another rank.
            if weight.ndim == 5 and weight.device.type == "cpu":
                weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)

    def to(self, device: torch.device | str) -> WanCodec:
        """Move the VAE to ``device`` and return the codec."""
        self.vae.to(device)
        return self

    @cached_property
    def fingerprint(self) -> str:
        """Family and sha256 of the configuration, the scaling and the weights rounded to bfloat16.

        The rounding makes the fingerprint of a VAE that was stored in bfloat16 equal to that of the original.
        """
        settings = {key: value for key, value in dict(self._config).items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            rounded = tensor.detach().to("cpu", torch.bfloat16).reshape(-1)
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(rounded.view(torch.uint8).numpy().tobytes())
        return f"{FAMILY}-vae-{digest.hexdigest()[:32]}"

    def decode(self, latents: Tensor) -> Tensor:
        """Return videos float32 [B, T, 3, H', W'] in [0, 1] of latents [B, C, F, H, W], with T = 4 F - 3.

        Raises:
            CodecError: the latents are not [B, C, F, H, W] with the VAE's number of channels.
        """
        channels = self._config.z_dim
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise CodecError(f"latents must be [B, {channels}, F, H, W] for this VAE; got {list(latents.shape)}")
        return torch.cat([self._decode_chunk(chunk) for chunk in latents.split(self.chunk_size)])

    def encode(self, videos: Tensor) -> Tensor:
        """Return latents float32 [B, C, F, H, W], the posterior's mode, of videos [B, T, 3, H', W'] in [0, 1].

        Raises:
            CodecError: the videos are not [B, T, 3, H', W'], T is not 1 more than a multiple of 4 (the VAE would drop
                frames without a word), or a side is not a multiple of the VAE's scale.
        """
        scale = int(self._config.scale_factor_spatial)
        if videos.ndim != 5 or videos.shape[2] != 3:
            raise CodecError(f"videos must be [B, T, 3, H, W] in [0, 1]; got {list(videos.shape)}")
        frames, height, width = videos.shape[1], *videos.shape[3:]
        if frames % FRAMES_PER_LATENT != 1 or height % scale or width % scale:
            raise CodecError(
                f"this VAE takes 4 n + 1 frames and sides that are multiples of {scale}; got {frames} frames of "
                f"{height} x {width}: cut or pad the videos"
            )
        return torch.cat([self._encode_chunk(chunk) for chunk in videos.split(self.chunk_size)])

    def _scaling(self) -> tuple[Tensor, Tensor]:
        device = next(self.vae.parameters()).device
        mean, std = self._config.latents_mean, self._config.latents_std
        return torch.tensor(mean, device=device).view(1, -1, 1, 1, 1), torch.tensor(std, device=device).view(
            1, -1, 1, 1, 1
        )

    def _decode_chunk(self, latents: Tensor) -> Tensor:
        mean, std = self._scaling()
        unscaled = latents.to(mean.device, torch.float32) * std + mean
        video = self.vae.decode(unscaled.to(self.vae.dtype), return_dict=False)[0].float()
        return (video * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)

    def _encode_chunk(self, videos: Tensor) -> Tensor:
        mean, std = self._scaling()
        pixels = videos.to(mean.device, torch.float32).transpose(1, 2) * 2 - 1
        posterior = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0]
        return (posterior.mode().float() - mean) / std


class WanText:
    """Prompts -> :class:`TextCondition`, as the stock pipeline encodes them: cleaned, T5, zero-padded to one length.

    Args:
        tokenizer: the pipeline's tokenizer.
        text_encoder: ``UMT5EncoderModel``; it is put into evaluation mode and frozen.
        max_sequence_length: tokens per prompt, padding included; default: what the tokenizer states, at most 512. It is
            part of the model: the stock pipeline must be called with the same number (its default is 512).
        cache_size: prompts whose embeddings are kept (on the CPU, without padding).
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401 - any transformers tokenizer
        text_encoder: nn.Module,
        *,
        max_sequence_length: int | None = None,
        cache_size: int = 1024,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder: Any = text_encoder.eval().requires_grad_(False)
        self.max_sequence_length = max_sequence_length or min(LONGEST_TEXT, int(tokenizer.model_max_length))
        self.cache_size = cache_size
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[Any]) -> TextCondition:
        """Return embeddings [B, L, D] on the text encoder's device; an empty text is allowed (the unguided prompt).

        Raises:
            ConditionError: there is no prompt, or one is neither a text nor a mapping with a text under "prompt".
        """
        texts = [_text_of(prompt) for prompt in prompts] if not isinstance(prompts, str) else []
        if not texts:
            raise ConditionError(f"prompts must be a list of at least one text; got {prompts!r}")
        found = {text: self._cache[text] for text in texts if text in self._cache}
        missing = list(dict.fromkeys(text for text in texts if text not in found))
        for start in range(0, len(missing), _TEXT_BATCH):
            batch = missing[start : start + _TEXT_BATCH]
            found.update(zip(batch, self._encode(batch), strict=True))
        for text in dict.fromkeys(texts):
            self._cache[text] = found[text]
            self._cache.move_to_end(text)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        width = found[texts[0]].shape[1]
        embeddings = found[texts[0]].new_zeros(len(texts), self.max_sequence_length, width)
        for row, text in enumerate(texts):
            embeddings[row, : len(found[text])] = found[text]
        return TextCondition(embeddings.to(self.text_encoder.device))

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
class WanParts:
    """Everything of a Wan pipeline but its denoiser and scheduler: what saving a student needs besides the student."""

    codec: WanCodec
    encode: WanText
    family: str = FAMILY


def latent_shape_of(
    folder: Path, size: tuple[int | None, int | None, int | None], stated: Sequence[int] | None
) -> LatentShape:
    """Return (C, F, H, W) of videos of ``size`` (frames, height, width), or the ``stated`` shape if no size is given.

    Raises:
        TeacherError: neither is given, or the size does not fit the networks.
    """
    transformer, vae = read_json(folder / "transformer" / "config.json"), read_json(folder / "vae" / "config.json")
    channels, patch = transformer.get("in_channels", 16), transformer.get("patch_size", [1, 2, 2])
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
    scale = vae.get("scale_factor_spatial", 8)
    steps = math.lcm(_STOCK_MULTIPLE, scale * patch[1]), math.lcm(_STOCK_MULTIPLE, scale * patch[2])
    if frames < 1 or frames % FRAMES_PER_LATENT != 1 or height % steps[0] or width % steps[1] or min(height, width) < 1:
        raise TeacherError(
            f"a video of {frames} frames of {height} x {width} does not fit {folder}: it takes 4 n + 1 frames, heights "
            f"that are multiples of {steps[0]} and widths that are multiples of {steps[1]}"
        )
    return channels, (frames - 1) // FRAMES_PER_LATENT + 1, height // scale, width // scale


def load(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, latent_shape: LatentShape, sidecar: dict[str, Any]
) -> Teacher:
    """Return the pipeline in ``folder`` as a teacher; its schedule has the shift of the stored scheduler.

    Raises:
        TeacherError: a Wan variant that needs more than one transformer or per-token timesteps, or missing weights.
    """
    transformer, parts, scheduler = load_parts(folder, device=device, dtype=dtype, sidecar=sidecar)
    shift = scheduler.get("flow_shift", scheduler.get("shift")) or 1.0
    denoiser = WanDenoiser(transformer.requires_grad_(False), RectifiedFlow(shift=float(shift)))
    return Teacher(denoiser.eval(), parts.codec, parts.encode, latent_shape, folder, FAMILY, parts)


def load_parts(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, sidecar: dict[str, Any]
) -> tuple[nn.Module, WanParts, dict[str, Any]]:
    """Return transformer, other parts and scheduler configuration of the pipeline in ``folder``.

    Raises:
        TeacherError: see :func:`load`.
    """
    index = read_json(folder / MODEL_INDEX)
    if index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise TeacherError(
            f"{folder} is a Wan 2.2 pipeline with boundary_ratio = {index.get('boundary_ratio')} and expand_timesteps "
            f"= {index.get('expand_timesteps')}; supported are pipelines of one transformer and one timestep per video "
            "(Wan 2.1 text-to-video)"
        )
    diffusers = import_diffusers()
    precision = {"transformer": dtype, "text_encoder": dtype, "vae": torch.float32, "default": dtype}
    try:
        pipeline = diffusers.WanPipeline.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, **{_dtype_argument(diffusers): precision}
        )
    except OSError as error:
        raise TeacherError(
            f"{folder} is incomplete ({error}); its weights must be safetensors: download or convert it again"
        ) from error
    pipeline.to(device)
    text = WanText(pipeline.tokenizer, pipeline.text_encoder, max_sequence_length=sidecar.get("max_sequence_length"))
    return pipeline.transformer, WanParts(WanCodec(pipeline.vae), text), dict(pipeline.scheduler.config)


def _dtype_argument(diffusers: Any) -> str:  # noqa: ANN401 - the module
    from packaging.version import Version

    return "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


def _text_of(prompt: Any) -> str:  # noqa: ANN401 - refused unless it is a prompt
    text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    if not isinstance(text, str):
        raise ConditionError(f"a prompt is a text or a mapping with a text under 'prompt'; got {prompt!r}")
    return text
