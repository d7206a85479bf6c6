"""What the members of a proxy share when they read a backbone: its scaled features, and the weights of its adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latent_rewards.contracts import FingerprintMismatchError
from latent_rewards.proxies.held import Held
from latent_rewards.proxies.text import PromptFeatures
from latent_rewards.proxies.trunks.backbone import VideoBackbone


class SharedTrunk(nn.Module):
    """Latents -> features ``[B, F', K]`` of a frozen backbone, each scaled to mean 0 and deviation 1 over the data.

    Token embeddings of the transformer's own text dimension enter its cross attention; other prompts reach the heads
    only, and the transformer then sees an empty prompt. The backbone stays on its device, in its dtype.

    Args:
        backbone: is held, not owned.
        latent_shape: ``(C, F, H, W)``.
        prompts: how the proxy reads prompts.
        adapter_rank: rank of LoRA adapters that are trained with the heads; 0 for none.

    Raises:
        DataError: the backbone cannot read such latents.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self, backbone: VideoBackbone, latent_shape: tuple[int, ...], prompts: PromptFeatures, adapter_rank: int
    ) -> None:
        super().__init__()
        backbone.check(latent_shape)
        self._held = Held(backbone)
        self._reads_prompts = prompts.kind == "tokens" and prompts.dim == backbone.text_dim
        self.num_features = 2 * backbone.width
        self.register_buffer("feature_mean", torch.zeros(self.num_features))
        self.register_buffer("feature_std", torch.ones(self.num_features))
        self.adapters = nn.ParameterDict()
        self._names: dict[str, str] = {}
        for name, shape in (backbone.add_adapter(adapter_rank) if adapter_rank else {}).items():
            # Parameters' names may hold no dot. peft begins alike: A random, B zero, so nothing changes at first.
            key = name.replace(".", "/")
            self._names[key] = name
            self.adapters[key] = nn.Parameter(torch.zeros(shape))
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(self.adapters[key], a=5**0.5)

    @property
    def fingerprint(self) -> str:
        """The backbone's fingerprint."""
        return self._held.value.fingerprint

    def forward(self, latents: Tensor, tokens: Tensor | None, t: Tensor | None = None) -> Tensor:
        """Return ``[B, F', K]``.

        Args:
            latents: ``[B, C, F, H, W]`` in the model's space.
            tokens: prompt features before scaling, or None.
            t: ``[B]``; None for clean latents.
        """
        t = latents.new_zeros(len(latents)) if t is None else t
        weights = {self._names[key]: value for key, value in self.adapters.items()}
        tokens = tokens if self._reads_prompts else None
        features = self._held.value.features(latents, tokens, t, weights)
        return (features - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def fit_scales(self, features: Tensor) -> None:
        """Set mean and deviation from features ``[n, F', K]`` as this trunk returns them now."""
        flat = features.flatten(0, 1).double() * self.feature_std.double() + self.feature_mean.double()
        spread = flat.std(dim=0, unbiased=False)
        self.feature_mean.copy_(flat.mean(dim=0))
        self.feature_std.copy_(spread.clamp(min=1e-4 * float(spread.max()) + 1e-12))


class PassThrough(nn.Module):
    """The trunk of one member that reads shared features: it hands them on.

    Args:
        num_features: K.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor, condition: Tensor | None) -> Tensor:
        """Return ``features``."""
        return features


def check_backbone(stored: str | None, backbone: VideoBackbone | None) -> None:
    """Raise unless ``backbone`` is the one a proxy was saved with; a missing one is reported elsewhere.

    Raises:
        FingerprintMismatchError: the two differ; the message names both.
    """
    if stored is not None and backbone is not None and backbone.fingerprint != stored:
        raise FingerprintMismatchError(
            f"the proxy was trained on backbone {stored!r} and is loaded with {backbone.fingerprint!r}; pass the same "
            "transformer, number of blocks and times"
        )
