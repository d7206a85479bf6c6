"""Dynamic degree by RAFT: what the network is given, how its flow is judged, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.metrics import check_metric, create_metric, raft
from latent_rewards.metrics.checks import moving_textures
from latent_rewards.metrics.motion import sampling_stride
from latent_rewards.metrics.weights import VARIABLE

CPU = torch.device("cpu")


class Uniform(nn.Module):
    """Says that everything moved right by 16 times the difference of the two frames' brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[int, ...], float, float, int]] = []

    def forward(self, first: Tensor, second: Tensor, num_flow_updates: int) -> list[Tensor]:
        self.calls.append((tuple(first.shape), float(first.min()), float(second.max()), num_flow_updates))
        flow = torch.zeros_like(first[:, :2])
        flow[:, 0] = 16 * (second - first).mean() / 2
        return [torch.full_like(flow, 99.0), flow]


def levels(*values: float, height: int = 128, width: int = 128) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1).expand(1, len(values), 3, height, width)


def score(videos: Tensor, fps: float = 8.0) -> tuple[float, Uniform]:
    network = Uniform()
    return float(raft.RaftDynamicDegree(network, max(1, round(fps / 8)), CPU)(videos)), network


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for model, file in raft.RAFT_FILES.items():
            save_file(raft.raft_network(model).state_dict(), folder / file.name)
    return folder


def test_the_network_is_given_padded_pairs_in_its_range():
    value, network = score(levels(0.0, 1.0, 0.0, height=130, width=141))
    assert value == 1.0
    assert network.calls[0] == ((1, 3, 136, 144), -1.0, 1.0, 20)


def test_the_border_is_repeated_and_the_odd_pixel_goes_to_the_right_and_below():
    given = []

    def network(first: Tensor, second: Tensor, num_flow_updates: int) -> list[Tensor]:
        given.append(first)
        return [first[:, :2]]

    pair = torch.rand(2, 3, 131, 141, generator=torch.Generator().manual_seed(0))
    assert raft.raft_flow(network, pair).shape == (2, 136, 144)
    seen = (given[0][0] + 1) / 2
    torch.testing.assert_close(seen[:, 2:133, 1:142], pair[0])
    torch.testing.assert_close(seen[:, 0, 0], pair[0, :, 0, 0])
    torch.testing.assert_close(seen[:, -1, -1], pair[0, :, -1, -1])


def test_the_threshold_is_six_of_256_parts_of_the_shorter_side():
    # 3 pixels at a shorter side of 128: a difference of 3/16.
    assert score(levels(0.5, 0.5 + 2.9 / 16, 0.5 + 5.8 / 16))[0] == 0.0
    assert score(levels(0.5, 0.5 + 3.1 / 16, 0.5 + 3.1 / 16))[0] == 1.0


def test_small_frames_are_enlarged_and_judged_at_that_size():
    value, network = score(levels(0.5, 0.5 + 3.1 / 16, 0.5 + 3.1 / 16, height=32, width=40))
    assert value == 1.0 and network.calls[0][0] == (1, 3, 128, 160)
    assert score(levels(0.5, 0.5 + 2.9 / 16, 0.5 + 2.9 / 16, height=32, width=40))[0] == 0.0
    assert score(levels(0.0, 1.0, 0.0, height=121, width=300))[1].calls[0][0] == (1, 3, 128, 304)
    assert score(levels(0.0, 1.0, 0.0, height=120, width=300))[1].calls[0][0] == (1, 3, 240, 600)


def test_pairs_are_counted_one_at_a_time_until_they_decide():
    once = [0.0, 1.0] + [1.0] * 7
    twice = [0.0, 1.0, 0.0] + [0.0] * 6
    # 9 frames need round(9/4) = 2 pairs.
    value, network = score(levels(*once))
    assert value == 0.0 and len(network.calls) == 8
    value, network = score(levels(*twice))
    assert value == 1.0 and len(network.calls) == 2


def test_eight_frames_are_sampled_per_second():
    assert [sampling_stride(fps) for fps in (4, 8, 12, 20, 23.976, 30)] == [1, 1, 2, 2, 3, 4]
    flicker = [0.0, 1.0] * 6
    assert score(levels(*flicker), fps=8)[0] == 1.0
    assert score(levels(*flicker), fps=16)[0] == 0.0
    # A clip of a single sampled frame has no pair, and VBench says that it does not move.
    assert score(levels(*flicker), fps=240)[0] == 0.0


def test_it_keeps_the_contract(weights):
    metric = create_metric("vbench.dynamic_degree", weights=weights, model="raft_small")
    check_metric(metric, videos=moving_textures(2, num_frames=3))


def test_one_channel_is_three_alike():
    clip = torch.rand(2, 1, 9, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(raft.enlarged(clip), raft.enlarged(clip.repeat(1, 3, 1, 1)))


def test_a_file_without_counts_of_training_steps_is_taken_and_one_without_anything_else_is_not(weights, tmp_path):
    file = raft.RAFT_FILES["raft_large"]
    tensors = load_file(weights / file.name)
    evaluated = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    assert len(evaluated) < len(tensors)
    save_file(evaluated, tmp_path / file.name)
    first, second = (create_metric("vbench.dynamic_degree", weights=folder) for folder in (weights, tmp_path))
    assert first.fingerprint == second.fingerprint
    del evaluated["feature_encoder.conv.bias"]
    save_file(evaluated, tmp_path / file.name)
    with pytest.raises(DataError, match="raft_large_C_T_V1.* without feature_encoder.conv.bias"):
        create_metric("vbench.dynamic_degree", weights=tmp_path)
    with pytest.raises(DataError, match="does not fit RAFT"):
        create_metric("vbench.dynamic_degree", weights=weights / file.name, model="raft_small")


@pytest.mark.parametrize("model", ["raft_large", "raft_small"])
def test_missing_weights_are_named_before_a_network_is_built(model, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(raft, "raft_network", lambda model: pytest.fail("a network was built"))
    with pytest.raises(DataError, match=f"(?s){model}_C_T_V1.safetensors.*MB, BSD-3-Clause.*from.*{VARIABLE}"):
        create_metric("vbench.dynamic_degree", model=model)


def test_another_model_or_no_frame_rate_is_refused(weights):
    with pytest.raises(ConfigError, match="'raft_larg'.*raft_large"):
        create_metric("vbench.dynamic_degree", weights=weights, model="raft_larg")
    with pytest.raises(ConfigError, match="fps must be positive; got 0"):
        create_metric("vbench.dynamic_degree", weights=weights, fps=0)
