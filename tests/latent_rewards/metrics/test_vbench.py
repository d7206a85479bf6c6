"""VBench's formulas equal the original's, whose outputs lie in golden/vbench_*; its totals, and what is refused.

golden/vbench_provenance.json says which original functions were run on what.
"""

import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_rewards.contracts import DataError
from latent_rewards.metrics import create_metric, motion
from latent_rewards.metrics.consistency import (
    CLIP_SIZES,
    DINO_SIZES,
    clip_image_features,
    clip_image_network,
    dino_features,
    dino_network,
    frame_consistency,
)
from latent_rewards.metrics.raft import RaftDynamicDegree, raft_flow, raft_network
from latent_rewards.metrics.vbench import QUALITY, SEMANTIC, vbench_score

GOLDEN = Path(__file__).parent / "golden"
VALUES = json.loads((GOLDEN / "vbench_values.json").read_text())
TENSORS = load_file(GOLDEN / "vbench_tensors.safetensors")
CLOSE = {"atol": 1e-5, "rtol": 0}
DINO = {"width": 16, "depth": 2, "heads": 2}
CLIP = {**DINO, "output": 12}

TEACHER = {
    "subject consistency": 83.99,
    "background consistency": 93.78,
    "temporal flickering": 96.42,
    "motion smoothness": 98.09,
    "dynamic degree": 99.44,
    "aesthetic quality": 61.21,
    "imaging quality": 63.87,
    "object class": 85.79,
    "multiple objects": 52.59,
    "human action": 99.60,
    "color": 77.00,
    "spatial relationship": 51.40,
    "scene": 49.99,
    "temporal style": 26.45,
    "appearance style": 24.83,
    "overall consistency": 27.89,
}


def test_the_published_teacher_has_its_published_totals():
    score = vbench_score(TEACHER)
    assert (round(score.quality, 2), round(score.semantic, 2), round(score.total, 2)) == (81.89, 73.71, 80.25)


def test_the_ends_of_every_range_give_zero_and_one_hundred():
    everything = QUALITY | SEMANTIC
    lowest = vbench_score({name: 100 * low for name, (low, _, _) in everything.items()})
    highest = vbench_score({name: 100 * high for name, (_, high, _) in everything.items()})
    assert lowest.total == pytest.approx(0, abs=1e-9)
    assert (highest.quality, highest.semantic, highest.total) == pytest.approx((100, 100, 100))


def test_dynamic_degree_counts_half():
    still = vbench_score(TEACHER | {"dynamic degree": 0.0})
    assert vbench_score(TEACHER).quality - still.quality == pytest.approx(0.5 * 99.44 / 6.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scene": None}, "missing: scene"),
        ({"scenes": 5.0}, "scenes.*scene"),
        ({"scene": 101.0}, "'scene' must be a percentage"),
        ({"scene": -0.1}, "'scene' must be a percentage"),
        ({"scene": math.nan}, "'scene' must be a percentage"),
        ({"scene": "50"}, "'scene' must be a percentage"),
        ({"Dynamic_Degree": 5.0}, "'dynamic_degree' is given twice"),
    ],
)
def test_what_is_missing_or_out_of_range_is_named(change, message):
    wrong = {name: value for name, value in (TEACHER | change).items() if value is not None}
    with pytest.raises(DataError, match=message):
        vbench_score(wrong)


def test_fractions_are_not_taken_for_percentages():
    with pytest.raises(DataError, match="multiply them by 100"):
        vbench_score({name: value / 100 for name, value in TEACHER.items()})


def pseudo_random(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1) that every version of NumPy draws alike."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return torch.from_numpy(2 * ((raw >> np.uint64(11)) * 2.0**-53) - 1).float().reshape(shape)


def pseudo_weights(network: torch.nn.Module, gain: float = 1.0) -> dict[str, Tensor]:
    made = {}
    for name, tensor in network.state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            made[name] = torch.zeros(shape, dtype=torch.long)
        elif len(shape) > 1 and name.endswith("weight"):
            made[name] = gain * pseudo_random(name, shape) * (3 / float(math.prod(shape[1:]))) ** 0.5
        elif name.endswith(("weight", "running_var")):
            made[name] = 1 + 0.3 * pseudo_random(name, shape)
        else:
            made[name] = (0.1 if name.endswith(("bias", "running_mean")) else 0.5) * pseudo_random(name, shape)
    return made


def enlarged(clip: Tensor, factor: int) -> Tensor:
    return clip.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def golden_clip(name: str) -> Tensor:
    clip = TENSORS["clip"].float() / 255
    if name == "wide":
        return enlarged(clip, 8)
    if name == "tall":
        return clip.transpose(-1, -2)
    return clip[..., :32, :32] if name == "square" else enlarged(clip[..., :28, :29], 8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_file(pseudo_weights(dino_network(**DINO), gain=2.0), folder / "dino_vitbase16_pretrain.safetensors")
    visual = pseudo_weights(clip_image_network(**CLIP), gain=2.0)
    # A whole CLIP has a text tower too, which is not read.
    whole = {f"visual.{name}": value for name, value in visual.items()} | {"text_projection": torch.zeros(2, 2)}
    save_file(whole, folder / "ViT-B-32-openai.safetensors")
    return folder


@pytest.mark.parametrize("name", ["wide", "tall", "square", "nearly_square"])
def test_subject_consistency_equals_the_original(name, weights):
    clip = golden_clip(name)
    metric = create_metric("vbench.subject_consistency", weights=weights, model=DINO)
    features = dino_features(metric.score.network, clip)
    torch.testing.assert_close(features, TENSORS[f"dino.{name}"], **CLOSE)
    assert float(metric(clip[None])) == pytest.approx(VALUES["consistency"][name]["subject"], abs=1e-5)


@pytest.mark.parametrize("name", ["wide", "tall", "square", "nearly_square"])
def test_background_consistency_equals_the_original(name, weights):
    clip = golden_clip(name)
    metric = create_metric("vbench.background_consistency", weights=weights, model=CLIP)
    features = clip_image_features(metric.score.network, clip)
    torch.testing.assert_close(features, TENSORS[f"clip_image.{name}"], **CLOSE)
    assert float(metric(clip[None])) == pytest.approx(VALUES["consistency"][name]["background"], abs=1e-5)


def test_the_published_files_fit_the_networks_that_read_them():
    with torch.device("meta"):
        networks = {"dino": dino_network(**DINO_SIZES), "clip_image": clip_image_network(**CLIP_SIZES)}
    for name, network in networks.items():
        lines = sorted(f"{key} {list(value.shape)}" for key, value in network.state_dict().items())
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == VALUES["layouts"][name]


def test_the_formula_of_consistency_equals_the_original_where_cosines_are_negative():
    features = TENSORS["features"]
    assert (torch.corrcoef(features) < 0).any()
    assert float(frame_consistency(features)) == pytest.approx(VALUES["formula"], abs=1e-6)


def test_temporal_flickering_equals_the_original():
    clip = TENSORS["clip"][None, ..., :32, :46].float() / 255
    value = float(create_metric("quality.temporal_flickering")(clip))
    assert value == pytest.approx(VALUES["temporal_flickering"], abs=1e-6)


@pytest.fixture(scope="module")
def raft() -> torch.nn.Module:
    network = raft_network("raft_large").eval()
    made = pseudo_weights(network)
    for name in ("weight", "bias"):
        # Brings the random flow to the size of the threshold.
        made[f"update_block.flow_head.conv2.{name}"] *= 0.017
    network.load_state_dict(made)
    return network


def moving_clip() -> Tensor:
    return enlarged(TENSORS["clip"][..., :33, :35], 4)[..., :131, :139].float() / 255


def test_the_flow_and_its_magnitudes_equal_the_original(raft):
    clip = moving_clip()
    with torch.no_grad():
        flow = raft_flow(raft, clip[:2])
    torch.testing.assert_close(flow[:, ::8, ::8], TENSORS["flow"], **CLOSE)
    magnitude = motion.top_magnitude(flow.permute(1, 2, 0).numpy())
    assert magnitude == pytest.approx(VALUES["dynamic_degree"]["moving"]["magnitudes"][0], abs=1e-5)


@pytest.mark.parametrize("name", ["moving", "sampled", "two", "one"])
def test_dynamic_degree_equals_the_original(name, raft):
    clip, wanted = moving_clip(), VALUES["dynamic_degree"][name]
    videos = {"moving": clip[:4], "sampled": clip, "two": clip[:1].repeat(2, 1, 1, 1), "one": clip[:3]}[name]
    score = RaftDynamicDegree(raft, motion.sampling_stride(wanted["fps"]), torch.device("cpu"))
    assert len(videos[:: score.stride]) == len(wanted["magnitudes"]) + 1
    assert bool(score(videos[None])) == wanted["moves"]


def test_the_rule_of_dynamic_degree_equals_the_original():
    for row in VALUES["rule"]:
        threshold = 6 * row["shorter_side"] / 256
        magnitudes = [threshold * (1.01 if mark == "1" else 1.0) for mark in row["above"]]
        wanted = row["moves"]
        assert motion.moves(magnitudes, frames=row["frames"], shorter_side=row["shorter_side"]) == wanted, row
        # The variant asks for one pair at least, which only a clip of two frames can tell.
        at_least_one = motion.moves(magnitudes, frames=row["frames"], shorter_side=row["shorter_side"], least=1)
        assert at_least_one == (wanted and "1" in row["above"]), row


def test_the_top_magnitudes_of_a_flow_equal_the_original():
    for flow, wanted in zip(TENSORS["flows"].float(), VALUES["top_magnitudes"], strict=True):
        assert motion.top_magnitude(flow.permute(1, 2, 0).numpy()) == pytest.approx(wanted, abs=1e-5)


def test_the_totals_and_their_constants_equal_the_original():
    for row in VALUES["totals"]:
        score = vbench_score({name: 100 * value for name, value in row["dimensions"].items()})
        wanted = [100 * row[part] for part in ("quality", "semantic", "total")]
        assert [score.quality, score.semantic, score.total] == pytest.approx(wanted, abs=1e-5)
    constants = VALUES["constants"]
    for ours, names in ((QUALITY, constants["quality"]), (SEMANTIC, constants["semantic"])):
        assert ours == {
            name.replace(" ", "_"): (*constants["normalisation"][name].values(), constants["weights"][name])
            for name in names
        }
