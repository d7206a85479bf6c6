import hashlib
from collections import Counter

import pytest
import torch

from latent_rewards.contracts import DataError
from recipes.moving_digits import evaluation_set
from recipes.moving_digits.world import parse_prompt, write_prompt

SHAPE = (2, 3, 2, 2)


def test_the_prompts_are_those_of_version_1() -> None:
    digest = hashlib.sha256("\n".join(evaluation_set.evaluation_prompts()).encode()).hexdigest()
    assert digest[:16] == "0e34c9948a3b64d6", (
        "the benchmark's prompts changed: give it a new version and rerun every row"
    )


def test_every_beginning_is_half_held_out_and_balanced() -> None:
    prompts = evaluation_set.evaluation_prompts()
    assert len(set(prompts)) == len(prompts) == 200
    specs = [parse_prompt(text) for text in prompts]
    for count in (2, 40, 200):
        assert sum(spec.is_heldout for spec in specs[:count]) == count // 2
        assert evaluation_set.evaluation_prompts(count) == prompts[:count]
    demo = specs[:40]
    assert set(Counter(s.speed for s in demo).values()) == {20}
    assert len({s.digit for s in demo}) == 10 and len({s.colour for s in demo}) == 6
    assert min(Counter(s.direction for s in demo).values()) >= 8
    with pytest.raises(DataError, match="even"):
        evaluation_set.evaluation_prompts(41)
    with pytest.raises(DataError, match="200"):
        evaluation_set.evaluation_prompts(202)


def test_evaluation_uses_held_out_wordings_and_selection_does_not() -> None:
    evaluated, selected = evaluation_set.evaluation_prompts(), evaluation_set.selection_prompts(40)
    assert any("at a slow speed" in p or "at a fast speed" in p for p in evaluated)
    assert not any("at a slow speed" in p or "at a fast speed" in p for p in selected)
    specs = {parse_prompt(p) for p in selected}
    assert len(specs) == 40
    assert not any(spec.is_heldout for spec in specs)
    assert not specs & {parse_prompt(p) for p in evaluated}


def test_prompts_say_what_their_specs_are() -> None:
    for index, text in enumerate(evaluation_set.evaluation_prompts(20)):
        spec = parse_prompt(text)
        assert parse_prompt(write_prompt(spec, seed=9, index=index)) == spec


def test_noise_depends_on_prompt_seed_and_step_only() -> None:
    noise = evaluation_set.evaluation_noise(3, SHAPE, num_steps=2)
    assert noise.shape == (2, 12, *SHAPE)
    assert torch.equal(evaluation_set.evaluation_noise(2, SHAPE, num_steps=1)[0], noise[0, :8])
    assert len({tuple(n.flatten().tolist()) for step in noise for n in step}) == 24
    assert not torch.equal(evaluation_set.evaluation_noise(3, SHAPE, stage="selection")[0], noise[0])


def test_clips_are_generated_in_order_whatever_the_batch() -> None:
    prompts = evaluation_set.evaluation_prompts(4)
    seen: list[str] = []

    def sample(texts: list[str], noise: torch.Tensor) -> torch.Tensor:
        seen.extend(texts)
        return noise.sum(dim=0).double()

    clips = evaluation_set.generate_clips(sample, prompts, SHAPE, num_steps=2, batch_size=3, progress=False)
    assert seen == evaluation_set.clip_prompts(prompts) == [p for p in prompts for _ in range(4)]
    assert clips.dtype == torch.float32
    assert torch.equal(clips, evaluation_set.evaluation_noise(4, SHAPE, num_steps=2).sum(dim=0))


def test_real_clips_are_of_the_prompts_and_fixed() -> None:
    prompts = evaluation_set.evaluation_prompts(4)
    clips = evaluation_set.real_clips(prompts)
    assert clips.shape == (16, 17, 3, 32, 32)
    assert torch.equal(evaluation_set.real_clips(prompts[:2]), clips[:8])
    assert len({tuple(c[0].flatten().tolist()) for c in clips[:4]}) == 4


def test_noise_clips_are_decoded_standard_normals() -> None:
    class Codec:
        fingerprint = "identity"
        batches: list[int] = []

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            self.batches.append(len(latents))
            return latents

        def encode(self, videos: torch.Tensor) -> torch.Tensor:
            return videos

    clips = evaluation_set.noise_clips(Codec(), SHAPE, count=50, batch_size=20)
    assert Codec.batches == [20, 20, 10]
    assert abs(clips.mean().item()) < 4.5 / clips.numel() ** 0.5
    assert abs(clips.var().item() - 1) < 4.5 * (2 / clips.numel()) ** 0.5
