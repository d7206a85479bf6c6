"""Backbone features: the first k blocks of a frozen diffusers video transformer, pooled per frame.

What a generator computes on the way to its prediction is a description of the video that needs no labels; a reward head
on early blocks is PRFL's reward model (2511.21541). The transformer is the caller's: it is neither copied nor saved. A
proxy keeps its fingerprint and, where adapters are trained (LoRA, Hu et al. 2021), their weights. All members of an
ensemble read the same features, so the blocks run once per batch.

Another transformer class is a subclass of :class:`VideoBackbone` with ``check``, ``layers`` and ``forward``.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.proxies.text import PromptEncoder

Time = Callable[[Tensor], Tensor]
"""t ``[B]`` in [0, 1] -> the timesteps ``[B]`` the transformer was trained with."""

_ADAPTER = "latent_rewards_proxy"
_PROBED_TIMES = (0.0, 0.25, 0.5, 1.0)


def thousand_steps(t: Tensor) -> Tensor:
    """Return 1000 t: what flow models take whose sigma is t (Wan, HunyuanVideo, LTX)."""
    return 1000 * t


class VideoBackbone(nn.Module, ABC):
    """A frozen video transformer as a source of features.

    Args:
        transformer: of diffusers; it is put into evaluation mode and frozen, so pass one that nobody trains.
        num_blocks: k, from 1 to the number of its blocks.
        embed: texts -> token embeddings ``[N, L, D]`` with zeros for padding, as the transformer was trained with.
        time: t -> the transformer's timesteps.

    Raises:
        ConfigError: ``num_blocks`` is out of range, the transformer lacks a part, or it carries adapters.
    """

    family: str
    parts: tuple[str, ...]
    """Attributes of the transformer that ``forward`` uses before its ``blocks``."""

    def __init__(
        self,
        transformer: nn.Module,
        *,
        num_blocks: int,
        embed: PromptEncoder | None = None,
        time: Time = thousand_steps,
    ) -> None:
        super().__init__()
        missing = [name for name in (*self.parts, "blocks", "config") if not hasattr(transformer, name)]
        if missing:
            raise ConfigError(
                f"{type(transformer).__name__} has no {', '.join(missing)}; {type(self).__name__} reads another class: "
                "subclass VideoBackbone for this one"
            )
        available = len(cast(nn.ModuleList, transformer.blocks))
        if not 1 <= num_blocks <= available:
            raise ConfigError(f"num_blocks must lie in [1, {available}], the transformer's blocks; got {num_blocks}")
        foreign = [name for name in getattr(transformer, "peft_config", {}) if not name.startswith(_ADAPTER)]
        if foreign:
            raise ConfigError(f"the transformer carries the adapters {foreign}; fuse them or pass one without adapters")
        self.transformer: Any = transformer.eval().requires_grad_(False)
        self.num_blocks, self.embed, self.time = num_blocks, embed, time

    @abstractmethod
    def check(self, latent_shape: tuple[int, ...]) -> None:
        """Raise DataError if the transformer cannot read latents of ``(C, F, H, W)``."""

    @abstractmethod
    def layers(self) -> list[str]:
        """Return the names, within the transformer, of the linear layers of the k blocks that adapters change."""

    @abstractmethod
    def forward(self, latents: Tensor, tokens: Tensor | None, timestep: Tensor) -> Tensor:
        """Return the k-th block's output ``[B, F', S, D]``, F' frames of S positions.

        Args:
            latents: ``[B, C, F, H, W]`` in the model's space and dtype.
            tokens: embedded prompts ``[B, L, text_dim]``, or None.
            timestep: ``[B]``, the transformer's.
        """

    @property
    @abstractmethod
    def width(self) -> int:
        """Return D; the pooled features are 2 D wide."""

    @property
    @abstractmethod
    def text_dim(self) -> int:
        """Return the dimension of the token embeddings the transformer reads."""

    @property
    def device(self) -> torch.device:
        """Return where the transformer is; it stays there."""
        return next(self.transformer.parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        """Family and sha256 of configuration, k, timesteps and the weights that are used, rounded to bfloat16."""
        settings = {key: value for key, value in dict(self.transformer.config).items() if not key.startswith("_")}
        times = self.time(torch.tensor(_PROBED_TIMES)).tolist()
        described = [type(self.transformer).__name__, settings, self.num_blocks, times, self.options()]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
        used = (*(f"{part}." for part in self.parts), *(f"blocks.{i}." for i in range(self.num_blocks)))
        for name, tensor in sorted(self.transformer.state_dict().items()):
            plain = name.replace(".base_layer", "")
            if not plain.startswith(used) or ".lora_" in plain:
                continue
            digest.update(f"{plain}{list(tensor.shape)}".encode())
            rounded = tensor.detach().to("cpu", torch.bfloat16).reshape(-1)
            digest.update(rounded.view(torch.uint8).numpy().tobytes())
        return f"{self.family}-backbone-{digest.hexdigest()[:32]}"

    def options(self) -> dict[str, Any]:
        """Return settings of the subclass that change its features, for the fingerprint."""
        return {}

    def add_adapter(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Give the k blocks LoRA layers of ``rank`` through peft, unless they have them.

        They are places for weights only: the weights are passed to :meth:`features`.

        Returns:
            Parameter name -> shape.
        """
        name = self._adapter(rank)
        if name not in getattr(self.transformer, "peft_config", {}):
            from latent_rewards.training.torchvision_guard import mend_torchvision

            mend_torchvision()
            from peft import LoraConfig

            with torch.random.fork_rng(devices=[]):
                self.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=self.layers()), name)
            self.transformer.requires_grad_(False)
        return {key: tuple(parameter.shape) for key, parameter in self.named_parameters() if f".{name}." in key}

    def _adapter(self, rank: int) -> str:
        return f"{_ADAPTER}_rank{rank}_blocks{self.num_blocks}"

    def _select(self, rank: int) -> None:
        """Switch to the layers of ``rank``, 0 for none; proxies that share a transformer may differ in it."""
        if not getattr(self.transformer, "peft_config", {}):
            return
        if rank:
            self.transformer.set_adapter(self._adapter(rank))
            self.transformer.enable_adapters()
        else:
            self.transformer.disable_adapters()
        self.transformer.requires_grad_(False)

    def features(
        self, latents: Tensor, tokens: Tensor | None, t: Tensor, adapter: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the mean and maximum over positions, ``[B, F', 2 D]`` in the latents' dtype and on their device.

        Args:
            latents: ``[B, C, F, H, W]`` in the model's space.
            tokens: ``[B, L, text_dim]``, or None.
            t: ``[B]`` in [0, 1].
            adapter: weights of one rank, as :meth:`add_adapter` names them.
        """
        dtype: torch.dtype = self.transformer.dtype
        weights = {name: value.to(self.device, dtype) for name, value in (adapter or {}).items()}
        self._select(next((len(value) for name, value in weights.items() if ".lora_A." in name), 0))
        tokens = None if tokens is None else tokens.to(self.device, dtype)
        inputs = (latents.to(self.device, dtype), tokens, self.time(t.to(self.device, torch.float32)))
        hidden = torch.func.functional_call(self, weights, inputs, tie_weights=False) if weights else self(*inputs)
        return torch.cat([hidden.mean(dim=2), hidden.amax(dim=2)], dim=2).to(latents)


class WanBackbone(VideoBackbone):
    """The first blocks of a ``WanTransformer3DModel`` (Wan 2.1; one timestep per video).

    Args:
        transformer: diffusers' ``WanTransformer3DModel``.
        num_blocks: k.
        embed: texts -> T5 embeddings, e.g. ``lambda texts: teacher.encode(texts).embeddings``.
        time: t -> timesteps; 1000 t, where t is sigma.
        text_length: tokens every prompt is padded to with zeros, as the stock pipeline does; they count, for Wan has no
            mask. Without prompts all are zero.

    Raises:
        ConfigError: see :class:`VideoBackbone`.
    """

    family = "wan"
    parts = ("patch_embedding", "condition_embedder", "rope")

    def __init__(
        self,
        transformer: nn.Module,
        *,
        num_blocks: int = 8,
        embed: PromptEncoder | None = None,
        time: Time = thousand_steps,
        text_length: int = 512,
    ) -> None:
        super().__init__(transformer, num_blocks=num_blocks, embed=embed, time=time)
        if text_length < 1:
            raise ConfigError(f"text_length must be at least 1; got {text_length}")
        self.text_length = text_length

    @property
    def width(self) -> int:
        """Return D."""
        return self.transformer.patch_embedding.out_channels

    @property
    def text_dim(self) -> int:
        """Return the dimension of T5 embeddings."""
        return self.transformer.config.text_dim

    def options(self) -> dict[str, Any]:
        """Return the padded length of prompts."""
        return {"text_length": self.text_length}

    def check(self, latent_shape: tuple[int, ...]) -> None:
        """Raise DataError for another number of channels, or frames smaller than a patch or longer than its rope."""
        config = self.transformer.config
        patch, longest = config.patch_size, config.rope_max_seq_len
        grid = [size // step for size, step in zip(latent_shape[1:], patch, strict=True)]
        if latent_shape[0] != config.in_channels or min(grid) < 1 or max(grid) > longest:
            raise DataError(
                f"the backbone reads latents of {config.in_channels} channels in 1 to {longest} patches of "
                f"{tuple(patch)} a side; got (C, F, H, W) = {tuple(latent_shape)}"
            )

    def layers(self) -> list[str]:
        """Return the projections of both attentions."""
        names = ("to_q", "to_k", "to_v", "to_out.0")
        attentions = [f"blocks.{i}.{which}" for i in range(self.num_blocks) for which in ("attn1", "attn2")]
        return [f"{attention}.{name}" for attention in attentions for name in names]

    def forward(self, latents: Tensor, tokens: Tensor | None, timestep: Tensor) -> Tensor:
        """Return the k-th block's output ``[B, F', S, D]``; see :class:`VideoBackbone`.

        Raises:
            DataError: a prompt has more tokens than ``text_length``.
        """
        model = self.transformer
        if tokens is None:
            tokens = latents.new_zeros(len(latents), 1, self.text_dim)
        if tokens.shape[1] > self.text_length:
            raise DataError(
                f"a prompt has {tokens.shape[1]} tokens; text_length is {self.text_length}: cut or raise it"
            )
        tokens = functional.pad(tokens, (0, 0, 0, self.text_length - tokens.shape[1]))
        rotary = model.rope(latents)
        hidden = model.patch_embedding(latents)
        frames = hidden.shape[2]
        hidden = hidden.flatten(2).transpose(1, 2).contiguous()
        _, modulation, text, _ = model.condition_embedder(timestep, tokens, None)
        for block in model.blocks[: self.num_blocks]:
            hidden = block(hidden, text, modulation.unflatten(1, (6, -1)), rotary)
        return hidden.unflatten(1, (frames, -1))
