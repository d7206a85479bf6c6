"""The reward proxy: an ensemble that reads rewards off latents, with calibrated uncertainty and its own provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_rewards.contracts import Reward
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies import members
from latent_rewards.proxies.buckets import check_readable
from latent_rewards.proxies.calibration import Calibration
from latent_rewards.proxies.config import ProxyConfig
from latent_rewards.proxies.fingerprints import check_latent_space, check_metrics
from latent_rewards.proxies.held import Held
from latent_rewards.proxies.heldout import HeldOut
from latent_rewards.proxies.isotonic import MonotoneMap
from latent_rewards.proxies.judgement import Judgement
from latent_rewards.proxies.noise import NoiseLevels, Schedule, read_level
from latent_rewards.proxies.objectives import PREFERENCE_OBJECTIVES
from latent_rewards.proxies.ood import DistanceQuantile, OodScore
from latent_rewards.proxies.prediction import ProxyPrediction, predict
from latent_rewards.proxies.text import PromptEncoder, PromptFeatures, Prompts, real_tokens
from latent_rewards.proxies.trunks import trunk_kind
from latent_rewards.proxies.trunks.backbone import VideoBackbone
from latent_rewards.proxies.trunks.tiny_decoder import TinyDecoder


class RewardProxy(nn.Module):
    """Latents -> rewards. Made by :func:`latent_rewards.proxies.train_proxy` or :meth:`from_pretrained`.

    Its parameters are frozen except while it is trained, so a backward pass through it costs the gradient of the
    latents only.

    Args:
        config: architecture and training settings.
        latent_shape: ``(C, F, H, W)`` of the latents it reads, of the first bucket if there are several.
        reward_names: R names.
        prompt_features: how it reads prompts.
        latent_shapes: all shapes it was trained on; None: ``latent_shape`` alone.
        latent_space: fingerprint of the codec, or None if unknown.
        metric_fingerprints: ``{reward name: fingerprint}``, empty if unknown.
        report: see :func:`latent_rewards.proxies.report.evaluate` and ``extend_report``.
        encode: embeds texts, for a proxy whose prompts are read so; it is not saved.
        backbone: the video transformer of the trunks that read one; it is not saved.
        decoder: what the trunk "pixels" reads is drawn by a copy of it.
        schedule: of the noise, for a proxy of noisy latents; see :class:`latent_rewards.proxies.noise.NoiseLevels`.
        schedule_probe: what identifies the schedule a stored proxy was trained with.

    Attributes:
        selection: how the trunk was chosen, see :func:`latent_rewards.proxies.selection.choose_trunk`; else empty.

    Raises:
        ConfigError: the trunk is "auto", or needs a backbone or decoder and there is none, or the other way round.
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
        latent_shapes: Sequence[Sequence[int]] | None = None,
        latent_space: str | None = None,
        metric_fingerprints: Mapping[str, str] | None = None,
        report: dict[str, dict[str, Any]] | None = None,
        encode: PromptEncoder | None = None,
        backbone: VideoBackbone | None = None,
        decoder: TinyDecoder | None = None,
        schedule: Schedule | None = None,
        schedule_probe: list[list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.latent_shape = tuple(latent_shape)
        self.latent_shapes = tuple(tuple(shape) for shape in latent_shapes or (latent_shape,))
        self.reward_names = tuple(reward_names)
        self.prompt_features = prompt_features
        self.latent_space = latent_space
        self.metric_fingerprints = dict(metric_fingerprints or {})
        self.report = report or {}
        self.selection: dict[str, Any] = {}
        self.heldout: HeldOut | None = None
        self._encoder = Held(encode)
        channels, num_rewards = self.latent_shape[0], len(self.reward_names)
        self.register_buffer("latent_mean", torch.zeros(channels, 1, 1, 1))
        self.register_buffer("latent_std", torch.ones(channels, 1, 1, 1))
        self.register_buffer("prompt_mean", torch.zeros(prompt_features.dim))
        self.register_buffer("prompt_scale", torch.ones(()))
        self.register_buffer("reward_mean", torch.zeros(num_rewards))
        self.register_buffer("reward_std", torch.ones(num_rewards))
        self.noise: NoiseLevels | None = None
        if config.noise_levels is not None:
            self.noise = NoiseLevels(config.noise_levels, num_rewards, schedule, schedule_probe)
        self.shared = members.make_shared(config, backbone, decoder, self.latent_shape, prompt_features)
        self.members = nn.ModuleList(
            members.make_members(config, self.latent_shape, prompt_features, num_rewards, self.shared)
        )
        self.calibration = Calibration(num_rewards)
        self.judgement = Judgement(config.objective) if config.objective in PREFERENCE_OBJECTIVES else None
        self.monotone = MonotoneMap(num_rewards) if config.calibrate_mean == "isotonic" else None
        self.distance = DistanceQuantile(members.description_size(self.members[0], channels))
        self.ood_score = OodScore()
        if self.is_linear:
            self.double()
        self.requires_grad_(False).eval()

    @property
    def is_linear(self) -> bool:
        """Whether the proxy is a ridge regression, on latents or on features of a backbone."""
        return trunk_kind(self.config.trunk).closed_form

    def __repr__(self) -> str:
        return (
            f"RewardProxy({', '.join(self.reward_names)}; {self.config.trunk} x {len(self.members)}, latents "
            f"{', '.join(map(str, self.latent_shapes))}, prompts: {self.prompt_features.kind})"
        )

    def normalise(self, latents: Tensor) -> Tensor:
        """Return latents as the members read them: per channel of zero mean and unit variance over the training data.

        Raises:
            DataError: ``latents`` have none of the ``latent_shapes``, and ``any_size`` is off or they are too small.
        """
        self.check_shape(latents.shape)
        return (latents.to(self.latent_mean) - self.latent_mean).div_(self.latent_std)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise DataError, naming the shapes it reads, unless it reads latents ``[B, C, F, H, W]`` of this shape."""
        smallest = getattr(self.members[0], "smallest_side", 1)
        check_readable(tuple(shape), self.latent_shapes, self.config.any_size, smallest)

    def raw_prompts(self, prompts: Prompts | None, count: int) -> Tensor | None:
        """Return prompt features ``[count, D]`` or ``[count, L, D]`` before scaling, or None without prompts.

        Raises:
            DataError: see :class:`latent_rewards.proxies.text.PromptFeatures`.
        """
        return self.prompt_features(prompts, count, self._encoder.value)

    def read_prompts(self, prompts: Prompts | None, count: int) -> Tensor | None:
        """Return prompt features as the members read them, or None for a proxy without prompts; padding stays zero.

        Raises:
            DataError: see :class:`latent_rewards.proxies.text.PromptFeatures`.
        """
        features = self.raw_prompts(prompts, count)
        return None if features is None else self.scale_prompts(features)

    def scale_prompts(self, features: Tensor) -> Tensor:
        """Return what :meth:`raw_prompts` returned as the members read it; padding stays zero."""
        features = features.to(self.prompt_mean)
        scaled = (features - self.prompt_mean) * self.prompt_scale
        return scaled * real_tokens(features)[..., None] if features.ndim == 3 else scaled

    def member_inputs(self, latents: Tensor, prompt_features: Tensor | None, *level: Tensor) -> tuple[Any, ...]:
        """Return what the members take; see :func:`latent_rewards.proxies.members.member_inputs`."""
        return members.member_inputs(self, latents, prompt_features, *level)

    def ensemble(self, latents: Tensor, prompt_features: Tensor | None, *level: Tensor) -> tuple[Tensor, Tensor]:
        """Return the members' mean and variance ``[B, R]``, standardised, of normalised latents and read prompts."""
        return members.combine(self, self.member_inputs(latents, prompt_features, *level))

    def member_outputs(
        self, latents: Tensor, prompt_features: Tensor | None, *level: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return each member's means and what they predict of variance; see :func:`~.members.outputs_of`."""
        return members.outputs_of(self, self.member_inputs(latents, prompt_features, *level))

    def distance_features(self, latents: Tensor, prompt_features: Tensor | None, *level: Tensor) -> Tensor:
        """Return what :attr:`distance` looks at: latent statistics and the first member's trunk features."""
        inputs = self.member_inputs(latents, prompt_features, *level)
        return members.describe(self.members[0], latents, inputs)

    def correct(self, mean: Tensor) -> Tensor:
        """Return standardised means ``[B, R]`` as the isotonic map, if there is one, corrects them."""
        return mean if self.monotone is None else self.monotone(mean)

    def read_time(self, t: Tensor | float | None, count: int) -> tuple[Tensor, ...]:
        """Return t as the members take it; see :func:`latent_rewards.proxies.noise.read_level`."""
        return read_level(self.noise, t, count, like=self.latent_mean)

    def deviation(self, variance: Tensor, *level: Tensor) -> Tensor:
        """Return the calibrated, standardised deviation ``[B, R]`` for the members' variance and, if noisy, t."""
        std = self.calibration(variance)
        return std if self.noise is None else std * self.noise.factor(*level)

    def _moments(self, latents: Tensor, prompts: Prompts | None, t: Tensor | float | None) -> tuple[Tensor, Tensor]:
        normalised, level = self.normalise(latents), self.read_time(t, len(latents))
        mean, variance = self.ensemble(normalised, self.read_prompts(prompts, len(latents)), *level)
        dtype = torch.promote_types(torch.float32, latents.dtype)
        return (
            (self.correct(mean) * self.reward_std + self.reward_mean).to(dtype),
            (self.deviation(variance, *level) * self.reward_std).to(dtype),
        )

    def by_name(self, values: Tensor) -> dict[str, Tensor]:
        """Return the columns of ``[B, R]`` as ``{reward name: [B]}``."""
        return dict(zip(self.reward_names, values.unbind(dim=1), strict=True))

    def forward(
        self, latents: Tensor, prompts: Prompts | None = None, *, t: Tensor | float | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Predict rewards of ``[B, C, F, H, W]``, differentiably.

        Args:
            latents: ``[B, C, F, H, W]``.
            prompts: B of them, if the proxy reads prompts.
            t: noise level of the latents, one number or ``[B]``, for a proxy trained with ``noise_levels``; None is 0.

        Returns:
            ``[B]`` for a proxy of one reward, else ``{reward name: [B]}``, in the metrics' units.

        Raises:
            DataError: wrong latent shape; prompts that are missing or of another kind than at fit; t outside the
                levels trained on.
        """
        scores = self.scores(latents, prompts, t=t)
        return scores[self.reward_names[0]] if len(scores) == 1 else scores

    def scores(
        self,
        latents: Tensor,
        prompts: Prompts | None = None,
        *,
        pessimism: float = 0.0,
        t: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Return ``{reward name: mean - pessimism * std}``, each ``[B]``, differentiably in the latents.

        Raises:
            DataError: see :meth:`forward`.
        """
        mean, std = self._moments(latents, prompts, t)
        return self.by_name(mean - pessimism * std if pessimism else mean)

    @torch.no_grad()
    def predict(
        self, latents: Tensor | RewardDataset, prompts: Prompts | None = None, *, t: Tensor | float | None = None
    ) -> ProxyPrediction:
        """Return mean, calibrated standard deviation and out-of-distribution score, without gradient, in chunks.

        Args:
            latents: ``[B, C, F, H, W]``, or a dataset, which brings its prompts and is read in chunks.
            prompts: with a tensor, if the proxy reads prompts.
            t: see :meth:`forward`.

        Raises:
            DataError: see :meth:`forward`; also NaN or infinite latents.
            FingerprintMismatchError: the dataset belongs to another latent space; the message names both.
        """
        return predict(self, latents, prompts, t)

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
        check_latent_space(self.latent_space, fingerprint)

    def check_metrics(self, fingerprints: Mapping[str, str]) -> None:
        """Raise unless the metrics the proxy knows have these fingerprints; unknown ones are not judged.

        Raises:
            FingerprintMismatchError: one differs; the message names both.
        """
        check_metrics(self.metric_fingerprints, fingerprints)

    def acquire(
        self,
        latents: Tensor,
        k: int,
        prompts: Prompts | None = None,
        *,
        strategy: str = "mixed",
        seed: int = 0,
        reward: Reward | None = None,
    ) -> Tensor:
        """Choose which ``k`` latents to score with the true metrics; see :mod:`latent_rewards.proxies.acquire`."""
        from latent_rewards.proxies.acquire import acquire

        return acquire(self, latents, k, prompts, strategy=strategy, seed=seed, reward=reward)

    def update(
        self,
        dataset_or_latents: RewardDataset | Tensor,
        rewards: Tensor | Mapping[str, Tensor] | None = None,
        prompts: Prompts | None = None,
        *,
        replay: RewardDataset | None = None,
        replay_ages: Tensor | None = None,
        half_life: float | None = None,
        num_updates: int | None = None,
        num_random: int | None = None,
        seed: int = 0,
    ) -> dict[str, float]:
        """Continue training, in place, on fresh samples; see :func:`latent_rewards.proxies.refresh.update_proxy`."""
        from latent_rewards.proxies.refresh import update_proxy

        return update_proxy(
            self,
            dataset_or_latents,
            rewards,
            prompts,
            replay=replay,
            replay_ages=replay_ages,
            half_life=half_life,
            num_updates=num_updates,
            num_random=num_random,
            seed=seed,
        )

    def ood_threshold(self, false_alarm: float = 0.05) -> float:
        """Return the score above which at most a share ``false_alarm`` of samples like the held-out ones lies.

        Compare ``predict(...).ood`` with it; the bound is split-conformal, see :mod:`latent_rewards.proxies.ood`.

        Raises:
            ConfigError: ``false_alarm`` is not in [0.001, 1), or lower than the held-out samples can tell.
        """
        return self.ood_score.threshold(false_alarm)

    def save_pretrained(self, path: str | Path) -> None:
        """Commit the proxy to the folder ``path``; see :func:`latent_rewards.proxies.artefact.save_proxy`."""
        from latent_rewards.proxies.artefact import save_proxy

        save_proxy(self, path)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # noqa: ANN401 - those of push_proxy
        """Upload the proxy, return the commit's URL; see :func:`latent_rewards.proxies.artefact.push_proxy`."""
        from latent_rewards.proxies.artefact import push_proxy

        return push_proxy(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        encode: PromptEncoder | None = None,
        backbone: VideoBackbone | None = None,
        schedule: Schedule | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> RewardProxy:
        """Load a proxy, on the CPU, from a folder or from the hub.

        Args:
            path: what :meth:`save_pretrained` wrote, or the "organisation/name" of a hub repository.
            encode: the prompt encoder it was fitted with, if there was one; needed to score with texts. The
                backbone's ``embed``, if it has one, need not be repeated here.
            backbone: the one it was fitted with, if there was one.
            schedule: the one it was fitted with, if it was fitted with ``noise_levels`` and another schedule than
                rectified flow; needed to update it, not to score.
            revision: branch, tag or commit of the repository.
            token: of the hub; None takes the stored one.

        Raises:
            ConfigError: the proxy reads a backbone and none is given, or the other way round.
            FingerprintMismatchError: backbone or schedule are others than at training; the message names both.
            CheckpointError: neither folder nor repository; a file is missing, altered, or of another format.
        """
        from latent_rewards.proxies.artefact import load_proxy

        return load_proxy(path, encode=encode, backbone=backbone, schedule=schedule, revision=revision, token=token)
