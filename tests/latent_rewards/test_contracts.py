import math

import pytest
import torch

from latent_rewards.contracts import (
    DataError,
    UnknownMetricError,
    check_latents,
    check_prompts,
    prompt_text,
    unknown_name,
)


def test_unknown_names_come_with_close_ones():
    message = unknown_name("metric", "quality.sharpnes", ["quality.sharpness", "motion.smoothness"])
    assert "did you mean 'quality.sharpness'" in message.lower() and "motion.smoothness" in message
    assert str(UnknownMetricError(message)) == message


def test_prompts_are_texts_or_mappings():
    assert check_prompts(("a", {"prompt": "b", "image": 1})) == ["a", {"prompt": "b", "image": 1}]
    assert prompt_text({"prompt": "b"}) == "b"
    for bad, message in (([], "no prompts"), (["a", " "], "prompt 1 is blank"), ("a", "one text"), ([3], "got 3")):
        with pytest.raises(DataError, match=message):
            check_prompts(bad)


def test_latents_are_finite_floats_of_rank_five():
    latents = torch.zeros(3, 1, 1, 2, 2)
    assert check_latents(latents) is latents
    latents[1, 0, 0, 0, 0] = math.nan
    for bad, message in (
        (latents, r"latents\[1\] holds NaN"),
        (torch.zeros(3, 2, 2), "5 dimensions"),
        (torch.zeros(1, 1, 1, 1, 1, dtype=torch.long), "floating point"),
        ([1.0], "must be a tensor"),
    ):
        with pytest.raises(DataError, match=message):
            check_latents(bad)


def test_latents_whose_sum_overflows_are_finite():
    latents = torch.full((2, 1, 1, 2, 2), 3e38)
    assert check_latents(latents) is latents
    latents[1, 0, 0, 0, 0] = -math.inf
    with pytest.raises(DataError, match=r"latents\[1\] holds NaN or infinity"):
        check_latents(latents)
