"""Collecting is resumable, decodes in bounded chunks, and accounts for every failure."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latent_rewards.collect import collect_rewards
from latent_rewards.collection import GIVE_UP_AFTER
from latent_rewards.contracts import ConfigError, DataError, MetricError
from latent_rewards.dataset import RewardDataset
from latent_rewards.metrics import create_metric
from latent_rewards.oracle import MetricOracle
from latent_rewards.training.checkpoint import CheckpointError, commit_directory


class Rows:
    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def index_select(self, index):
        return Rows(self.values[index])

    def to(self, device):
        return self


class LinearPolicy(nn.Module):
    """mean = gain x + length of the prompt; std 0.5, and 0 at the last step."""

    def __init__(self, gain=0.5):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def encode(self, prompts):
        return Rows(torch.tensor([float(len(p if isinstance(p, str) else p["prompt"])) for p in prompts]))

    def latent_shape(self, condition):
        return (2, 1, 2, 2)

    def timesteps(self, num_steps):
        return [1 - k / num_steps for k in range(num_steps)]

    def transition(self, latents, step, num_steps, condition):
        mean = self.gain * latents + condition.values[:, None, None, None, None]
        return mean, torch.tensor(0.5 if step + 1 < num_steps else 0.0)


class Codec:
    fingerprint = "toy-codec"

    def __init__(self):
        self.batch_sizes = []

    def decode(self, latents):
        self.batch_sizes.append(len(latents))
        return latents.mean(1, keepdim=True).expand(-1, 3, -1, -1, -1).transpose(1, 2)


class Mean:
    """The mean pixel; raises on a call whose videos' mean lies above ``limit``, or at call number ``crash_at``."""

    def __init__(self, name="mean", limit=float("inf"), crash_at=None, fingerprint="mean@1"):
        self.name, self.limit, self.crash_at, self.fingerprint = name, limit, crash_at, fingerprint
        self.calls = 0

    def __call__(self, videos, prompts=None):
        self.calls += 1
        if self.calls == self.crash_at:
            raise KeyboardInterrupt
        values = videos.flatten(1).mean(1)
        if bool((values > self.limit).any()):
            raise ValueError("too bright")
        return values


PROMPTS = ["a", {"prompt": "bb"}, "ccc"]


def collect(output_dir=None, *, metric=None, policy=None, codec=None, **settings):
    oracle = MetricOracle(codec or Codec(), [metric or Mean()])
    arguments = {"num_samples": 10, "batch_size": 3, "num_steps": 2, "seed": 5, "progress": False, **settings}
    prompts = arguments.pop("prompts", PROMPTS)
    return collect_rewards(policy or LinearPolicy(), prompts, oracle, output_dir=output_dir, **arguments)


def same(a, b):
    return (
        torch.equal(a.latents(), b.latents())
        and a.prompts == b.prompts
        and list(a.rewards) == list(b.rewards)
        and all(torch.equal(values, b.rewards[name]) for name, values in a.rewards.items())
        and a.failures == b.failures
    )


def test_samples_do_not_depend_on_batches_or_storage(tmp_path):
    reference = collect(batch_size=10)
    stored = collect(tmp_path / "a")
    assert same(collect(), reference) and same(stored, reference)
    assert same(RewardDataset.load(tmp_path / "a"), reference)
    assert reference.prompts[:4] == ["a", "bb", "ccc", "a"]
    assert not torch.equal(collect(seed=6).latents(), reference.latents())
    latents = reference.latents()
    torch.testing.assert_close(reference.rewards["mean"], latents.flatten(1).mean(1))
    assert reference.metric_fingerprints == {"mean": "mean@1"} and reference.latent_space == "toy-codec"


def test_a_killed_collection_continues_and_ends_the_same(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "a", metric=Mean(crash_at=3))
    with pytest.raises(CheckpointError, match="run collect_rewards again"):
        RewardDataset.load(tmp_path / "a")
    metric = Mean()
    resumed = collect(tmp_path / "a", metric=metric)
    assert metric.calls == 2
    assert same(resumed, collect())
    again = Mean()
    assert same(collect(tmp_path / "a", metric=again), resumed) and again.calls == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "another seed: 5 there, 6 now"),
        ({"prompts": ["a", "bb", "dd"]}, "another prompts: entry 2 is 'ccc' there, 'dd' now"),
        ({"prompts": ["a"]}, "another prompts: 3 entries there, 1 entries now"),
        ({"metric": Mean(fingerprint="mean@2")}, "another metrics: .*mean@1.* there, .*mean@2.* now"),
        ({"policy": LinearPolicy(0.25)}, "another policy"),
        ({"num_steps": 3}, "another num_steps"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, change, message):
    collect(tmp_path / "a")
    with pytest.raises(ConfigError, match=message):
        collect(tmp_path / "a", **change)


def above(threshold):
    def score(videos):
        return (videos > threshold).float().mean(dim=(1, 2, 3, 4))

    return score


class Bounded(Codec):
    def decode(self, latents):
        return super().decode(latents).sigmoid()


def test_a_metric_that_holds_another_value_is_another_metric(tmp_path):
    first = collect(tmp_path / "a", metric=create_metric(above(0.2)), codec=Bounded())
    assert same(collect(tmp_path / "a", metric=create_metric(above(0.2)), codec=Bounded()), first)
    with pytest.raises(ConfigError, match="another metrics"):
        collect(tmp_path / "a", metric=create_metric(above(0.8)), codec=Bounded())
    latents = torch.randn(2, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for threshold in (0.2, 0.6):
        metric = create_metric(above(threshold))
        assert not metric.origin, "no import brings back what a function captured"
        oracle = MetricOracle(Bounded(), {"above": metric}, cache_dir=tmp_path / "cache")
        assert torch.equal(oracle(latents, ["a"] * 2)["above"], metric(Bounded().decode(latents)))


class Preferring(LinearPolicy):
    """As a policy that was told the weights of two rewards, which are no parameter of it."""

    def __init__(self, *preference):
        super().__init__()
        self.preference = torch.tensor(preference)


def test_a_policy_of_other_preferences_is_another_policy(tmp_path):
    first = collect(tmp_path / "a", policy=Preferring(0.0, 1.0))
    assert same(collect(tmp_path / "a", policy=Preferring(0.0, 1.0)), first)
    with pytest.raises(ConfigError, match="another policy"):
        collect(tmp_path / "a", policy=Preferring(1.0, 0.0))


class Small(LinearPolicy):
    def latent_shape(self, condition):
        return (2, 1, 1, 1)


def test_other_images_or_another_size_in_the_same_folder_are_refused(tmp_path):
    def asked(grey, **more):
        image = Image.fromarray(np.full((2, 2, 3), grey, dtype=np.uint8))
        return [{"prompt": "a cat", "image": image, "mask": torch.full((), grey), "style": "oil", **more}]

    first = collect(tmp_path / "a", prompts=asked(50))
    assert same(collect(tmp_path / "a", prompts=asked(50)), first)
    for other in (asked(200), asked(50, style="ink"), asked(50, mask=torch.ones(())), asked(50, tail=object())):
        with pytest.raises(ConfigError, match="another prompts_beside_text: entry 0 is .*image.* there, .*image.* now"):
            collect(tmp_path / "a", prompts=other)
    odd = asked(50, tail=object())
    assert same(collect(tmp_path / "b", prompts=odd), collect(tmp_path / "b", prompts=asked(50, tail=object())))
    with pytest.raises(ConfigError, match="another latent_shape: entry 2 is 2 there, 1 now"):
        collect(tmp_path / "a", prompts=asked(50), policy=Small())


def test_a_collection_of_an_earlier_version_goes_on(tmp_path):
    first = collect(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "settings" / "settings.json").read_text())
    del settings["prompts_beside_text"], settings["latent_shape"]
    with commit_directory(tmp_path / "a" / "settings") as folder:
        (folder / "settings.json").write_text(json.dumps(settings))
    assert same(collect(tmp_path / "a"), first)


def test_failing_samples_are_recorded_and_left_out(tmp_path):
    reference = collect()
    limit = float(reference.rewards["mean"].sort().values[-3])
    bright = (reference.rewards["mean"] > limit).nonzero()[:, 0].tolist()
    with pytest.warns(UserWarning, match="2 of 10 samples could not be scored.*too bright"):
        kept = collect(tmp_path / "a", metric=Mean(limit=limit))
    assert sorted(kept.failures) == bright and len(kept) == 8
    assert same(RewardDataset.load(tmp_path / "a"), kept)
    others = [i for i in range(10) if i not in bright]
    assert torch.equal(kept.latents(), reference.latents(others))


def test_when_everything_fails_it_stops_early():
    metric = Mean(limit=-1e9)
    with warnings.catch_warnings(), pytest.raises(MetricError, match="sample 0: ValueError: too bright"):
        warnings.simplefilter("error")
        collect(metric=metric, num_samples=1000, batch_size=8)
    assert metric.calls <= GIVE_UP_AFTER + 2
    with pytest.raises(MetricError, match="all of the first 4 samples"):
        collect(metric=Mean(limit=-1e9), num_samples=4)


def test_a_damaged_part_is_named(tmp_path):
    collect(tmp_path / "a")
    shard = tmp_path / "a" / "part-000001" / "latents-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="part-000001/latents-00000.safetensors"):
        collect(tmp_path / "a")


def test_counts_are_checked():
    with pytest.raises(ConfigError, match="num_samples must be at least 1"):
        collect(num_samples=0)
    with pytest.raises(DataError, match="no prompts"):
        collect(prompts=[])
