import pytest
import torch

from latent_rewards.training.randomness import derive_seed, own_randomness, sample_index, sample_noise, sample_uniform


def test_a_sample_depends_on_its_index_and_not_on_its_batch():
    whole = sample_noise(3, "stage", 5, range(8), (2, 3))
    parts = torch.cat([sample_noise(3, "stage", 5, range(5), (2, 3)), sample_noise(3, "stage", 5, range(5, 8), (2, 3))])
    assert torch.equal(whole, parts)


def test_every_argument_changes_the_stream():
    seeds = {derive_seed(0, "a", 0), derive_seed(1, "a", 0), derive_seed(0, "b", 0), derive_seed(0, "a", 1)}
    assert len(seeds | {derive_seed(0, "a", 0, 1)}) == 5


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sample_noise(0, "s", 0, range(3), (4,))
    sample_uniform(0, "s", 0, range(3))
    sample_index(0, "s", 0, 5)
    assert torch.equal(torch.rand(3), expected)


def test_noise_is_standard_normal_and_uniform_is_uniform():
    noise = sample_noise(0, "moments", 0, range(400), (100,), dtype=torch.float64)
    assert abs(noise.mean()) < 4.5 / 200
    assert abs(noise.var() - 1) < 4.5 * (2 / 40000) ** 0.5
    uniform = sample_uniform(0, "moments", 0, range(4000))
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 4.5 * (1 / 12 / 4000) ** 0.5


def test_sample_index_covers_its_range():
    assert {sample_index(0, "choice", step, 3) for step in range(60)} == {0, 1, 2}


def test_the_global_generators_are_seeded_for_a_block_and_left_as_they_were():
    def drawn(*key):
        with own_randomness(*key, torch.device("cpu")):
            return float(torch.rand(()))

    keys = [(0, "s", 1, 0), (1, "s", 1, 0), (0, "t", 1, 0), (0, "s", 2, 0), (0, "s", 1, 1)]
    before = torch.get_rng_state()
    assert len({drawn(*key) for key in keys}) == len(keys) and drawn(*keys[0]) == drawn(*keys[0])
    with pytest.raises(RuntimeError), own_randomness(0, "s", 0, 0, torch.device("cpu")):
        torch.rand(())
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_of_a_stage_is_seeded_too():
    device = torch.device("cuda", 0)

    def drawn(rank):
        with own_randomness(0, "s", 0, rank, device):
            return float(torch.rand((), device=device))

    before = torch.cuda.get_rng_state(device)
    assert drawn(0) == drawn(0) != drawn(1)
    assert torch.equal(torch.cuda.get_rng_state(device), before)
