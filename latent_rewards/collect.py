"""Policy + codec + metrics -> RewardDataset.

Sample ``i`` has prompt ``i mod len(prompts)`` and noise that depends on ``(seed, i)`` only, so an interrupted
collection continues where it stopped, and any number of ranks and workers ends with the same dataset. Latents are
decoded in bounded chunks and the videos dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_rewards.collection import Begin, Collection, Outcome
from latent_rewards.contracts import ConfigError, Policy, Prompt, check_prompts, prompt_text
from latent_rewards.dataset import RewardDataset
from latent_rewards.digests import value_digest, weights_digest
from latent_rewards.oracle import MetricOracle, PendingScores, Scores
from latent_rewards.training.randomness import sample_noise


def collect_rewards(
    policy: Policy,
    prompts: Sequence[Prompt],
    oracle: MetricOracle,
    *,
    num_samples: int,
    output_dir: str | Path | None = None,
    seed: int = 0,
    num_steps: int = 4,
    batch_size: int = 32,
    progress: bool = True,
) -> RewardDataset:
    """Sample a policy and score every sample with the true metrics.

    With ``output_dir`` each batch is committed as it finishes; the same call continues an interrupted collection and
    ends with the same dataset, and ``RewardDataset.load(output_dir)`` opens it. When a batch fails its samples are
    tried one by one; those that fail are left out, listed in ``dataset.failures`` and reported in a warning at the end.

    An oracle with workers scores while the next batch is sampled and decoded. In a launch of several processes
    (``accelerate launch``) that share ``output_dir``, each makes its share of the batches and all return the whole;
    without ``output_dir`` each makes everything.

    Args:
        policy: the generator; sampled without gradient.
        prompts: at least one; sample i uses ``prompts[i % len(prompts)]``.
        oracle: scores latents; its fingerprints go into the dataset.
        num_samples: how many to sample, at least 1.
        output_dir: folder to collect into, or None to keep everything in memory.
        seed: root of the noise.
        num_steps: sampling steps.
        batch_size: samples per batch and per stored part.
        progress: draw a progress bar.

    Raises:
        ConfigError: a count is below 1, ``output_dir`` holds a collection with other settings (it says which), or
            another run is collecting into it.
        DataError: there are no prompts or one is blank.
        MetricError: every sample failed, or a worker could not make a metric.
        RankError: another process of the launch failed.
        CheckpointError: a stored part is damaged; the message names the file.
    """
    for name, value in {"num_samples": num_samples, "num_steps": num_steps, "batch_size": batch_size}.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}")
    listed = check_prompts(prompts)

    def begin(indices: list[int]) -> Callable[[], Outcome]:
        chosen = [listed[i % len(listed)] for i in indices]
        latents = _sample(policy, chosen, indices, seed, num_steps)
        return begin_part(oracle, latents, chosen, indices, lambda rows: oracle.submit(latents[rows], chosen[rows]))

    settings = {
        "num_samples": num_samples,
        "seed": seed,
        "num_steps": num_steps,
        "batch_size": batch_size,
        "prompts": [prompt_text(prompt) for prompt in listed],
        "prompts_beside_text": [_beside_text(prompt) for prompt in listed],
        "latent_shape": _latent_shape(policy, listed),
        "metrics": oracle.fingerprints,
        "latent_space": oracle.latent_space,
        "policy": _policy_digest(policy),
    }
    root = Path(output_dir) if output_dir is not None else None
    return run_with(oracle, begin, Collection(num_samples, batch_size, settings, root=root, progress=progress))


def run_with(oracle: MetricOracle, begin: Begin, collection: Collection) -> RewardDataset:
    """Run a collection with enough parts begun ahead for the oracle's workers; they end with it if it fails."""
    chunks = math.ceil(collection.batch_size / oracle.chunk_size)
    collection.ahead = math.ceil((oracle.num_workers + 1) / chunks) if oracle.num_workers else 0
    try:
        return collection.run(begin)
    except BaseException:
        oracle.close()  # or leaving would wait for what is still being scored
        raise


def begin_part(
    oracle: MetricOracle,
    latents: Tensor,
    prompts: Sequence[Prompt],
    indices: Sequence[int],
    submit: Callable[[slice], PendingScores],
    failures: Mapping[int, str] | None = None,
) -> Callable[[], Outcome]:
    """Begin to score samples; when they fail together, each gets a try of its own.

    Args:
        oracle: whose workers are started first, so that one that cannot start is no sample's failure.
        latents: ``[B, C, F, H, W]``, kept with the scores.
        prompts: B of them.
        indices: the B samples' global indices.
        submit: begins to score some of the samples, given by position.
        failures: ``{global index: error}`` of samples of the part that are not among the B.

    Returns:
        A function that waits for the scores and returns the part.
    """
    oracle.start()

    def attempt(rows: slice) -> PendingScores | Exception:
        try:
            return submit(rows)
        except Exception as error:  # a codec or metric is user code and may raise anything
            return error

    together = attempt(slice(0, len(indices)))

    def wait() -> Outcome:
        scores = _settle(together)
        if not isinstance(scores, Exception):
            return _part(oracle, latents, prompts, scores, dict(failures or {}))
        settled = [_settle(alone) for alone in [attempt(slice(row, row + 1)) for row in range(len(indices))]]
        errors = {indices[row]: error for row, error in enumerate(settled) if isinstance(error, Exception)}
        told = {index: f"{type(error).__name__}: {error}" for index, error in errors.items()}
        told = dict(sorted({**(failures or {}), **told}.items()))
        scored = {row: scores for row, scores in enumerate(settled) if not isinstance(scores, Exception)}
        if not scored:
            return None, told
        columns = {name: torch.cat([scores[name] for scores in scored.values()]) for name in oracle.metrics}
        return _part(oracle, latents[list(scored)], [prompts[row] for row in scored], columns, told)

    return wait


def _settle(pending: PendingScores | Exception) -> Scores | Exception:
    if isinstance(pending, Exception):
        return pending
    try:
        return pending.result()
    except Exception as error:
        return error


def _part(
    oracle: MetricOracle, latents: Tensor, prompts: Sequence[Prompt], scores: Scores, failures: dict[int, str]
) -> Outcome:
    part = RewardDataset.from_tensors(
        latents.cpu(),
        prompts,
        scores,
        latent_space=oracle.latent_space,
        metric_fingerprints=oracle.fingerprints,
        failures=failures,
    )
    return part, failures


@torch.no_grad()
def _sample(policy: Policy, prompts: list[Prompt], indices: list[int], seed: int, num_steps: int) -> Tensor:
    from latent_rewards.rollout import rollout

    device = _device(policy)
    condition = policy.encode(prompts).to(device)
    shape = policy.latent_shape(condition)
    noise = torch.stack(
        [sample_noise(seed, "collect", step, indices, shape, device=device) for step in range(num_steps)]
    )
    return rollout(policy, condition, noise, num_steps).final


@torch.no_grad()
def _latent_shape(policy: Policy, prompts: list[Prompt]) -> list[int]:
    return list(policy.latent_shape(policy.encode(prompts[:1])))


def _beside_text(prompt: Prompt) -> dict[str, str]:
    """Return a hash of each of a prompt's entries but its text, such as an image."""
    entries = {} if isinstance(prompt, str) else {name: value for name, value in prompt.items() if name != "prompt"}
    return {name: value_digest(value) for name, value in sorted(entries.items())}


def _device(policy: Policy) -> torch.device:
    parameters: Callable[[], Any] | None = getattr(policy, "parameters", None)
    first = next(iter(parameters()), None) if parameters is not None else None
    return first.device if first is not None else torch.device("cpu")


def _policy_digest(policy: Policy) -> str:
    weights = weights_digest(policy) if isinstance(policy, nn.Module) else value_digest(type(policy).__name__)
    preference = getattr(policy, "preference", None)
    return f"{weights} at {preference.tolist()}" if isinstance(preference, Tensor) else weights
