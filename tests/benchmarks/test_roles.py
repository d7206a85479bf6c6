"""Every way makes the update it names; what is measured is compared round by round and like for like."""

import copy
import json
import sys
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import roles
from benchmarks.fastgen_peer import PeerError
from benchmarks.roles import (
    SIZES,
    TINIEST,
    WAYS,
    Run,
    Size,
    attempt,
    bars,
    expected_mib,
    main,
    measure_all,
    peer_name,
    ratios,
    section_of,
    take_turns,
)
from distillation.roles import Role
from latent_rewards.contracts import ConfigError
from latent_rewards.training.devices import DeviceError

OURS = [name for name, way in WAYS.items() if way.kind != "peer"]


def row(way, size, number, memory, seconds, cpu_seconds=1.0):
    return {
        "way": way,
        "size": size,
        "round": number,
        "memory": memory,
        "seconds": [seconds],
        "cpu_seconds": [cpu_seconds],
    }


@pytest.mark.parametrize("way", OURS)
def test_the_trainers_own_stage_plays_the_roles_of_a_way(way):
    run = Run(way, "tiniest", rank=3, fake_updates=2)
    stage = run._stage(TINIEST, WAYS[way], TINIEST.build)
    networks = {"student": stage.student.denoiser, "fake_score": stage.fake_score, "target": stage.ema.module}
    shared = WAYS[way].kind != "full"
    assert all(isinstance(network, Role) == shared for network in networks.values())
    held = [id(p) for network in (stage.teacher, *networks.values()) for p in network.parameters()]
    whole = len(list(TINIEST.build().parameters()))
    assert len(set(held)) == (len(list(stage.teacher.parameters())) if shared else 4 * whole)
    trained = stage.teacher if shared else networks["student"]
    assert trained.transformer.is_gradient_checkpointing == WAYS[way].checkpointed
    before = {name: copy.deepcopy(list(network.parameters())) for name, network in networks.items()}
    base = {name: p.clone() for name, p in stage.teacher.named_parameters() if "lora" not in name}
    stage.step(0)
    assert all(torch.equal(p, dict(stage.teacher.named_parameters())[name]) for name, p in base.items())
    for name, network in networks.items():
        pairs = zip(before[name], network.parameters(), strict=True)
        assert any(not torch.equal(old, new) for old, new in pairs), name


@pytest.mark.parametrize("way", OURS)
def test_an_update_calls_as_many_networks_in_every_way_of_ours(way):
    told = Run(way, "tiniest", num_steps=2, rank=3, fake_updates=3).do()
    # The student, the teacher twice for its guidance, the fake score; then it is trained, on fresh samples but once.
    assert told["calls"] == 4 + 3 + 2
    assert len(told["seconds"]) == len(told["cpu_seconds"]) == 2 and min(told["seconds"]) > 0


def test_a_base_in_bf16_is_built_in_it_but_for_what_diffusers_keeps(monkeypatch):
    built = {}

    def stage(run, size, way, build):
        built[run.way] = {name: parameter.dtype for name, parameter in build().named_parameters()}
        return SimpleNamespace(step=None)

    monkeypatch.setattr(Run, "_stage", stage)
    for way in OURS:
        Run(way, "tiniest")._updates(TINIEST, [])
    for way, dtypes in built.items():
        wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        kept = {name for name in dtypes if any(part in name for part in ("time_embedder", "scale_shift", "norm2"))}
        assert wide == (kept if WAYS[way].kind == "narrow" else set(dtypes)) and kept < set(dtypes)
        assert set(dtypes.values()) <= {torch.float32, torch.bfloat16}


def test_the_memory_of_networks_is_seen(monkeypatch):
    monkeypatch.setitem(SIZES, "broad", Size(4, 4, 64, 1024, (2, 8), (4, 2, 4, 4)))
    settings = {"rank": 2, "fake_updates": 1}
    full, shared = (Run(way, "broad", **settings).do()["memory"] for way in ("full", "shared"))
    least = expected_mib(WAYS["full"], SIZES["broad"])
    assert full > 0.7 * least > 100
    assert shared < full / 3


def test_weights_gradients_and_states_are_counted():
    weights = sum(p.numel() for p in TINIEST.build().parameters()) * 4 / 2**20
    assert expected_mib(WAYS["shared"], TINIEST) == weights
    assert expected_mib(WAYS["full, checkpointed"], TINIEST) == expected_mib(WAYS["peer"], TINIEST) == 9 * weights
    wan = expected_mib(WAYS["shared"], SIZES["wan-1.3b"]) / 4 * 2**20
    assert 1.41e9 < wan < 1.43e9  # what the published checkpoint has


def test_sizes_tell_their_tokens_and_their_weights_are_those_of_a_seed():
    assert SIZES["wan-1.3b"].tokens == 6 * 30 * 52 and SIZES["digits"].tokens == 5 * 4 * 4
    state = torch.get_rng_state()
    one, two = (list(TINIEST.build().parameters()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    texts = TINIEST.texts(["a clip", "", "a clip"]).embeddings
    assert texts.shape == (3, 2, 8) and torch.equal(texts[0], texts[2]) and not torch.equal(texts[0], texts[1])


def test_the_moving_digits_size_is_that_of_its_teacher():
    config = json.loads(Path("recipes/moving_digits/weights/teacher/transformer/config.json").read_text())
    size = SIZES["digits"]
    asked = size.num_layers, size.num_heads, size.head_dim, size.ffn_dim, size.text[1], size.latents[0]
    names = "num_layers num_attention_heads attention_head_dim ffn_dim text_dim in_channels"
    assert asked == tuple(config[name] for name in names.split())


def test_ways_take_turns_and_every_other_round_goes_backwards():
    kept = []
    rows = take_turns(
        ["a", "b"], ["x", "y"], 2, lambda way, size: {"way": way, "size": size}, lambda r: kept.append(len(r))
    )
    assert [(r["size"], r["round"], r["way"]) for r in rows[:4]] == [
        ("a", 0, "x"),
        ("a", 0, "y"),
        ("a", 1, "y"),
        ("a", 1, "x"),
    ]
    assert kept == list(range(1, 9))


def test_ratios_are_medians_over_rounds_that_measured_both():
    rows = [
        row("full", "wide", 0, 100.0, 1.0),
        row("full", "wide", 1, 100.0, 10.0),
        row("full", "wide", 2, 100.0, 2.0),
        row("shared", "wide", 0, 30.0, 2.0, 4.0),
        row("shared", "wide", 1, 20.0, 30.0, 4.0),
        row("shared", "wide", 2, 10.0, 8.0, 4.0),
        row("peer", "wide", 1, 40.0, 60.0),
        {"way": "full", "size": "wan-1.3b", "round": 0, "out_of_memory": "x"},
    ]
    wide, large = ratios(rows)
    assert wide["over"]["shared"]["full"] == {"memory": 0.2, "seconds": 3.0, "cpu_seconds": 4.0}
    assert wide["over"]["shared"]["peer"] == {"memory": 0.5, "seconds": 0.5, "cpu_seconds": 4.0}
    assert wide["over"]["full"]["shared"]["seconds"] == pytest.approx(1 / 3)
    assert large == {"size": "wan-1.3b", "over": {}}


def test_bars_are_read_at_the_size_of_most_weights_and_like_for_like():
    rows = [
        row("full", "narrow", 0, 90.0, 1.0),
        row("shared", "narrow", 0, 29.9, 2.0),
        row("peer", "narrow", 0, 90.0, 1.9),
        row("full, checkpointed", "narrow", 0, 90.0, 1.0),
        row("shared, checkpointed", "narrow", 0, 30.1, 2.0),
        row("full", "tiniest", 0, 90.0, 1.0),
        row("shared", "tiniest", 0, 90.0, 2.0),
    ]
    told = bars(ratios(rows))
    assert told["size"] == "narrow"
    plain, checkpointed = told["shared"], told["shared, checkpointed"]
    assert plain["memory_kept"] is True and plain["seconds_kept"] is False
    assert plain["seconds_over_peer"] == 2.0 / 1.9
    assert checkpointed["memory_kept"] is False and checkpointed["seconds_kept"] is None


def test_one_of_which_too_much_is_expected_is_left_out_and_one_that_fails_is_a_row(monkeypatch):
    told = attempt(Run("full", "wan-1.3b"), 1000.0)
    assert told["left_out"].endswith("MiB of weights and states expected, 1000 free for them") and "seconds" not in told

    def fail(module, name, task):
        raise RuntimeError(f"{name} ended with status 1")

    monkeypatch.setattr(roles, "run_apart", fail)
    assert attempt(Run("full", "tiniest"), 1000.0)["failed"] == "full ended with status 1"


def test_a_run_is_told_on_the_command_line_and_tells_on_its_last_line(monkeypatch, capsys):
    def here(module, name, task):
        assert (module, name) == ("benchmarks.roles", "shared")
        monkeypatch.setattr(sys, "argv", ["roles", "--run", json.dumps(task)])
        main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(roles, "run_apart", here)
    told = attempt(Run("shared", "tiniest", rank=2, fake_updates=1), 1e6)
    assert told["way"] == "shared" and told["calls"] == 5 and len(told["seconds"]) == 1


def test_an_accelerator_that_has_too_little_is_a_row(monkeypatch):
    def updates(run, size, calls):
        def update(step):
            if size is not TINIEST:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 1 GiB")

        return update

    monkeypatch.setattr(Run, "_updates", updates)
    assert Run("full", "digits").do() == {"out_of_memory": "CUDA out of memory. Tried to allocate 9 GiB"}


def wanted(folder, **different):
    options = {"device": "cpu", "precision": "no", "sizes": ["tiniest"], "only": list(WAYS), "repeats": 1, "steps": 1}
    options |= {"rank": 4, "fake_updates": 2, "peer": None, "note": "n", "results": folder / "roles.json"}
    return Namespace(**options | different)


def test_without_a_checkout_the_peer_is_left_out_and_a_folder_without_one_is_refused(tmp_path, monkeypatch, capsys):
    measured = []

    def told(run, free):
        measured.append(run)
        return row(run.way, run.size, 0, 1.0, 1.0)

    monkeypatch.setattr(roles, "attempt", told)
    asked = partial(wanted, tmp_path)
    measure_all(asked())
    assert [run.way for run in measured] == [way for way in OURS if WAYS[way].kind != "narrow"]
    assert {(run.rank, run.fake_updates, run.num_steps, run.peer) for run in measured} == {(4, 2, 1, None)}
    assert "the peer is left out: name a checkout of NVlabs/FastGen with --peer" in capsys.readouterr().out
    with pytest.raises(PeerError, match="is no checkout of FastGen"):
        measure_all(asked(peer=tmp_path))
    measured.clear()
    measure_all(asked(precision="bf16"))
    assert [run.way for run in measured] == OURS, "a base in bf16 computes in it"


def test_a_copy_within_another_repository_is_not_told_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(roles, "commit_of", lambda folder: "1234567")  # of the repository above
    assert peer_name(tmp_path) == "NVlabs/FastGen of an unknown commit"
    (tmp_path / ".git").mkdir()
    assert peer_name(tmp_path) == "NVlabs/FastGen 1234567"


def test_no_result_takes_the_place_of_one_that_was_measured_otherwise(tmp_path):
    usual = {"sizes": None, "rank": 16, "fake_updates": 5}
    different = {
        "cpu": {},
        "cpu_bf16": {"precision": "bf16"},
        "cpu_tiniest": {"sizes": ["tiniest"]},
        "cpu_shared, checkpointed": {"only": ["shared, checkpointed"]},
        "cpu_2 fake updates": {"fake_updates": 2},
        "cpu_rank 4": {"rank": 4},
        "cpu_with the peer": {"peer": tmp_path},
        "cuda_bf16_wan-1.3b_2 fake updates": {
            "device": "cuda",
            "precision": "bf16",
            "sizes": ["wan-1.3b"],
            "fake_updates": 2,
        },
    }
    assert [section_of(wanted(tmp_path, **usual | asked)) for asked in different.values()] == list(different)


def test_rows_are_stored_with_ratios_bars_and_what_they_share(tmp_path, monkeypatch):
    rows = [row("full", "tiniest", 0, 90.0, 1.0), row("shared", "tiniest", 0, 20.0, 2.0)]
    monkeypatch.setattr(roles, "take_turns", lambda sizes, ways, rounds, measure, keep: keep(rows))
    measure_all(wanted(tmp_path))
    measure_all(wanted(tmp_path, rank=5))
    told = json.loads((tmp_path / "roles.json").read_text())
    assert list(told) == ["cpu_tiniest_2 fake updates_rank 4", "cpu_tiniest_2 fake updates_rank 5"]
    first = told["cpu_tiniest_2 fake updates_rank 4"]
    assert first["rows"] == rows and first["bars"]["shared"]["memory_kept"] is True and first["rank"] == 4
    size = json.loads(json.dumps(asdict(TINIEST)))
    assert first["sizes"]["tiniest"] == {**size, "tokens": 8} and first["versions"] and first["device_name"] == "cpu"


def test_a_broken_file_or_an_absent_device_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(roles, "take_turns", lambda *_: pytest.fail("measured"))
    with pytest.raises(DeviceError, match="cuda:7"):
        measure_all(wanted(tmp_path, device="cuda:7"))
    (tmp_path / "roles.json").write_text('{"cpu": {"rows"')
    with pytest.raises(ConfigError, match=r"roles\.json cannot be read"):
        measure_all(wanted(tmp_path))


def test_calls_of_copies_are_counted_too():
    calls = []
    Run("full", "tiniest", fake_updates=1)._updates(TINIEST, calls)(0)
    # Beside those of an update, the first one measures the fake score's lag.
    assert len(calls) == 4 + 1 + 1
