"""The reward proxy: an ensemble that reads rewards off latents, with calibrated uncertainty and its own provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_rewards.contracts import DataError, FingerprintMismatchError, check_latents
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies.calibration import Calibration
from latent_rewards.proxies.config import ProxyConfig
from latent_rewards.proxies.features import latent_statistics, linear_features
from latent_rewards.proxies.heads import ConvMember
from latent_rewards.proxies.judgement import Judgement
from latent_rewards.proxies.linear import LinearMember
from latent_rewards.proxies.objectives import PREFERENCE_OBJECTIVES, num_outputs, split_outputs
from latent_rewards.proxies.ood import DistanceQuantile
from latent_rewards.proxies.text import PromptEncoder, PromptFeatures, Prompts, real_tokens
from latent_rewards.training.checkpoint import CheckpointError, commit_directory, verify_directory

FORMAT = "latent-rewards/proxy/2"
_DESCRIPTION = "proxy.json"
_WEIGHTS = "proxy.safetensors"
_CHUNK = 128


@dataclass(frozen=True)
class ProxyPrediction:
    """What a proxy says of B samples, each ``{reward name: [B]}``.

    Attributes:
        mean: predicted reward, in the metric's units.
        std: its calibrated standard deviation (see :mod:`latent_rewards.proxies.calibration`).
        ood: in [0, 1], how far the latents lie from the training data (see :mod:`latent_rewards.proxies.ood`); a
            property of the latents and prompts, so it is the same for every reward.
    """

    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    ood: dict[str, Tensor]


@dataclass(frozen=True)
class _Shared:
    """Holds a prompt encoder, so that one that is a module is neither stored nor copied with the proxy."""

    encode: PromptEncoder | None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class RewardProxy(nn.Module):
    """Latents -> rewards. Made by :func:`latent_rewards.proxies.train_proxy` or :meth:`from_pretrained`.

    Its parameters are frozen except while it is trained, so a backward pass through it costs the gradient of the
    latents only.

    Args:
        config: architecture and training settings.
        latent_shape: ``(C, F, H, W)`` of the latents it reads.
        reward_names: R names.
        prompt_features: how it reads prompts.
        latent_space: fingerprint of the codec, or None if unknown.
        metric_fingerprints: ``{reward name: fingerprint}``, empty if unknown.
        report: see :func:`latent_rewards.proxies.report.evaluate`.
        encode: embeds texts, for a proxy whose prompts are read so; it is not saved.
    """

    latent_mean: Tensor
    latent_std: Tensor
    prompt_mean: Tensor
    prompt_scale: Tensor
    reward_mean: Tensor
    reward_std: Tensor

    def __init__(
        self,
        config: ProxyConfig,
        latent_shape: tuple[int, ...],
        reward_names: tuple[str, ...],
        prompt_features: PromptFeatures,
        *,
        latent_space: str | None = None,
        metric_fingerprints: Mapping[str, str] | None = None,
        report: dict[str, dict[str, Any]] | None = None,
        encode: PromptEncoder | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.latent_shape = tuple(latent_shape)
        self.reward_names = tuple(reward_names)
        self.prompt_features = prompt_features
        self.latent_space = latent_space
        self.metric_fingerprints = dict(metric_fingerprints or {})
        self.report = report or {}
        self._encoder = _Shared(encode)
        channels, num_rewards = self.latent_shape[0], len(self.reward_names)
        self.register_buffer("latent_mean", torch.zeros(channels, 1, 1, 1))
        self.register_buffer("latent_std", torch.ones(channels, 1, 1, 1))
        self.register_buffer("prompt_mean", torch.zeros(prompt_features.dim))
        self.register_buffer("prompt_scale", torch.ones(()))
        self.register_buffer("reward_mean", torch.zeros(num_rewards))
        self.register_buffer("reward_std", torch.ones(num_rewards))
        self.members = nn.ModuleList(self._make_members())
        self.calibration = Calibration(num_rewards)
        self.judgement = Judgement(config.objective) if config.objective in PREFERENCE_OBJECTIVES else None
        trunk_features = 0 if self.is_linear else cast(ConvMember, self.members[0]).trunk.num_features
        self.distance = DistanceQuantile(3 * channels + trunk_features)
        if self.is_linear:
            self.double()
        self.requires_grad_(False).eval()

    def _make_members(self) -> list[nn.Module]:
        num_rewards, prompts = len(self.reward_names), self.prompt_features
        if self.is_linear:
            size = linear_features(torch.zeros(1, *self.latent_shape), torch.zeros(1, prompts.dim)).shape[1]
            return [LinearMember(size, num_rewards)]
        width, depth = self.config.width, self.config.depth
        outputs = num_outputs(self.config.objective, num_rewards)
        return [
            ConvMember(self.latent_shape, prompts, outputs, width=width, depth=depth)
            for _ in range(self.config.ensemble_size)
        ]

    @property
    def is_linear(self) -> bool:
        """Whether the trunk is the ridge regression."""
        return self.config.trunk == "linear"

    def __repr__(self) -> str:
        return (
            f"RewardProxy({', '.join(self.reward_names)}; {self.config.trunk} x {len(self.members)}, latents "
            f"{self.latent_shape}, prompts: {self.prompt_features.kind})"
        )

    def normalise(self, latents: Tensor) -> Tensor:
        """Return latents as the members read them: per channel of zero mean and unit variance over the training data.

        Raises:
            DataError: ``latents`` are not ``[B, *latent_shape]``.
        """
        if latents.ndim != 5 or tuple(latents.shape[1:]) != self.latent_shape:
            raise DataError(f"this proxy reads latents [B, {', '.join(map(str, self.latent_shape))}]; got "
                            f"{tuple(latents.shape)}")  # fmt: skip
        return (latents.to(self.latent_mean) - self.latent_mean) / self.latent_std

    def raw_prompts(self, prompts: Prompts | None, count: int) -> Tensor | None:
        """Return prompt features ``[count, D]`` or ``[count, L, D]`` before scaling, or None without prompts.

        Raises:
            DataError: see :class:`latent_rewards.proxies.text.PromptFeatures`.
        """
        return self.prompt_features(prompts, count, self._encoder.encode)

    def read_prompts(self, prompts: Prompts | None, count: int) -> Tensor | None:
        """Return prompt features as the members read them, or None for a proxy without prompts; padding stays zero.

        Raises:
            DataError: see :class:`latent_rewards.proxies.text.PromptFeatures`.
        """
        features = self.raw_prompts(prompts, count)
        if features is None:
            return None
        features = features.to(self.prompt_mean)
        scaled = (features - self.prompt_mean) * self.prompt_scale
        return scaled * real_tokens(features)[..., None] if features.ndim == 3 else scaled

    def ensemble(self, latents: Tensor, prompt_features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the members' mean and variance ``[B, R]``, standardised, of normalised latents and read prompts.

        With the "gaussian" objective the variance is that of the members' mixture (Lakshminarayanan et al. 2017): their
        disagreement plus the mean of the variances they predict.
        """
        outputs, predicted = self.member_outputs(latents, prompt_features)
        mean = outputs.mean(dim=0)
        variance = (outputs - mean).square().sum(dim=0) / max(1, len(self.members) - 1)
        if predicted is not None and self.config.objective == "gaussian":
            variance = variance + predicted
        return mean, variance

    def member_outputs(self, latents: Tensor, prompt_features: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return every member's means ``[M, B, R]``, and the mean ``[B, R]`` of the variances they predict, if any."""
        outputs = torch.stack([member(latents, prompt_features) for member in self.members])
        means, log_variances = split_outputs(outputs, len(self.reward_names))
        return means, None if log_variances is None else log_variances.exp().mean(dim=0)

    def distance_features(self, latents: Tensor, prompt_features: Tensor | None) -> Tensor:
        """Return what :attr:`distance` looks at: latent statistics and the first member's trunk features."""
        statistics = latent_statistics(latents)
        if self.is_linear:
            return statistics
        features, _ = cast(ConvMember, self.members[0]).features(latents, prompt_features)
        return torch.cat([statistics, features.mean(dim=1)], dim=1)

    def _moments(self, latents: Tensor, prompts: Prompts | None) -> tuple[Tensor, Tensor]:
        normalised = self.normalise(latents)
        mean, variance = self.ensemble(normalised, self.read_prompts(prompts, len(latents)))
        dtype = torch.promote_types(torch.float32, latents.dtype)
        return (
            (mean * self.reward_std + self.reward_mean).to(dtype),
            (self.calibration(variance) * self.reward_std).to(dtype),
        )

    def _by_name(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.reward_names, values.unbind(dim=1), strict=True))

    def forward(self, latents: Tensor, prompts: Prompts | None = None) -> Tensor | dict[str, Tensor]:
        """Predict rewards of ``[B, C, F, H, W]``, differentiably.

        Returns:
            ``[B]`` for a proxy of one reward, else ``{reward name: [B]}``, in the metrics' units.

        Raises:
            DataError: wrong latent shape; prompts that are missing or of another kind than at fit.
        """
        scores = self.scores(latents, prompts)
        return scores[self.reward_names[0]] if len(scores) == 1 else scores

    def scores(self, latents: Tensor, prompts: Prompts | None = None, *, pessimism: float = 0.0) -> dict[str, Tensor]:
        """Return ``{reward name: mean - pessimism * std}``, each ``[B]``, differentiably in the latents.

        Raises:
            DataError: see :meth:`forward`.
        """
        mean, std = self._moments(latents, prompts)
        return self._by_name(mean - pessimism * std if pessimism else mean)

    @torch.no_grad()
    def predict(self, latents: Tensor, prompts: Prompts | None = None) -> ProxyPrediction:
        """Return mean, calibrated standard deviation and out-of-distribution score, without gradient, in chunks.

        Raises:
            DataError: see :meth:`forward`; also NaN or infinite latents.
        """
        check_latents(latents)
        features = self.read_prompts(prompts, len(latents))
        means, variances, distances = [], [], []
        for start in range(0, len(latents), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            normalised = self.normalise(latents[chunk])
            read = None if features is None else features[chunk]
            mean, variance = self.ensemble(normalised, read)
            means.append(mean * self.reward_std + self.reward_mean)
            variances.append(self.calibration(variance) * self.reward_std)
            distances.append(self.distance(self.distance_features(normalised, read)))
        dtype = torch.promote_types(torch.float32, latents.dtype)
        ood = torch.cat(distances).to(dtype)
        return ProxyPrediction(
            self._by_name(torch.cat(means).to(dtype)),
            self._by_name(torch.cat(variances).to(dtype)),
            {name: ood for name in self.reward_names},
        )

    def compare(
        self, first: Tensor, second: Tensor, prompts: Prompts | None = None, *, noise: Tensor | None = None
    ) -> Tensor:
        """Return how likely each outcome is when two samples are compared, for a proxy of preferences; differentiable.

        Args:
            first: ``[B, C, F, H, W]``.
            second: of the same shape.
            prompts: B, shared by both samples.
            noise: ``[B, 2]`` noise levels of both, for "thurstone" fitted with ``Preferences(noise=...)``; None: 0.

        Returns:
            ``[B, 3]`` probabilities: the first is better, a tie, the second is better.

        Raises:
            DataError: the proxy was trained on scores, or see :meth:`forward`.
        """
        from latent_rewards.proxies.duels import compare

        return compare(self, first, second, prompts, noise)

    def check_latent_space(self, fingerprint: str | None) -> None:
        """Raise unless the proxy was trained in the latent space ``fingerprint``; an unknown one is not judged.

        Raises:
            FingerprintMismatchError: the two differ; the message names both.
        """
        if None not in (self.latent_space, fingerprint) and self.latent_space != fingerprint:
            raise FingerprintMismatchError(
                f"the proxy was trained in latent space {self.latent_space!r} and is used with {fingerprint!r}; train "
                "a proxy on latents of that codec"
            )

    def check_metrics(self, fingerprints: Mapping[str, str]) -> None:
        """Raise unless the metrics the proxy knows have these fingerprints; unknown ones are not judged.

        Raises:
            FingerprintMismatchError: one differs; the message names both.
        """
        for name, mine in self.metric_fingerprints.items():
            if fingerprints.get(name, mine) != mine:
                raise FingerprintMismatchError(
                    f"reward {name!r}: the proxy was trained on metric {mine!r} and is used with "
                    f"{fingerprints[name]!r}; collect and train with one of the two"
                )

    def update(
        self,
        dataset_or_latents: RewardDataset | Tensor,
        rewards: Tensor | Mapping[str, Tensor] | None = None,
        prompts: Prompts | None = None,
        *,
        replay: RewardDataset | None = None,
        num_updates: int | None = None,
        seed: int = 0,
    ) -> dict[str, float]:
        """Continue training, in place, on fresh samples; see :func:`latent_rewards.proxies.refresh.update_proxy`."""
        from latent_rewards.proxies.refresh import update_proxy

        return update_proxy(
            self, dataset_or_latents, rewards, prompts, replay=replay, num_updates=num_updates, seed=seed
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Commit the proxy to the folder ``path`` as safetensors and JSON; an existing folder is replaced."""
        description = {
            "format": FORMAT,
            "config": asdict(self.config),
            "latent_shape": self.latent_shape,
            "reward_names": self.reward_names,
            "prompt_features": asdict(self.prompt_features),
            "latent_space": self.latent_space,
            "metric_fingerprints": self.metric_fingerprints,
            "report": self.report,
        }
        with commit_directory(path) as folder:
            save_file({name: value.cpu().contiguous() for name, value in self.state_dict().items()}, folder / _WEIGHTS)
            (folder / _DESCRIPTION).write_text(json.dumps(description, indent=1))

    @classmethod
    def from_pretrained(cls, path: str | Path, *, encode: PromptEncoder | None = None) -> RewardProxy:
        """Load a proxy, on the CPU.

        Args:
            path: what :meth:`save_pretrained` wrote.
            encode: the prompt encoder it was fitted with, if there was one; needed to score with texts.

        Raises:
            CheckpointError: a file is missing, altered, or of another format.
        """
        folder = Path(path)
        verify_directory(folder)
        if not (folder / _DESCRIPTION).is_file():
            raise CheckpointError(f"{folder} holds no {_DESCRIPTION}: it is not a saved reward proxy")
        description = json.loads((folder / _DESCRIPTION).read_text())
        if description.get("format") != FORMAT:
            raise CheckpointError(f"{folder} has format {description.get('format')!r}; this version reads {FORMAT!r}")
        proxy = cls(
            ProxyConfig(**description["config"]),
            tuple(description["latent_shape"]),
            tuple(description["reward_names"]),
            PromptFeatures(**description["prompt_features"]),
            latent_space=description["latent_space"],
            metric_fingerprints=description["metric_fingerprints"],
            report=description["report"],
            encode=encode,
        )
        proxy.load_state_dict(load_file(folder / _WEIGHTS), assign=True)
        return proxy.requires_grad_(False)
