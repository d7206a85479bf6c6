"""Features against values computed otherwise, and regressors that find what is there to be found."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distillation as ds
import latent_rewards as lr
from benchmarks.proxy_baselines import (
    BASELINES,
    PROBE_BLOCKS,
    PROBE_TIME,
    Features,
    block_features,
    features_of,
    fit_predict,
    frame_statistics,
    mean_embeddings,
)
from latent_rewards.contracts import ConfigError, DataError

PROMPTS = ["a red digit 3 moving left slowly", "a blue digit 7 moving up quickly", "a red digit 3 moving left slowly"]


@pytest.fixture(scope="module")
def teacher():
    return ds.load_teacher("recipes/moving_digits/weights/teacher")


@pytest.fixture(scope="module")
def latents():
    return torch.randn(3, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))


def test_statistics_of_a_clip_that_is_easy_to_reckon():
    clip = torch.zeros(1, 1, 2, 1, 4)
    clip[0, 0, 0, 0] = torch.tensor([1.0, 1.0, 3.0, 3.0])
    clip[0, 0, 1, 0] = torch.tensor([1.0, 1.0, 3.0, 7.0])
    # mean, standard deviation and maximum of both frames, and the change between them
    expected = [2.0, 3.0, 1.0, 6.0**0.5, 3.0, 7.0, 2.0]
    assert frame_statistics(clip)[0].tolist() == pytest.approx(expected)


def test_padding_takes_no_part_in_the_mean_of_a_prompt():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0]] * 3])
    teacher = SimpleNamespace(encode=lambda prompts: SimpleNamespace(embeddings=tokens))
    assert mean_embeddings(teacher, ["a", "b"]).tolist() == [[2.0, 1.0], [0.0, 0.0]]


@torch.no_grad()
def test_the_probe_reads_what_the_first_blocks_put_out(teacher, latents):
    features = block_features(teacher, latents, PROMPTS)
    transformer = teacher.denoiser.transformer
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    assert features.shape == (3, PROBE_BLOCKS * 2 * 5 * width)
    assert not any(block._forward_hooks for block in transformer.blocks)
    # A transformer of one block puts out norm, modulation and projection of that block's tokens: instead of undoing
    # these, its block is run by hand on what it was given.
    given = {}
    hook = transformer.blocks[0].register_forward_hook(lambda module, inputs, output: given.update(inputs=inputs))
    teacher.denoiser(latents, torch.tensor(PROBE_TIME), teacher.encode(PROMPTS))
    hook.remove()
    tokens = transformer.blocks[0](*given["inputs"]).view(3, 5, 16, width)
    expected = torch.cat([tokens.mean(dim=2), tokens.max(dim=2).values], dim=2).flatten(1)
    assert torch.allclose(features[:, : expected.shape[1]], expected, atol=1e-5)


def test_a_row_depends_on_its_sample_and_prompt_only(teacher, latents):
    dataset = lr.RewardDataset.from_tensors(latents, PROMPTS, {"reward": torch.zeros(3)})
    for method in BASELINES:
        features = features_of(method, dataset, teacher)
        alone = features_of(method, dataset.select([1]), teacher)
        assert np.allclose(features.values[1], alone.values[0], atol=1e-5)
        assert features.values.dtype == np.float32 and features.reduced == (5120 if method == "boosting" else 0)
    other = block_features(teacher, latents[:1], PROMPTS[1:2])
    assert not torch.allclose(other, block_features(teacher, latents[:1], PROMPTS[:1]), atol=1e-2)


def draw(count, seed):
    values = np.random.default_rng(seed).normal(size=(count, 12)).astype(np.float32)
    line = values @ np.linspace(-1, 1, 12)
    return values, np.stack([line, np.sign(values[:, 0])], axis=1)


@pytest.mark.parametrize("method", BASELINES)
def test_each_baseline_finds_what_is_there_and_repeats_itself(method):
    values, rewards = draw(150, 0)
    unseen, true = draw(100, 1)
    prompts = [f"prompt {i % 50}" for i in range(150)]

    def predicted():
        reduced = 6 if method == "boosting" else 0
        return fit_predict(method, Features(values, reduced), rewards, prompts, Features(unseen, reduced), seed=0)

    first = predicted()
    assert first.shape == (100, 2) and np.array_equal(first, predicted())
    error = ((first - true) ** 2).mean(axis=0) / true.var(axis=0)
    assert error[0] < {"ridge": 1e-3, "probe": 1e-3, "mlp": 0.3, "boosting": 0.7}[method]
    assert error[1] < 0.7


def test_rewards_that_do_not_apply_and_unknown_methods_are_refused(teacher, latents):
    values, rewards = draw(30, 0)
    rewards[3, 1] = np.nan
    with pytest.raises(DataError, match="NaN"):
        fit_predict("ridge", Features(values), rewards, ["a"] * 30, Features(values), seed=0)
    dataset = lr.RewardDataset.from_tensors(latents, PROMPTS, {"reward": torch.zeros(3)})
    with pytest.raises(ConfigError, match="Did you mean 'boosting'"):
        features_of("bosting", dataset, teacher)
    with pytest.raises(ConfigError, match="unknown baseline"):
        fit_predict("forest", Features(values), draw(30, 0)[1], ["a"] * 30, Features(values), seed=0)
