"""A metric is a TRL reward function and back: NaN is None, functions may be asynchronous, errors name the reward."""

import asyncio
import inspect
import math

import pytest
import torch

from latent_rewards.contracts import DataError, MetricError, MetricOutputError
from latent_rewards.metrics.reward_func import as_reward_func, from_reward_func

VIDEOS = torch.rand(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


def brightness(videos, *, prompts):
    values = videos.mean(dim=(1, 2, 3, 4))
    values[[prompt == "b" for prompt in prompts].index(True) if "b" in prompts else slice(0, 0)] = math.nan
    return values


def metric():
    from latent_rewards.metrics.metric import Metric

    return Metric(name="test.brightness", needs_prompt=True, may_be_nan=True, score=brightness)


def test_a_metric_becomes_a_reward_function_and_nan_becomes_none():
    reward = as_reward_func(metric())
    expected = VIDEOS.mean(dim=(1, 2, 3, 4)).tolist()
    assert reward(prompts=PROMPTS, completions=VIDEOS, colour=["x"] * 3) == [expected[0], None, expected[2]]
    assert reward.__name__ == "test.brightness"
    assert list(inspect.signature(reward).parameters)[:2] == ["prompts", "completions"]


def test_videos_of_different_sizes_are_scored_one_by_one():
    reward = as_reward_func(metric())
    mixed = [VIDEOS[0], VIDEOS[1, :2, :, :8, :8]]
    assert reward(prompts=["a", "c"], completions=mixed) == pytest.approx([float(v.mean()) for v in mixed])
    assert reward(prompts=[], completions=[]) == []


def test_options_reach_a_registered_metric():
    sharp = as_reward_func("quality.sharpness")(PROMPTS, VIDEOS)
    assert all(value > 0 for value in sharp)
    small, large = (as_reward_func("compression.jpeg_size", quality=q)(PROMPTS, VIDEOS) for q in (10, 95))
    assert all(a < b for a, b in zip(small, large, strict=True))


def test_numbers_of_prompts_and_completions_must_agree():
    with pytest.raises(DataError, match=r"'test.brightness' got 2 prompts for 3 completions"):
        as_reward_func(metric())(PROMPTS[:2], VIDEOS)


def mean_of(prompts, completions, **columns):
    """Mean of each video."""
    return [None if prompt == "b" else float(video.mean()) for prompt, video in zip(prompts, completions, strict=True)]


async def slowly(prompts, completions, **columns):
    await asyncio.sleep(0.001)
    return mean_of(prompts, completions)


@pytest.mark.parametrize("function", [mean_of, slowly])
def test_a_reward_function_becomes_a_metric_and_comes_back(function):
    made = from_reward_func(function, version="2")
    values = made(VIDEOS, PROMPTS)
    assert torch.equal(values.isnan(), torch.tensor([False, True, False]))
    assert made.name == function.__name__ and made.fingerprint.startswith(f"{function.__name__}@2#")
    again = as_reward_func(made)(PROMPTS, VIDEOS)
    assert again == [pytest.approx(float(VIDEOS[0].mean())), None, pytest.approx(float(VIDEOS[2].mean()))]


def test_an_asynchronous_function_works_inside_a_running_loop():
    async def notebook():
        return from_reward_func(slowly)(VIDEOS, PROMPTS)

    assert torch.equal(asyncio.run(notebook()).isnan(), torch.tensor([False, True, False]))


def test_wrong_answers_are_named():
    with pytest.raises((MetricError, MetricOutputError), match="mine.*returned a float"):
        from_reward_func(lambda prompts, completions: 1.0, name="mine")(VIDEOS, PROMPTS)
    with pytest.raises(MetricOutputError, match=r"'mine' returned shape \(2,\)"):
        from_reward_func(lambda prompts, completions: [1.0, 2.0], name="mine")(VIDEOS, PROMPTS)
