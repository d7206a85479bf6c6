"""The adversarial term of DMD2: a head on the fake score's features tells noised data from noised student samples.

The discriminator is ``D(x, t) = sigmoid(head(features(x_t, t)))`` (Yin et al. 2024, DMD2, arXiv 2405.14867, section
4.3): both data and samples are noised to the same t, the features come from the network that VSD trains anyway
(:class:`distillation.features.BlockFeatures`), and the losses are the non-saturating ones (Goodfellow et al. 2014),
written with softplus of the logits. At the optimum the logit is ``log p_t / q_t`` of data p and student q.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from distillation.errors import DistillationConfigError, NoiseError


class AdversarialHead(nn.Module):
    """Features of space-time tokens -> one logit per sample; positive means data.

    Each token is normalised and projected, the tokens are pooled by an attention with one learned query, and a linear
    layer that starts at 0 reads the result: the first logits are exactly 0, D = 1/2, and push the student nowhere.

    Args:
        feature_dim: D, channels of a token.
        hidden_dim: channels behind the projection.

    Raises:
        DistillationConfigError: a number is less than 1.
    """

    def __init__(self, feature_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        if feature_dim < 1 or hidden_dim < 1:
            raise DistillationConfigError(
                f"feature_dim and hidden_dim must be at least 1; got {feature_dim} and {hidden_dim}"
            )
        self.feature_dim = feature_dim
        self.project = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, hidden_dim), nn.SiLU())
        self.attend = nn.Linear(hidden_dim, 1)
        self.judge = nn.Linear(hidden_dim, 1)
        nn.init.zeros_(self.judge.weight)
        nn.init.zeros_(self.judge.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B] of features [B, ..., D]; all dimensions between are tokens.

        Raises:
            NoiseError: the last dimension is not D, or there are no tokens.
        """
        if features.ndim < 3 or features.shape[-1] != self.feature_dim:
            raise NoiseError(
                f"this head takes features [B, ..., {self.feature_dim}] with tokens between; got "
                f"{list(features.shape)}: build it with the channels of the block it reads"
            )
        tokens = self.project(features.flatten(1, -2).to(self.judge.weight.dtype))
        weights = self.attend(tokens).softmax(dim=1)
        logits: Tensor = self.judge((weights * tokens).sum(dim=1))
        return logits[:, 0]


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return ``mean softplus(-l) = mean -log D``, the non-saturating loss of the student; log 2 at logits 0.

    Args:
        fake_logits: [B], of the student's noised samples; the gradient flows through the features to the samples, so
            the head and the network behind the features have to be kept out of the student's optimiser.
    """
    return functional.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return ``mean softplus(-l_real) + mean softplus(l_fake)``; 2 log 2 at logits 0, and least at D = p / (p + q).

    Args:
        real_logits: [B], of noised data.
        fake_logits: [B], of noised and detached student samples.
    """
    return functional.softplus(-real_logits).mean() + functional.softplus(fake_logits).mean()


def approximate_r1(logits: Tensor, perturbed_logits: Tensor, std: float) -> Tensor:
    """Return ``mean (l(x) - l(x + std eps))^2 / std^2``, to first order the R1 penalty ``E |grad l|^2`` on data.

    No second derivative is needed, so it works with attention kernels that have none (Lin et al. 2025, adversarial
    post-training, arXiv 2501.08316, whose weight of 100 at std 0.01 is a weight of 0.01 here: they do not divide).

    Args:
        logits: [B], of data.
        perturbed_logits: [B], of the same data plus ``std`` times standard normal noise.
        std: of the perturbation, in latent units; small against the latents' own.

    Raises:
        DistillationConfigError: ``std`` is not positive.
    """
    if not std > 0:
        raise DistillationConfigError(f"std must be positive; got {std}")
    return torch.mean(((logits - perturbed_logits) / std) ** 2)
