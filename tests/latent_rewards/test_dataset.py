"""The dataset keeps what it is given, exactly, and refuses what it must not mix."""

import math

import pytest
import torch

from latent_rewards.contracts import DataError, FingerprintMismatchError
from latent_rewards.dataset import DESCRIPTION, RewardDataset
from latent_rewards.training.checkpoint import CheckpointError, FolderInUseError, commit_directory


def make(count=6, *, seed=0, latent_space="vae-a", fingerprint="m@1", dtype=torch.float32):
    latents = torch.randn(count, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    rewards = {"score": torch.arange(float(count)) + seed, "motion": torch.full((count,), math.nan)}
    return RewardDataset.from_tensors(
        latents,
        [f"clip {i}" for i in range(count)],
        rewards,
        latent_space=latent_space,
        metric_fingerprints={"score": fingerprint},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_return_the_same_numbers(tmp_path, dtype):
    saved = make(dtype=dtype)
    saved.failures = {7: "ValueError: no"}
    saved.save(tmp_path / "data")
    loaded = RewardDataset.load(tmp_path / "data")
    assert loaded.dtype == dtype
    assert torch.equal(loaded.latents(), saved.latents())
    assert torch.equal(loaded.latents([4, 1, 4]), saved.latents()[[4, 1, 4]])
    assert loaded.prompts == saved.prompts and loaded.failures == saved.failures
    assert torch.equal(loaded.rewards["score"], saved.rewards["score"])
    assert loaded.rewards["motion"].isnan().all()
    assert (loaded.latent_space, loaded.metric_fingerprints) == ("vae-a", {"score": "m@1"})


def test_many_shards_read_like_one(tmp_path, monkeypatch):
    monkeypatch.setattr("latent_rewards.dataset._SHARD_BYTES", 2 * 2 * 3 * 4 * 4 * 4)
    make(5).save(tmp_path / "data")
    loaded = RewardDataset.load(tmp_path / "data")
    assert len(list((tmp_path / "data").glob("*.safetensors"))) == 3
    assert torch.equal(loaded.latents([4, 0, 3]), make(5).latents()[[4, 0, 3]])


def test_concatenate_and_select_are_views_in_order():
    first, second = make(3), make(4, seed=1)
    both = first.concatenate(second)
    assert len(both) == 7 and both.reward_names == ("score", "motion")
    chosen = both.select([6, 0, 3])
    assert torch.equal(chosen.latents(), torch.stack([second.latents()[3], first.latents()[0], second.latents()[0]]))
    assert chosen.prompts == ["clip 3", "clip 0", "clip 0"]
    assert chosen.rewards["score"].tolist() == [4.0, 0.0, 1.0]
    assert torch.equal(chosen.select([2]).latents(), second.latents([0]))


def test_joining_other_spaces_or_metrics_names_both():
    with pytest.raises(FingerprintMismatchError, match="'vae-a'.*'vae-b'"):
        make().concatenate(make(latent_space="vae-b"))
    with pytest.raises(FingerprintMismatchError, match="'m@1'.*'m@2'"):
        make().concatenate(make(fingerprint="m@2"))
    with pytest.raises(DataError, match="names must agree"):
        make().concatenate(
            RewardDataset.from_tensors(make().latents(), ["a"] * 6, {"x": torch.zeros(6)}, latent_space="vae-a")
        )
    with pytest.raises(DataError, match="bfloat16"):
        make().concatenate(make(dtype=torch.bfloat16))


def test_a_truncated_missing_or_altered_file_is_named(tmp_path):
    make().save(tmp_path / "data")
    shard = tmp_path / "data" / "latents-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="latents-00000.safetensors"):
        RewardDataset.load(tmp_path / "data")
    shard.unlink()
    with pytest.raises(CheckpointError, match="latents-00000.safetensors is missing"):
        RewardDataset.load(tmp_path / "data")
    shard.write_bytes(whole)
    RewardDataset.load(tmp_path / "data")
    with pytest.raises(CheckpointError, match=DESCRIPTION):
        RewardDataset.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 3, 4, 4)}, "5 dimensions"),
        ({"latents": torch.full((2, 1, 1, 2, 2), math.nan)}, r"latents\[0\] holds NaN"),
        ({"prompts": ["only one"]}, "1 prompts for 2 latents"),
        ({"rewards": {"r": torch.zeros(3)}}, "'r' has shape"),
        ({"rewards": {"r": torch.tensor([0.0, math.inf])}}, "infinite for sample 1"),
        ({"rewards": {}}, "rewards is empty"),
        ({"metric_fingerprints": {"q": "m"}}, "names \\['q'\\]"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    good = {"latents": torch.zeros(2, 1, 1, 2, 2), "prompts": ["a", {"prompt": "b"}], "rewards": {"r": torch.zeros(2)}}
    assert RewardDataset.from_tensors(**good).prompts == ["a", "b"]
    with pytest.raises(DataError, match=message):
        RewardDataset.from_tensors(**{**good, **change})


def test_the_table_opens_with_hugging_face_datasets_format(tmp_path):
    from pyarrow import parquet

    make(3).save(tmp_path / "data")
    table = parquet.read_table(tmp_path / "data" / "samples.parquet")
    assert table.column_names == ["prompt", "score", "motion"] and table.num_rows == 3


def test_rows_that_do_not_match_the_latents_are_found_though_every_hash_is_right(tmp_path):
    make(6).save(tmp_path / "six")
    make(5).save(tmp_path / "five")
    with commit_directory(tmp_path / "mixed") as folder:
        for name, source in (("samples.parquet", "six"), ("latents-00000.safetensors", "five"), (DESCRIPTION, "six")):
            (folder / name).write_bytes((tmp_path / source / name).read_bytes())
    with pytest.raises(CheckpointError, match="6 rows in samples.parquet and 5 latents"):
        RewardDataset.load(tmp_path / "mixed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_read_in_any_order_and_repeated(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("latent_rewards.dataset._SHARD_BYTES", 9 * 8 * dtype.itemsize)
    latents = torch.randn(30, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    RewardDataset.from_tensors(latents, ["p"] * 30, {"r": torch.arange(30.0)}).save(tmp_path / "d")
    stored = RewardDataset.load(tmp_path / "d")
    for rows in ([29, 3, 4, 5, 3, 0, 28, 10, 9], [5, 5], list(range(30)), list(range(29, -1, -1))):
        assert torch.equal(stored.latents(rows), latents[rows])
    assert stored.latents([]).shape == (0, 2, 1, 2, 2)


def test_a_shard_cut_short_after_it_was_opened_is_named(tmp_path):
    RewardDataset.from_tensors(torch.randn(6, 2, 1, 2, 2), ["p"] * 6, {"r": torch.rand(6)}).save(tmp_path / "d")
    stored = RewardDataset.load(tmp_path / "d")
    shard = tmp_path / "d" / "latents-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="latents-00000.safetensors was changed after it was opened"):
        stored.latents([4, 5])


def test_a_mask_chooses_and_what_is_neither_mask_nor_integers_is_refused():
    data = make(6)
    known = data.rewards["score"] > 2
    for mask in (known, known.tolist(), known.numpy()):
        chosen = data.select(mask)
        assert chosen.prompts == ["clip 3", "clip 4", "clip 5"] and chosen.rewards["score"].tolist() == [3, 4, 5]
        assert torch.equal(data.latents(mask), data.latents([3, 4, 5]))
    assert len(data.select([])) == 0 and len(data.select(torch.zeros(6, dtype=torch.bool))) == 0
    for wrong in (known[:3], torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])):
        with pytest.raises(DataError, match=r"integers \[M\] or a mask, bool \[6\]"):
            data.select(wrong)


def test_a_view_saved_where_it_reads_from_reads_what_it_wrote_and_others_are_told(tmp_path):
    make(6).save(tmp_path / "data")
    stored = RewardDataset.load(tmp_path / "data")
    view = stored.select([5, 3, 1, 0, 2, 4])  # a file of the same size
    before = view.latents()
    view.save(tmp_path / "data")
    assert torch.equal(view.latents(), before) and torch.equal(view.latents([1]), before[1:2])
    assert torch.equal(RewardDataset.load(tmp_path / "data").latents(), before)
    with pytest.raises(CheckpointError, match="changed after it was opened; restore it, or load the dataset again"):
        stored.latents()


def test_a_reward_that_would_be_a_second_column_of_prompts_is_refused():
    with pytest.raises(DataError, match="cannot be named 'prompt'"):
        RewardDataset.from_tensors(torch.zeros(2, 1, 1, 1, 1), ["a", "b"], {"prompt": torch.zeros(2)})


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "runs" / "student").mkdir(parents=True)
    with pytest.raises(FolderInUseError, match="runs exists and was not written by this library .*dataset.json"):
        make(6).save(tmp_path / "runs")
    assert (tmp_path / "runs" / "student").is_dir()
