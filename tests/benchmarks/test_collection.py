"""A collection that is killed at random moments ends with the bytes of one that was left alone."""

import json
import multiprocessing
import sys
from dataclasses import dataclass, replace

import pytest

from benchmarks import collection
from benchmarks.collection import CHEAP_METRICS, Work, content, start, survive


@dataclass
class Forked:
    """A collecting process that has imported everything before it was born: a kill costs no three seconds."""

    work: Work

    def __post_init__(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.collection", "pyarrow.parquet", "latent_rewards.metrics"])
        ready = context.Event()
        self.process = context.Process(target=self.work.run, args=(ready.set,))
        self.process.start()
        assert ready.wait(timeout=100)

    def kill(self):
        self.process.kill()

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join(timeout=100)
        return self.process.exitcode


def test_five_kills_change_no_byte(tmp_path):
    work = Work(60, batch_size=2, metrics=CHEAP_METRICS[:1], folder=str(tmp_path / "whole"))
    work.run()
    disturbed = replace(work, folder=str(tmp_path / "disturbed"))
    result = survive(lambda: Forked(disturbed), tmp_path / "disturbed", kills=5, parts=work.num_parts, seed=1)
    assert result["kills"] == 5 and result["exit_status"] == 0
    assert result["parts_after_kill"] == sorted(result["parts_after_kill"]) and result["parts_after_kill"][-1] > 0
    whole = content(tmp_path / "whole")
    assert len(whole) == 30 * 4 + 2 + 2 and content(tmp_path / "disturbed") == whole


def test_a_killed_interpreter_with_worker_and_cache_changes_no_byte_either(tmp_path):
    work = Work(12, batch_size=2, metrics=CHEAP_METRICS[:1], folder=str(tmp_path / "whole"))
    work.run()
    aided = replace(work, folder=str(tmp_path / "aided"), num_workers=1, cache_dir=str(tmp_path / "cache"))
    result = survive(lambda: start(aided), tmp_path / "aided", kills=1, parts=work.num_parts, seed=3)
    assert result["kills"] == 1 and result["exit_status"] == 0
    assert content(tmp_path / "aided") == content(tmp_path / "whole")


def test_survive_counts_only_kills_that_found_it_running(tmp_path):
    class Finished:
        def kill(self):
            pass

        def poll(self):
            return 0

        wait = poll

    result = survive(Finished, tmp_path, kills=3, parts=6, seed=0)
    assert result == {"kills": 0, "half_written": 0, "parts_after_kill": [], "exit_status": 0}


@pytest.mark.parametrize("status", [-9, 1])
def test_survive_tells_how_the_last_run_ended(tmp_path, status):
    class Ending:
        def kill(self):
            pass

        def poll(self):
            return status

        wait = poll

    assert survive(Ending, tmp_path, kills=2, parts=6, seed=0)["exit_status"] == status


@pytest.fixture
def sections(monkeypatch, tmp_path):
    """Sections that measure nothing; returns what runs the script with arguments, and reads what it wrote."""
    made = {name: lambda asked, scratch, name=name: {"of": name} for name in collection.SECTIONS}
    monkeypatch.setattr(collection, "SECTIONS", made)
    monkeypatch.setattr(collection, "provenance", lambda: {"commit": "new"})

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["collection", "--results", str(tmp_path / "told.json"), *arguments])
        collection.main()
        return json.loads((tmp_path / "told.json").read_text())

    return run


def test_sections_that_are_not_measured_again_keep_their_provenance(sections, tmp_path):
    old = {"metrics": ["x"], "memory": {"note": ""}, "cache": {"note": ""}, "commit": "old"}
    (tmp_path / "told.json").write_text(json.dumps(old))
    told = sections("--only", "cache", "--note", "again")
    assert told["memory"] == {"note": ""} and told["commit"] == "old"
    assert told["cache"] == {"note": "again", "of": "cache", "commit": "new"}
    whole = sections()
    assert set(whole) == {"metrics", *collection.SECTIONS} and whole["memory"]["commit"] == "new"


def test_a_section_there_is_none_of_is_refused(sections, tmp_path, capsys):
    (tmp_path / "told.json").write_text("{}")
    with pytest.raises(SystemExit):
        sections("--only", "wokers")
    assert "invalid choice: 'wokers'" in capsys.readouterr().err and (tmp_path / "told.json").read_text() == "{}"
