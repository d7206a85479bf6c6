"""What a proxy is measured against: scikit-learn's regressors on latents, and on a frozen teacher's early blocks.

- ``ridge``: RidgeCV on all values of the latents.
- ``boosting``: HistGradientBoostingRegressor on 48 principal components of the latents and statistics of their frames.
- ``mlp``: MLPRegressor on all values of the latents.
- ``probe``: RidgeCV on what the teacher's first two blocks make of the latents, pooled per frame.

All of them see the prompts as the proxy does, through the teacher's text encoder. Penalties and tree sizes are chosen
by cross-validation; for boosting and mlp the samples of one prompt share a fold.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import latent_rewards as lr
from distillation.families import Teacher
from latent_rewards.contracts import ConfigError, DataError, unknown_name

BASELINES = ("ridge", "boosting", "mlp", "probe")
PROBE_BLOCKS = 2
PROBE_TIME = 0.02
"""The time at which the teacher is shown clean latents, where its training noise begins."""

_COMPONENTS, _FOLDS, _CHUNK = 48, 3, 64


@dataclass(frozen=True)
class Features:
    """What a baseline reads.

    Attributes:
        values: float32 ``[N, D]``.
        reduced: how many of the first columns are replaced by their principal components.
    """

    values: np.ndarray
    reduced: int = 0

    def first(self, count: int) -> Features:
        """Return the first ``count`` samples."""
        return Features(self.values[:count], self.reduced)


def features_of(method: str, dataset: lr.RewardDataset, teacher: Teacher) -> Features:
    """Return what a baseline reads of a dataset; each sample's row depends on that sample only.

    Raises:
        ConfigError: another method.
    """
    if method not in BASELINES:
        raise ConfigError(unknown_name("baseline", method, BASELINES))
    latents = dataset.latents().float()
    prompts = mean_embeddings(teacher, dataset.prompts)
    if method == "probe":
        return Features(torch.cat([block_features(teacher, latents, dataset.prompts), prompts], dim=1).numpy())
    columns = [latents.flatten(1), prompts]
    if method == "boosting":
        columns.insert(1, frame_statistics(latents))
    return Features(torch.cat(columns, dim=1).numpy(), latents[0].numel() if method == "boosting" else 0)


def mean_embeddings(teacher: Teacher, prompts: Sequence[str]) -> Tensor:
    """Return the mean ``[N, D]`` of the embeddings of a prompt's tokens, without padding."""
    tokens = teacher.encode(prompts).embeddings.float().cpu()
    return tokens.sum(dim=1) / (tokens != 0).any(dim=2).sum(dim=1, keepdim=True).clamp(min=1)


def frame_statistics(latents: Tensor) -> Tensor:
    """Return mean, standard deviation and maximum of each channel and frame, and the RMS change to the next frame."""
    positions = latents.flatten(3)
    spread, change = positions.std(dim=3, unbiased=False), positions.diff(dim=2).square().mean(dim=3).sqrt()
    return torch.cat([part.flatten(1) for part in (positions.mean(dim=3), spread, positions.amax(dim=3), change)], 1)


@torch.no_grad()
def block_features(teacher: Teacher, latents: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the mean and the maximum per frame of the tokens after each of the teacher's first blocks.

    Args:
        teacher: a Wan pipeline; its transformer reads latents and prompts together.
        latents: ``[N, C, F, H, W]``, shown without noise at the time :data:`PROBE_TIME`.
        prompts: N texts.

    Returns:
        ``[N, PROBE_BLOCKS * 2 * F * width]``, on the CPU.
    """
    transformer: Any = teacher.denoiser.get_submodule("transformer")
    device = next(transformer.parameters()).device
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        tokens = output.float().cpu().unflatten(1, (latents.shape[2], -1))
        seen.append(torch.cat([tokens.mean(dim=2), tokens.amax(dim=2)], dim=2).flatten(1))

    hooks = [block.register_forward_hook(keep) for block in transformer.blocks[:PROBE_BLOCKS]]
    rows = []
    try:
        for start in range(0, len(latents), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            teacher.denoiser(latents[chunk].to(device), torch.tensor(PROBE_TIME), teacher.encode(prompts[chunk]))
            rows.append(torch.cat(seen, dim=1))
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(rows)


def fit_predict(
    method: str, training: Features, rewards: np.ndarray, prompts: Sequence[str], unseen: Features, seed: int
) -> np.ndarray:
    """Fit a baseline and return its predictions ``[M, R]``.

    Args:
        method: one of :data:`BASELINES`.
        training: of N samples.
        rewards: ``[N, R]``.
        prompts: N, of which equal ones share a fold.
        unseen: of M samples.
        seed: of what is random.

    Raises:
        DataError: a reward is NaN or infinite.
        ConfigError: another method.
    """
    if not np.isfinite(rewards).all():
        raise DataError("rewards hold NaN or infinity, which scikit-learn's regressors do not take; drop those samples")
    model = regressor(method, len(rewards), training.reduced, seed)
    groups = {"groups": np.unique(np.asarray(prompts), return_inverse=True)[1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # early stopping decides, and 200 passes are enough
        model.fit(training.values, rewards, **(groups if isinstance(model, GridSearchCV) else {}))
    predicted: np.ndarray = np.asarray(model.predict(unseen.values)).reshape(-1, rewards.shape[1])
    return predicted


def regressor(method: str, count: int, reduced: int, seed: int) -> Any:  # noqa: ANN401 - a scikit-learn regressor
    """Return a baseline before it is fitted.

    Args:
        method: one of :data:`BASELINES`.
        count: training samples.
        reduced: see :class:`Features`.
        seed: of what is random.

    Raises:
        ConfigError: another method.
    """
    if method in ("ridge", "probe"):
        return make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 6, 13), alpha_per_target=True))
    folds = GroupKFold(_FOLDS)
    if method == "boosting":
        # The training part of a fold must have as many samples as there are components.
        components = PCA(min(_COMPONENTS, count // 2, reduced), random_state=seed)
        columns = ColumnTransformer([("components", components, slice(0, reduced))], remainder="passthrough")
        boosted = MultiOutputRegressor(HistGradientBoostingRegressor(max_iter=150, random_state=seed))
        grid: dict[str, list[Any]] = {"multioutputregressor__estimator__max_leaf_nodes": [6, 24]}
        return GridSearchCV(make_pipeline(columns, boosted), grid, cv=folds, error_score="raise")
    if method == "mlp":
        network = MLPRegressor(
            hidden_layer_sizes=(128,),
            batch_size=32,
            early_stopping=True,
            n_iter_no_change=15,
            max_iter=200,
            random_state=seed,
        )
        model = TransformedTargetRegressor(make_pipeline(StandardScaler(), network), transformer=StandardScaler())
        return GridSearchCV(model, {"regressor__mlpregressor__alpha": [0.1, 1.0, 10.0]}, cv=folds, error_score="raise")
    raise ConfigError(unknown_name("baseline", method, BASELINES))
