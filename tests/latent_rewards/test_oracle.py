"""Decoding and scoring: in chunks, in this process or in workers, with or without a cache, always the same numbers."""

import importlib
import threading
import time
import warnings

import pytest
import torch

from latent_rewards.collect import collect_rewards
from latent_rewards.collect_command import make_oracle
from latent_rewards.contracts import ConfigError, DataError, MetricCrashError, MetricError, MetricOutputError
from latent_rewards.metrics import create_metric, registry
from latent_rewards.oracle import MetricOracle

METRICS = {"level": "toys_of_tests:level", "size": "compression.jpeg_size", "words": "toys_of_tests:words"}

JUDGE = """
import sys
from latent_rewards.metrics import command_metric, register_metric

PROGRAM = (
    "import json, sys; clips = json.load(open(sys.argv[1]))['clips']; "
    "json.dump({'values': [len(clip['prompt']) for clip in clips]}, open(sys.argv[2], 'w'))"
)

@register_metric("tests.judge", version="1")
def judge():
    return command_metric("judge", [sys.executable, "-S", "-c", PROGRAM, "{request}", "{answer}"], version="1")
"""


class Mean:
    """The mean pixel."""

    name, fingerprint = "mean", "mean@1"

    def __call__(self, videos, prompts=None):
        return videos.flatten(1).mean(1)


def latents(count=10):
    return torch.randn(count, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def workers(toys):
    with MetricOracle(toys.Codec(), METRICS, chunk_size=3, num_workers=2, timeout=30.0) as oracle:
        yield oracle


def test_chunks_are_bounded_and_queries_counted(toys):
    codec = toys.Codec()
    oracle = MetricOracle(codec, {"one": Mean(), "two": Mean()}, chunk_size=4)
    scores = oracle(latents(), ["p"] * 10)
    assert codec.batch_sizes == [4, 4, 2] and oracle.num_queries == 10
    assert list(scores) == ["one", "two"]
    torch.testing.assert_close(scores["two"], codec.decode(latents()).flatten(1).mean(1))
    assert oracle.fingerprints == {"one": "mean@1", "two": "mean@1"} and oracle.latent_space == "toy-codec"


def test_functions_are_metrics_too_and_a_single_one_is_no_list(toys):
    def brightness(videos):
        return videos.flatten(1).mean(1)

    scores = MetricOracle(toys.Codec(), {"b": brightness})(latents(2), ["p"] * 2)
    torch.testing.assert_close(scores["b"], brightness(toys.Codec().decode(latents(2))))
    (name,) = MetricOracle(toys.Codec(), [brightness]).fingerprints
    assert name.endswith("brightness")
    for wrong in (brightness, None):
        with pytest.raises(ConfigError, match="metrics must be a list of metrics, or"):
            MetricOracle(toys.Codec(), wrong)


def test_an_oracle_knows_which_of_its_metrics_should_fall(toys):
    metrics = {"soft": create_metric("quality.blur"), "sharp": create_metric("quality.sharpness"), "mean": Mean()}
    assert MetricOracle(toys.Codec(), metrics).lower_is_better == {"soft"}


def test_scores_can_be_asked_for_again(toys):
    oracle = MetricOracle(toys.Codec(), [Mean()], chunk_size=4)
    pending = oracle.submit(latents(), ["p"] * 10)
    assert torch.equal(pending.result()["mean"], pending.result()["mean"])
    assert len(pending.result()["mean"]) == oracle.num_queries == 10


def test_a_single_reward_that_a_trivial_clip_wins_is_warned_of(toys):
    with pytest.warns(UserWarning, match="'quality.frame_ssim' is the only reward, and a still or a grey clip"):
        MetricOracle(toys.Codec(), ["quality.frame_ssim"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MetricOracle(toys.Codec(), ["quality.frame_ssim", "motion.dynamic_degree"])


def test_what_cannot_be_used_is_refused(toys):
    codec = toys.Codec()
    for metrics, message in [([], "at least one"), ("mean", "pass a list"), ([Mean(), Mean()], "two metrics")]:
        with pytest.raises(ConfigError, match=message):
            MetricOracle(codec, metrics)
    for settings, message in [
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"num_workers": -1}, "num_workers must not"),
        ({"num_workers": 1}, "'mean' is a Mean, which cannot be imported"),
        ({"cache_dir": "/proc/none"}, "cache_dir /proc/none cannot be used"),
    ]:
        with pytest.raises(ConfigError, match=message):
            MetricOracle(codec, [Mean()], **settings)
    with pytest.raises(DataError, match="1 prompts for 2 latents"):
        MetricOracle(codec, [Mean()])(latents(2), ["a"])
    with pytest.raises(DataError, match="1 prompts for 2 videos"):
        MetricOracle(codec, [Mean()]).submit_videos(torch.zeros(2, 1, 3, 4, 4), ["a"])

    class Scalar(Mean):
        def __call__(self, videos, prompts=None):
            return videos.mean()

    with pytest.raises(MetricOutputError, match="'mean' returned shape"):
        MetricOracle(codec, [Scalar()])(latents(2), ["a", "b"])


def test_workers_return_the_same_bits(toys, workers):
    here = MetricOracle(toys.Codec(), METRICS, chunk_size=3)
    texts = ["a", {"prompt": "bb"}] * 5
    mine, theirs = here(latents(), texts), workers(latents(), texts)
    assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert workers.num_queries == 10
    videos = toys.Codec().decode(latents())
    for oracle in (here, workers):
        assert torch.equal(oracle.submit_videos(videos, texts).result()["level"], mine["level"])


def test_no_more_chunks_are_decoded_than_the_queue_holds(toys, workers):
    workers.start()
    codec = workers.codec = toys.Codec()
    running = workers._workers._running
    held = [running.free.get(), running.free.get()]  # so that no worker can begin
    thread = threading.Thread(target=lambda: workers.submit(latents(30), ["p"] * 30).result())
    thread.start()
    time.sleep(0.5)
    decoded = len(codec.batch_sizes)
    for child in held:
        running.free.put(child)
    thread.join(timeout=20)
    assert decoded == 4 and len(codec.batch_sizes) == 10  # two workers, one place in the queue, one at the door


def collected(toys, oracle, folder=None):
    settings = {"num_samples": 10, "batch_size": 4, "num_steps": 2, "seed": 5, "progress": False}
    return collect_rewards(toys.LinearPolicy(), toys.PROMPTS, oracle, output_dir=folder, **settings)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_collection_with_workers_is_the_same_to_the_byte_failures_included(toys, tmp_path):
    levels = collected(toys, MetricOracle(toys.Codec(), ["toys_of_tests:level"])).rewards["toys_of_tests:level"]
    limit = float(levels.sort().values[-3])
    metrics = {"level": create_metric("toys_of_tests:level", limit=limit), "size": "compression.jpeg_size"}
    with pytest.warns(UserWarning, match="2 of 10 samples"):
        collected(toys, MetricOracle(toys.Codec(), metrics, chunk_size=3), tmp_path / "here")
    with MetricOracle(toys.Codec(), metrics, chunk_size=3, num_workers=1, timeout=30.0) as oracle:
        with pytest.warns(UserWarning, match="2 of 10 samples.*too bright"):
            collected(toys, oracle, tmp_path / "workers")
    assert content(tmp_path / "here") == content(tmp_path / "workers")
    assert len(content(tmp_path / "here")) == 4 * 3 + 2 + 2


def test_a_metric_that_kills_its_process_costs_its_sample_only(toys):
    levels = collected(toys, MetricOracle(toys.Codec(), ["toys_of_tests:level"])).rewards["toys_of_tests:level"]
    crash = float(levels.sort().values[-2])
    metric = create_metric("toys_of_tests:level", crash=crash)
    with MetricOracle(toys.Codec(), {"level": metric}, num_workers=1, timeout=30.0) as oracle:
        with pytest.warns(UserWarning, match="1 of 10 samples.*its child process died"):
            kept = collected(toys, oracle)
        with pytest.raises(MetricCrashError):
            oracle.submit_videos(torch.ones(1, 3, 3, 4, 4), [""]).result()
    assert list(kept.failures) == [int(levels.argmax())] and len(kept) == 9
    assert torch.equal(kept.rewards["level"], levels[levels < levels.max()])


def test_a_metric_that_a_worker_cannot_make_is_no_samples_failure(toys):
    metric = create_metric("toys_of_tests:level")
    object.__setattr__(metric, "origin", "no_such_module")
    with warnings.catch_warnings(), pytest.raises(MetricError, match="no_such_module") as caught:
        warnings.simplefilter("error")
        collected(toys, MetricOracle(toys.Codec(), {"level": metric}, num_workers=1))
    assert "samples failed" not in str(caught.value)


def test_a_judge_works_in_workers_by_the_name_of_a_function_that_returns_it(toys, toy_folder, monkeypatch):
    (toy_folder / "judges_of_tests.py").write_text(JUDGE)
    monkeypatch.setattr(registry, "_DEFINITIONS", dict(registry._DEFINITIONS))
    judges = importlib.import_module("judges_of_tests")
    scores = MetricOracle(toys.Codec(), ["tests.judge"])(latents(3), ["a", "bb", "ccc"])
    assert scores["judge"].tolist() == [1.0, 2.0, 3.0]
    for metrics in (["tests.judge"], {"judge": "tests.judge", "level": "toys_of_tests:level"}):
        with MetricOracle(toys.Codec(), metrics, num_workers=1, timeout=30.0) as oracle:
            assert torch.equal(oracle(latents(3), ["a", "bb", "ccc"])["judge"], scores["judge"])
    make_oracle(toys.Codec(), [("tests.judge", {})], torch.device("cpu"), num_workers=1)  # as the command line does
    with pytest.raises(ConfigError, match="'judge' cannot be imported by another process.*or use num_workers=0"):
        MetricOracle(toys.Codec(), [judges.judge()], num_workers=1)


def test_the_cache_saves_every_call_and_changes_no_bit(toys, tmp_path):
    calls = []

    def oracle(**settings):
        made = MetricOracle(toys.Codec(), METRICS, chunk_size=3, cache_dir=tmp_path / "cache", **settings)
        for name, metric in made.metrics.items():
            score = metric.score
            object.__setattr__(metric, "score", lambda *a, s=score, n=name, **k: calls.append(n) or s(*a, **k))
        return made

    texts = ["a", "bb"] * 5
    plain = MetricOracle(toys.Codec(), METRICS, chunk_size=3)(latents(), texts)
    for _ in range(2):
        scores = oracle()(latents(), texts)
        assert all(torch.equal(scores[name], plain[name]) for name in plain)
        assert len(calls) == 4 * 3
    scores = oracle()(latents(), [*texts[:9], "cccc"])
    assert calls[12:] == ["words"]  # the prompt counts for the metric that takes it, in its chunk only
    assert scores["words"].tolist() == [*plain["words"].tolist()[:9], 4.0]
    assert torch.equal(scores["level"], plain["level"])


def test_workers_use_the_cache_too(toys, tmp_path):
    written = MetricOracle(toys.Codec(), METRICS, chunk_size=3, cache_dir=tmp_path)(latents(), ["a"] * 10)
    with MetricOracle(toys.Codec(), METRICS, chunk_size=3, num_workers=1, cache_dir=tmp_path) as oracle:
        oracle.start()
        for child in oracle._workers._running.children:
            child.call = None  # a question to a child would fail
        read = oracle(latents(), ["a"] * 10)
    assert all(torch.equal(read[name], written[name]) for name in written)
