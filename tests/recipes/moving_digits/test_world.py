import hashlib
from itertools import product

import pytest
import torch

from latent_rewards.contracts import DataError
from recipes.moving_digits.world import (
    COLOUR_PHRASES,
    COLOURS,
    DIGIT_PHRASES,
    DIRECTION_PHRASES,
    DIRECTIONS,
    SPEED_PHRASES,
    ClipSpec,
    all_specs,
    draw_specs,
    labels,
    parse_prompt,
    render,
    scans,
    vocabulary,
    write_prompt,
)


def test_heldout_combinations_follow_the_rule():
    held = all_specs(heldout=True)
    assert len(held) + len(all_specs(heldout=False)) == 480
    for spec in held:
        text = f"{spec.digit} {spec.colour} {spec.direction} {spec.speed}"
        assert hashlib.sha256(text.encode()).digest()[0] % 10 == 3


def test_scans_are_split_by_index():
    assert len(scans("heldout")[0]) == 180 and len(scans("train")[0]) == 1797 - 180
    with pytest.raises(ValueError, match="nowhere"):
        scans("nowhere")


def test_every_prompt_is_understood_and_in_the_vocabulary():
    words = set(vocabulary())
    for index, spec in enumerate([*all_specs(heldout=True), *all_specs(heldout=False)]):
        prompt = write_prompt(spec, seed=1, index=index, heldout_phrasing=True)
        assert parse_prompt(prompt) == spec
        assert set(prompt.split()) <= words


def test_heldout_phrasings_are_never_written_for_training():
    spec = ClipSpec(3, "red", "left", "slow")
    training = " ".join(write_prompt(spec, seed=0, index=i) for i in range(300))
    everything = " ".join(write_prompt(spec, seed=0, index=i, heldout_phrasing=True) for i in range(300))
    for phrase in ("number 3", "bright red coloured", "drifting leftwards", "at a slow speed"):
        assert phrase not in training and phrase in everything


def test_all_wordings_of_a_combination_mean_it():
    spec = ClipSpec(7, "purple", "up", "fast")
    wordings = product(COLOUR_PHRASES, DIGIT_PHRASES, DIRECTION_PHRASES, SPEED_PHRASES["fast"])
    for colour, digit, direction, speed in wordings:
        prompt = f"a {colour} {digit} {direction} {speed}".format(c="purple", n=7, word="seven", d="up")
        assert parse_prompt(prompt) == spec


def test_generated_prompts_mean_what_they_meant_before_punctuation_was_read():
    """The hash is of what the first version of ``parse_prompt`` made of them."""
    told = hashlib.sha256()
    for index, spec in enumerate([*all_specs(heldout=False), *all_specs(heldout=True)] * 4):
        prompt = write_prompt(spec, seed=11, index=index, heldout_phrasing=index % 2 == 0)
        assert parse_prompt(prompt) == spec
        told.update(f"{prompt}: {parse_prompt(prompt)}".encode())
    assert told.hexdigest()[:16] == "12ba21633d5433e0"


@pytest.mark.parametrize(
    "prompt",
    [
        'A red "3" moving left, slowly.',
        "a red digit 3, moving left: slowly!",
        "(red) three; left-moving and slow",
        "red “3”, leftwards, slow",
    ],
)
def test_punctuation_hides_no_word(prompt):
    assert parse_prompt(prompt) == ClipSpec(3, "red", "left", "slow")


def test_a_prompt_that_lacks_an_attribute_is_refused():
    with pytest.raises(DataError, match="names no colour"):
        parse_prompt("a digit 3 moving left slowly")


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("one red digit 3 moving left slowly", r"more than one digit \(1, 3\); name one"),
        ("a red or blue digit 3 moving left slowly", r"colour \(red, blue\)"),
        ("a red digit 3 moving left, then up, slowly", r"direction \(left, up\)"),
        ("a red digit 3 moving left slowly, then fast", r"speed \(slow, fast\)"),
    ],
)
def test_a_prompt_that_names_two_of_a_kind_is_refused(prompt, named):
    with pytest.raises(DataError, match=named):
        parse_prompt(prompt)


def test_one_value_may_be_named_twice():
    assert parse_prompt("a red three, digit 3, moving left slowly at low speed").digit == 3


def test_clips_are_reproducible_and_independent_of_the_batch():
    specs = draw_specs(6, seed=4)
    whole = render(specs, seed=9)
    assert whole.shape == (6, 17, 3, 32, 32)
    assert float(whole.min()) >= 0 and float(whole.max()) <= 1
    assert torch.equal(whole[4:], render(specs[4:], seed=9, start_index=4))
    assert not torch.equal(whole, render(specs, seed=10))
    chosen = torch.arange(2 * len(specs)).view(-1, 2) % whole.shape[1]
    assert torch.equal(whole[torch.arange(len(specs))[:, None], chosen], render(specs, seed=9, frames=chosen))
    assert not torch.equal(whole, render(specs, seed=9, split="heldout"))


@pytest.mark.parametrize("direction", list(DIRECTIONS))
@pytest.mark.parametrize(("speed", "pixels"), [("slow", 0.4), ("fast", 0.9)])
def test_digits_move_as_described_and_stay_inside(direction, speed, pixels):
    videos = render([ClipSpec(n, "white", direction, speed) for n in range(10)], seed=0).amax(dim=2)
    mass = videos.sum(dim=(2, 3))
    assert float((mass.amin(dim=1) / mass.amax(dim=1)).min()) > 0.9
    grid = torch.arange(32) + 0.5
    centre = torch.stack(((videos.sum(2) * grid).sum(-1) / mass, (videos.sum(3) * grid).sum(-1) / mass), dim=-1)
    velocity = (centre[:, -1] - centre[:, 0]) / 16
    expected = pixels * torch.tensor(DIRECTIONS[direction], dtype=torch.float32)
    assert float((velocity - expected).norm(dim=1).max()) < 0.12 * pixels


def test_colours_dominate_the_right_channels():
    for name, tint in COLOURS.items():
        video = render([ClipSpec(8, name, "left", "slow")], seed=1)[0]
        brightest = video.flatten(2).amax(dim=2)[0]
        assert torch.allclose(brightest / brightest.max(), torch.tensor(tint), atol=0.02)


def test_labels_are_indices_in_the_order_of_the_constants():
    found = labels([ClipSpec(7, "blue", "up", "fast")])
    assert {k: int(v) for k, v in found.items()} == {"digit": 7, "colour": 2, "direction": 2, "speed": 1}
