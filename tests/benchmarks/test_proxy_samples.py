"""Held-out prompts, clips of another world, and one small comparison from a saved student to a summary."""

import copy
import dataclasses
import json
from collections import Counter

import pytest
import torch

import latent_rewards as lr
from benchmarks.proxies import METHODS, PROXIES, Comparison, run
from benchmarks.proxy_samples import (
    REWARDS,
    Amounts,
    ProxyWorld,
    full_digest,
    heldout_prompts,
    moving_pictures,
    pictures,
)
from benchmarks.proxy_summary import summarise
from latent_rewards.contracts import ConfigError, DataError
from recipes.moving_digits.world import all_specs, parse_prompt

TEACHER = "recipes/moving_digits/weights/teacher"
SMALL = Amounts(pool=40, heldout=12, heldout_prompts=6, foreign=6, hacked=6, hack_updates=1)


def test_heldout_prompts_are_distinct_and_of_combinations_that_nothing_was_trained_on():
    prompts = heldout_prompts(200)
    assert len(set(prompts)) == 200 and heldout_prompts(50) == prompts[:50]
    used = Counter(parse_prompt(prompt) for prompt in prompts)
    assert all(spec.is_heldout for spec in used) and len(used) == min(200, len(all_specs(heldout=True)))
    assert max(used.values()) - min(used.values()) <= 1
    with pytest.raises(DataError, match="count must lie between 1 and"):
        heldout_prompts(10**6)


def test_moving_pictures_are_photographs_that_move():
    clips = moving_pictures(range(4), seed=5)
    assert clips.shape == (4, 17, 3, 32, 32) and 0 <= clips.min() and clips.max() <= 1
    assert torch.equal(moving_pictures([2], seed=5)[0], clips[2])
    assert not torch.equal(moving_pictures([2], seed=6)[0], clips[2])
    assert bool(((clips[:, -1] - clips[:, 0]).abs().mean(dim=(1, 2, 3)) > 0.01).all())
    assert clips.mean() > 0.2, "digits on black are darker"
    assert len(pictures()) == 12 and all(picture.shape[0] == 3 for picture in pictures())


@pytest.mark.parametrize(
    ("changes", "said"), [({"foreign": 0}, "foreign must be positive; got 0"), ({"heldout": 3}, "200 held-out prompts")]
)
def test_amounts_are_checked(changes, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(Amounts(), **changes)


def test_a_digest_knows_every_weight():
    module = torch.nn.Linear(3, 2)
    other = copy.deepcopy(module)
    assert full_digest(module) == full_digest(other)
    with torch.no_grad():
        other.bias[1] += 1e-6
    assert full_digest(module) != full_digest(other)


def test_from_a_saved_student_to_a_summary(untrained_student, tmp_path):
    world = ProxyWorld(untrained_student, TEACHER, tmp_path / "runs", SMALL)
    quick = lr.ProxyConfig(width=16, depth=1, num_updates=4, ensemble_size=2, decoder_updates=10, progress=False)
    comparison = Comparison(world, 40, quick)
    chosen = {"methods": [*PROXIES, "probe"], "seeds": [0], "sizes": [40], "folder": tmp_path / "results"}
    run(comparison.measure, comparison.settings(), **chosen)
    results = [json.loads(file.read_text()) for file in (tmp_path / "results").iterdir()]
    assert {result["method"] for result in results} == {*PROXIES, "probe"}
    (entry,) = (result["sizes"]["40"] for result in results if result["method"] == "default")
    assert set(entry["auroc"]) == {"noise", "textures", "hacked"} and set(entry["rewards"]) == set(REWARDS)
    assert all(0 <= entry["rewards"][name]["coverage"]["low"] <= 1 for name in REWARDS)
    assert entry["hacked"]["hacked"]["proxy"] > entry["hacked"]["heldout"]["proxy"]
    assert "| digits.legibility | probe |" in summarise(results, METHODS, REWARDS)
    assert not set(world.pool(0).prompts) & set(world.heldout().prompts)
    # A second world reads what is there: the same student, so nothing is sampled again.
    again = ProxyWorld(untrained_student, TEACHER, tmp_path / "runs", SMALL)
    assert again.student_digest == world.student_digest
    assert torch.equal(again.heldout().latents(), world.heldout().latents())
    with pytest.raises(ConfigError, match="num_samples"):
        ProxyWorld(untrained_student, TEACHER, tmp_path / "runs", dataclasses.replace(SMALL, pool=41)).pool(0)
