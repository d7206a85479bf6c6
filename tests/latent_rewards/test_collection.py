"""A collection belongs to one run, is continued by the next, and is the same whoever made its parts."""

import fcntl
import json
import os
import shutil
import warnings

import pytest
import torch

from latent_rewards.collect import collect_rewards
from latent_rewards.collection import GIVE_UP_AFTER, Collection
from latent_rewards.contracts import ConfigError, MetricError
from latent_rewards.dataset import RewardDataset
from latent_rewards.metrics import create_metric
from latent_rewards.oracle import MetricOracle
from latent_rewards.training.checkpoint import CheckpointError


def collected(toys, folder=None, metric=None, **settings):
    oracle = MetricOracle(toys.Codec(), {"level": metric or "toys_of_tests:level"}, chunk_size=2)
    settings = {"num_samples": 20, "batch_size": 2, "num_steps": 2, "seed": 5, "progress": False, **settings}
    return collect_rewards(toys.LinearPolicy(), toys.PROMPTS, oracle, output_dir=folder, **settings)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def part(count=2, level=0.0):
    return RewardDataset.from_tensors(torch.full((count, 1, 1, 2, 2), level), ["p"] * count, {"r": torch.ones(count)})


@pytest.fixture
def limit(toys):
    """A brightness that both samples of one part exceed, and one or more of others."""
    levels = collected(toys).rewards["level"].view(10, 2)
    return float(levels.amin(dim=1).sort().values[-2])


def test_what_a_killed_run_was_writing_is_removed(toys, tmp_path):
    collected(toys, tmp_path / "whole")
    (tmp_path / "broken" / ".tmp-part-000003-0badcafe").mkdir(parents=True)
    (tmp_path / "broken" / ".tmp-part-000003-0badcafe" / "latents-00000.safetensors").write_bytes(b"half")
    (tmp_path / "broken" / ".tmp-failed-rank-1").touch()
    collected(toys, tmp_path / "broken")
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


def test_what_is_no_collection_is_left_alone(toys, tmp_path):
    for name in ("failed-experiments", ".tmp-mine"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"mine holds '.*' and is no collection of samples; give a new folder"):
        collected(toys, tmp_path / "mine")
    assert {entry.name for entry in (tmp_path / "mine").iterdir()} == {"failed-experiments", ".tmp-mine"}
    (tmp_path / "run" / "settings").mkdir(parents=True)
    (tmp_path / "run" / "settings" / "settings.json").write_text('{"teacher": {}, "student": {}}')
    with pytest.raises(ConfigError, match="run holds 'settings' and is no collection"):
        collected(toys, tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file and is no collection"):
        collected(toys, tmp_path / "file")
    collected(toys, tmp_path / "ours")
    (tmp_path / "ours" / "failed-list.txt").write_text("what the user adds")
    shutil.rmtree(tmp_path / "ours" / "complete")
    collected(toys, tmp_path / "ours")
    assert (tmp_path / "ours" / "failed-list.txt").is_file()


def test_parts_that_failed_are_tried_again_until_the_collection_is_complete(toys, tmp_path, limit):
    strict = create_metric("toys_of_tests:level", limit=limit)
    with pytest.warns(UserWarning, match="samples could not be scored"):
        kept = collected(toys, tmp_path / "a", strict)
    (failed,) = (tmp_path / "a").glob("failed-*")
    assert not (tmp_path / "a" / failed.name.replace("failed", "part")).exists()
    assert RewardDataset.load(tmp_path / "a").failures == kept.failures
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collected(toys, tmp_path / "a", strict).failures == kept.failures  # complete: nothing is tried again
    before = content(tmp_path / "a")
    for name in ("parts.json", "manifest.json"):
        (tmp_path / "a" / "complete" / name).unlink()
    (tmp_path / "a" / "complete").rmdir()
    with pytest.warns(UserWarning, match="samples could not be scored"):
        collected(toys, tmp_path / "a", strict)
    assert content(tmp_path / "a") == before


def test_it_gives_up_only_while_nothing_was_scored(tmp_path):
    def begin(indices):
        failed = (None, {index: "ValueError: no" for index in indices})
        return lambda: failed if indices[0] < firsts else (part(), {})

    settings = {"num_samples": 40, "batch_size": 2, "settings": {}, "progress": False}
    for root in (None, tmp_path / "a"):
        firsts = GIVE_UP_AFTER
        with pytest.raises(MetricError, match=f"all of the first {GIVE_UP_AFTER} samples failed; sample 0: ValueError"):
            Collection(**settings, root=root).run(begin)
        firsts = GIVE_UP_AFTER - 2
        with pytest.warns(UserWarning, match="14 of 40"):
            assert len(Collection(**settings, root=root).run(begin)) == 26


def test_what_has_nothing_to_score_is_no_reason_to_give_up(tmp_path):
    unusable = set()

    def begin(indices):
        unusable.update(index for index in indices if index < broken)
        failed = (None, {index: "OSError: no video" if index < broken else "ValueError: no" for index in indices})
        return lambda: failed if indices[0] < broken + firsts else (part(), {})

    def collection(root):
        return Collection(60, 2, {}, root=root, progress=False, unusable=unusable)

    broken = 20
    for root in (None, tmp_path / "a"):
        firsts = GIVE_UP_AFTER
        with pytest.raises(MetricError, match="all of the first 36 samples failed; sample 20: ValueError"):
            collection(root).run(begin)
        told = Collection(60, 2, {}, root=tmp_path / "a")  # what another rank makes of the parts
        firsts = GIVE_UP_AFTER - 2
        with pytest.warns(UserWarning, match="34 of 60"):
            assert len(collection(root).run(begin)) == 26
    assert all(told._outcome(number)[0] is None for number in range(17)) and told.unusable == set(range(20))


def test_later_failures_are_no_reason_to_give_up():
    def begin(indices):
        failed = (None, {index: "ValueError: no" for index in indices})
        return lambda: (part(), {}) if indices[0] == GIVE_UP_AFTER - 2 else failed

    with pytest.warns(UserWarning, match="38 of 40"):
        assert len(Collection(40, 2, {}, progress=False).run(begin)) == 2


def test_a_part_that_failed_and_then_succeeds_leaves_no_trace(tmp_path):
    def begin(indices):
        if indices[0] == stop:
            raise KeyboardInterrupt
        failed = (None, {index: "OSError: the judge is down" for index in indices})
        return lambda: failed if indices[0] == broken else (part(), {})

    stop, broken = 6, 2
    with pytest.raises(KeyboardInterrupt):
        Collection(8, 2, {}, root=tmp_path / "a", progress=False).run(begin)
    assert (tmp_path / "a" / "failed-000001").is_dir()
    stop = broken = None
    for name in ("a", "b"):
        assert Collection(8, 2, {}, root=tmp_path / name, progress=False).run(begin).failures == {}
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_parts_are_begun_ahead_and_kept_in_order(tmp_path):
    log = []

    def begin(indices):
        log.append(("begin", indices[0]))
        return lambda: log.append(("end", indices[0])) or (part(level=float(indices[0])), {})

    dataset = Collection(8, 2, {}, ahead=2, progress=False).run(begin)
    assert [what for what, _ in log[:4]] == ["begin"] * 3 + ["end"]
    assert [index for what, index in log if what == "end"] == [0, 2, 4, 6]
    assert dataset.latents()[:, 0, 0, 0, 0].tolist() == [0, 0, 2, 2, 4, 4, 6, 6]


def test_two_runs_cannot_collect_into_one_folder(tmp_path):
    def begin(indices):
        with pytest.raises(ConfigError, match="another run is collecting into"):
            Collection(2, 2, {}, root=tmp_path, progress=False).run(begin)
        return lambda: (part(), {})

    assert len(Collection(2, 2, {}, root=tmp_path, progress=False).run(begin)) == 2


def test_a_complete_collection_is_read_by_many_at_once(tmp_path):
    collect = Collection(2, 2, {"seed": 5}, root=tmp_path, progress=False).run
    collect(lambda indices: lambda: (part(), {}))
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # as another reader once did
        assert len(collect(None)) == 2
        with pytest.raises(ConfigError, match="another seed: 5 there, 6 now"):
            Collection(2, 2, {"seed": 6}, root=tmp_path, progress=False).run(None)
    finally:
        os.close(descriptor)


def test_a_part_of_another_collection_is_not_taken_for_ours(toys, tmp_path):
    collected(toys, tmp_path / "a")
    collected(toys, tmp_path / "b", seed=6)
    (tmp_path / "a" / "part-000004").rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="part-000004"):
        RewardDataset.load(tmp_path / "a")
    (tmp_path / "b" / "part-000004").rename(tmp_path / "a" / "part-000004")
    with pytest.raises(CheckpointError, match="part-000004 is not the part that the collection finished with"):
        RewardDataset.load(tmp_path / "a")


SCRIPT = """
import json, os, signal, sys, time, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
import toys_of_tests as toys
from latent_rewards.collect import collect_rewards
from latent_rewards.contracts import RankError
from latent_rewards.metrics import create_metric
from latent_rewards.oracle import MetricOracle

rank, root, limit = int(os.environ["RANK"]), Path(sys.argv[1]), float(sys.argv[2])
warnings.simplefilter("ignore")
told = {}

class Codec(toys.Codec):
    def __init__(self, end=None):
        super().__init__()
        self.end = end

    def decode(self, latents):
        if self.end is not None and len(self.batch_sizes) == 2 and rank == 1:
            self.end()
        return super().decode(latents)

def collect(name, metric="toys_of_tests:level", end=None, **settings):
    codec = Codec(end)
    settings = {"num_samples": 20, "batch_size": 2, "num_steps": 2, "seed": 5, "progress": False, **settings}
    oracle = MetricOracle(codec, {"level": metric}, chunk_size=2)
    dataset = collect_rewards(toys.LinearPolicy(), toys.PROMPTS, oracle, output_dir=root / name, **settings)
    told[name] = [len(codec.batch_sizes), len(dataset), sorted(dataset.failures)]
    (root / f"told-{rank}.json").write_text(json.dumps(told))

def interrupt():
    raise KeyboardInterrupt

collect("whole")
collect("failing", create_metric("toys_of_tests:level", limit=limit))
try:
    collect("resumed", end=interrupt)
except KeyboardInterrupt:
    told["interrupted"] = rank
except RankError as error:
    told["error"] = str(error)
collect("resumed")
collect("killed", end=lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.fixture(scope="module")
def launched(toys, toy_folder, tmp_path_factory, launch):
    """What two ranks left behind; the launch ends when rank 1 kills itself."""
    levels = collected(toys).rewards["level"].view(10, 2)
    limit = float(levels.amin(dim=1).sort().values[-2])
    root = tmp_path_factory.mktemp("ranks")
    (root / "script.py").write_text(SCRIPT)
    done = launch(root / "script.py", root, repr(limit), paths=[toy_folder])
    assert done.returncode != 0
    for rank in (0, 1):
        assert (root / f"told-{rank}.json").is_file(), done.stderr
    return root, limit, [json.loads((root / f"told-{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_share_the_work_and_end_with_the_bytes_of_one_process(toys, tmp_path, launched):
    root, limit, told = launched
    collected(toys, tmp_path / "whole")
    assert content(root / "whole") == content(tmp_path / "whole")
    assert told[0]["whole"] == told[1]["whole"] == [5, 20, []]
    with pytest.warns(UserWarning, match="could not be scored"):
        alone = collected(toys, tmp_path / "failing", create_metric("toys_of_tests:level", limit=limit))
    assert content(root / "failing") == content(tmp_path / "failing")
    assert told[0]["failing"][1:] == told[1]["failing"][1:] == [len(alone), sorted(alone.failures)]


def test_a_rank_that_fails_is_named_and_the_next_launch_continues(launched):
    root, _, told = launched
    assert told[1]["interrupted"] == 1
    assert "rank 1 failed" in told[0]["error"] and "run again" in told[0]["error"]
    # Two of rank 1's parts and all five of rank 0's were there; the three others were shared anew.
    assert [ranks["resumed"][0] for ranks in told] == [2, 1]
    assert content(root / "resumed") == content(root / "whole")


def test_a_killed_rank_leaves_a_folder_that_one_process_finishes(toys, launched):
    root, _, told = launched
    assert "killed" not in told[0] and "killed" not in told[1]
    with pytest.raises(CheckpointError, match="run collect_rewards again"):
        RewardDataset.load(root / "killed")
    assert len(list((root / "killed").glob("part-*"))) >= 2
    collected(toys, root / "killed")
    assert content(root / "killed") == content(root / "whole")


def test_a_run_of_which_nothing_was_kept_is_begun_anew_with_other_settings(toys, tmp_path):
    impossible = create_metric("toys_of_tests:level", limit=-1e9)
    with pytest.raises(MetricError, match="samples failed"):
        collected(toys, tmp_path / "a", impossible)
    collected(toys, tmp_path / "a")
    assert content(tmp_path / "a") == content_of_new(toys, tmp_path / "b")
    with pytest.raises(ConfigError, match="another metrics"):
        collected(toys, tmp_path / "a", impossible)


def test_an_unfinished_collection_of_which_a_part_was_kept_keeps_its_settings(toys, tmp_path):
    collected(toys, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "complete")
    for part_folder in sorted((tmp_path / "a").glob("part-*"))[1:]:
        shutil.rmtree(part_folder)
    with pytest.raises(ConfigError, match="another seed: 5 there, 6 now"):
        collected(toys, tmp_path / "a", seed=6)


def content_of_new(toys, folder):
    collected(toys, folder)
    return content(folder)
