"""The benchmark of memory measures a training on what it wrote."""

import torch

from benchmarks.proxy_memory import (
    ON_DEMAND,
    SHAPE,
    WHOLE,
    Work,
    compare,
    measure,
    random_rows_per_second,
    write_dataset,
)
from latent_rewards.dataset import RewardDataset


def test_the_collection_is_written_in_shards_and_a_training_on_it_is_measured(tmp_path):
    write_dataset(tmp_path, 230, shard_rows=100)
    dataset = RewardDataset.load(tmp_path)
    assert len(dataset) == 230 and dataset.latent_shape == SHAPE and dataset.dtype == torch.bfloat16
    assert len(list(tmp_path.glob("part-*"))) == 3 and len(set(dataset.prompts)) == 29
    assert not torch.equal(dataset.latents([0]), dataset.latents([100]))
    level = dataset.latents()[:, 0].float().mean(dim=(1, 2, 3))
    assert float((level - dataset.rewards["level"]).std()) < 0.12
    assert random_rows_per_second(dataset, batches=2) > 0
    work = Work(str(tmp_path), 0, num_updates=40)
    here, child = work.run(), measure(work)
    assert child["spearman"] == here["spearman"] > 0.5
    # This process has held more than one that has only trained.
    assert 50 < child["peak_mib_before_training"] <= child["peak_mib"] < here["peak_mib"] + 200


def test_the_last_peak_is_compared_with_the_first(tmp_path, monkeypatch):
    asked = []

    def measured(work):
        asked.append((len(RewardDataset.load(work.folder)), work.in_memory_mib, work.num_updates))
        return {"peak_mib": 100.0 * asked[-1][0] / 160 * (1 if work.in_memory_mib == ON_DEMAND else 2)}

    monkeypatch.setattr("benchmarks.proxy_memory.measure", measured)
    result = compare([160, 200], tmp_path, 7)
    assert asked == [(160, ON_DEMAND, 7), (200, ON_DEMAND, 7), (160, WHOLE, 7), (200, WHOLE, 7)]
    assert result["on_demand"] == {"peak_mib": [100.0, 125.0], "last_over_first_peak": 1.25}
    assert result["as_a_whole"]["peak_mib"] == [200.0, 250.0]
    assert result["latents_mib"] == [160 * 1536 / 2**20, 200 * 1536 / 2**20]
