"""Checkpoints change no gradient; ways are foretold, left out and compared; a run in an interpreter of its own."""

import json
import sys
from argparse import Namespace

import pytest
import torch

from benchmarks import reward_path
from benchmarks.checkpointed_decoder import CheckpointedWan
from benchmarks.proxy_speed import prepare, read_size
from benchmarks.reward_path import (
    WAYS,
    Run,
    attempt,
    forecast,
    gradient,
    grow,
    measure,
    random_vae,
    ratios,
    read_pixels,
)
from distillation.families.wan import WanCodec
from latent_rewards.contracts import ConfigError
from latent_rewards.metrics.quality import sharpness
from latent_rewards.training.devices import DeviceError

TINY = {"base_dim": 8, "num_res_blocks": 1}


def gradient_of(vae, latents):
    codec = WanCodec(vae)
    return gradient(lambda x: -sharpness(codec.decode(x)).mean(), latents)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("segment", [1, 2, 5, None])
def test_checkpoints_change_no_gradient(segment, blocks):
    vae = random_vae(**TINY)
    latents = torch.randn(2, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = gradient_of(vae, latents)
    assert plain[:, :, 4].abs().max() > 0
    torch.testing.assert_close(
        gradient_of(CheckpointedWan(vae, segment=segment, blocks=blocks), latents), plain, rtol=0, atol=0
    )


def test_checkpoints_keep_less_between_forward_and_backward():
    vae, latents = random_vae(**TINY), torch.randn(1, 16, 5, 4, 4)

    def kept(model):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            WanCodec(model).decode(latents.clone().requires_grad_())
        return sum(sizes.values())

    assert kept(CheckpointedWan(vae)) < kept(vae) / 2


def row(way, size, seconds, weights, work):
    return {"way": way, "size": size, "seconds": seconds, "weights": weights, "work": work, "peak": 0.0}


def test_pixels_are_those_that_a_way_decodes():
    size = (9, 8, 16)
    read = {way: read_pixels(WAYS[way], size) // 128 for way in WAYS}
    assert read["decoder"] == read["proxy"] == 9
    assert read["decoder, 1 latent frame"] == 1 and read["decoder, 2 latent frames"] == 5


def test_a_forecast_grows_with_pixels_and_keeps_the_weights():
    before = row("decoder", (5, 8, 8), [1.0, 9.0, 2.0], 100.0, 50.0)
    assert forecast(before, WAYS["decoder"], (10, 16, 8)) == {"memory": 300.0, "seconds": 8.0}
    assert forecast(before, WAYS["decoder, 1 latent frame"], (9, 16, 8)) == {"memory": 200.0, "seconds": 4.0}


@pytest.mark.parametrize(
    ("free", "limit", "said"),
    [
        (299.0, 9.0, {"out_of_memory": "300 MiB expected, 299 free for it"}),
        (301.0, 7.0, {"left_out": "8 s expected, 7 allowed"}),
        (301.0, 9.0, {"seconds": [3.0]}),
    ],
)
def test_what_is_expected_to_take_too_much_is_told_and_not_begun(free, limit, said):
    before = row("decoder", (5, 8, 8), [2.0], 100.0, 50.0)
    told = attempt(before, "decoder", (10, 16, 8), lambda: {"seconds": [3.0]}, free, limit)
    assert told == {
        "way": "decoder",
        "size": (10, 16, 8),
        "expected": {"memory": 300.0, "seconds": 8.0},
        **said,
    }


def test_what_runs_out_of_memory_is_a_row_and_the_next_size_is_foretold_from_the_last_measured(monkeypatch):
    monkeypatch.setattr(reward_path, "prepare", lambda *arguments, **named: None)
    told = iter([{"seconds": [1.0], "weights": 10.0, "work": 5.0}, {"out_of_memory": "killed"}, {"out_of_memory": "x"}])
    monkeypatch.setattr(reward_path, "measure", lambda run: next(told))
    sizes = [(1, 8, 8), (5, 8, 8), (9, 8, 8)]
    asked = {"repeats": 1, "limit_seconds": 100.0, "device": "cpu", "dtype": "float32"}
    kept = []
    rows = grow(Namespace(sizes=sizes, ways=["decoder"], **asked), lambda rows: kept.append(len(rows)))
    assert [r.get("out_of_memory") for r in rows] == [None, "killed", "x"] and kept == [1, 2, 3]
    assert rows[2]["expected"] == {"memory": 55.0, "seconds": 9.0}


def test_ratios_are_over_the_proxy_and_the_cheapest_whole_decoder():
    size = (5, 8, 8)
    rows = [
        row("proxy", size, [1.0, 3.0, 2.0], 1.0, 9.0),
        row("decoder", size, [20.0], 100.0, 900.0),
        row("decoder, checkpointed", size, [40.0], 100.0, 300.0),
        row("decoder, 1 latent frame", size, [4.0], 100.0, 100.0),
        {"way": "decoder, three levels of checkpoints", "size": size, "out_of_memory": "x"},
        {"way": "proxy", "size": (9, 8, 8), "left_out": "x"},
    ]
    (told,) = ratios(rows)
    assert told["over_proxy"]["decoder"] == {"memory": 100.0, "seconds": 10.0}
    assert told["over_proxy"]["decoder, 1 latent frame"] == {"memory": 20.0, "seconds": 2.0}
    assert told["least_whole"] == {"memory": 40.0, "seconds": 10.0}
    assert "decoder, three levels of checkpoints" not in told["over_proxy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path")
    prepare(folder, (16, 2, 4, 4), 1, "cpu", scale=8)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_way_takes_a_gradient(folder, way):
    told = Run(way, str(folder), 2, 60.0, "cpu", vae=TINY).do()
    assert len(told["seconds"]) == 2 and told["weights"] > 0 and told["peak"] > told["work"] >= 0


def test_the_draws_estimate_the_gradient_of_the_proxy(folder, monkeypatch):
    monkeypatch.setattr(reward_path, "HEAD_STD", 0.02)
    run = Run("proxy", str(folder), 1, 60.0, "cpu")
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = gradient(run.proxy_loss(WAYS["proxy"])[0], latents).flatten()
    many = reward_path.Way(proxy=True, draws=4096)
    estimate = gradient(run.proxy_loss(many)[0], latents).flatten()
    assert torch.cosine_similarity(exact, estimate, dim=0) > 0.8
    state = torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(gradient(run.proxy_loss(many)[0], latents).flatten(), estimate), "the draws are those of a seed"
    torch.set_rng_state(state)


def test_a_run_has_an_interpreter_of_its_own_and_says_what_failed(folder, tmp_path):
    told = measure(Run("proxy", str(folder), 1, 60.0, "cpu"))
    assert len(told["seconds"]) == 1
    with pytest.raises(RuntimeError, match=r"^proxy ended with status 1(.|\n)*latents.safetensors"):
        measure(Run("proxy", str(tmp_path), 1, 60.0, "cpu"))


def test_a_way_that_fails_is_a_row_too():
    def fail():
        raise RuntimeError("decoder ended with status 1")

    told = attempt(None, "decoder", (5, 8, 8), fail, 1.0, 1.0)
    assert told == {"way": "decoder", "size": (5, 8, 8), "failed": "decoder ended with status 1"}


def test_an_accelerator_that_has_too_little_is_a_row(folder, monkeypatch):
    run = Run("proxy", str(folder), 1, 60.0, "cpu")
    calls = iter([None, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 1 GiB")])

    def fail(loss, latents):
        if (error := next(calls)) is not None:
            raise error

    monkeypatch.setattr(reward_path, "gradient", fail)
    assert run.do()["out_of_memory"] == "CUDA out of memory. Tried to allocate 9 GiB"


ROWS = [
    row("proxy", (5, 8, 8), [1.0], 1.0, 9.0),
    row("decoder", (5, 8, 8), [20.0], 100.0, 900.0),
    {"way": "decoder", "size": (9, 8, 8), "expected": {"memory": 1720.0, "seconds": 36.0}, "out_of_memory": "x"},
]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Run the script, which measures :data:`ROWS`, and read what it wrote."""
    monkeypatch.setattr(reward_path, "grow", lambda options, keep: keep(ROWS))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["reward_path", "--results", str(tmp_path / "told.json"), *arguments])
        reward_path.main()
        return json.loads((tmp_path / "told.json").read_text())

    return run


def test_what_is_measured_together_is_stored_together_and_drawn(asked, tmp_path):
    asked()
    asked("--dtype", "bfloat16", "--note", "n")
    asked("--sizes", "9x240x416", "81x480x832", "--ways", "decoder", "proxy")
    stored = asked("--sizes", *("x".join(map(str, size)) for size in reward_path.SIZES), "--note", "the usual sizes")
    assert list(stored) == ["cpu", "cpu_bfloat16", "cpu_9x240x416_81x480x832_proxy_decoder"]
    assert stored["cpu"]["note"] == "the usual sizes" and stored["cpu"]["device"] == "cpu"
    assert stored["cpu"]["rows"][0]["size"] == [5, 8, 8] and stored["cpu_bfloat16"]["dtype"] == "bfloat16"
    assert stored["cpu"]["ratios"][0]["over_proxy"]["decoder"]["memory"] == 100.0 and stored["cpu"]["versions"]
    assert (tmp_path / "told.png").stat().st_size > 10_000


def test_a_broken_file_or_an_absent_device_is_refused_before_anything_is_measured(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(reward_path, "grow", lambda *_: pytest.fail("measured"))
    with pytest.raises(DeviceError, match="cuda:7"):
        asked("--device", "cuda:7")
    (tmp_path / "told.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        asked()


def test_a_size_must_fit_the_vae():
    assert read_size("81x480x832") == (81, 480, 832)
    with pytest.raises(ValueError, match="80x480x832"):
        read_size("80x480x832")
