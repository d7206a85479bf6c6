"""The cache keeps what may be kept, gives it back exactly, and never gives back what is damaged."""

import json
import math
import multiprocessing
import time
import warnings

import pytest
import torch

from latent_rewards.contracts import ConfigError
from latent_rewards.digests import tensor_digests
from latent_rewards.metrics import command_metric, create_metric, register_metric, registry
from latent_rewards.score_cache import ScoreCache


@pytest.fixture
def metric(monkeypatch):
    monkeypatch.setattr(registry, "_DEFINITIONS", dict(registry._DEFINITIONS))

    def make(name="test.kept", **facts):
        register_metric(name, version=facts.pop("version", "1"), override=True, **facts)(
            (lambda videos, *, prompts: [0.0]) if facts.get("needs_prompt") else (lambda videos: [0.0])
        )
        return create_metric(name)

    return make


def videos(seed=0, shape=(2, 3, 3, 4, 4)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_values_come_back_exactly_nan_included(tmp_path, metric):
    cache = ScoreCache(tmp_path / "deep" / "cache")
    values = torch.tensor([1 / 3, math.nan, -0.0, 1e-42, 3.4e38])
    keys = cache.keys(metric(), [f"video {i}" for i in range(5)], [""] * 5)
    assert cache.read(keys) is None
    cache.write(keys, values)
    read = ScoreCache(tmp_path / "deep" / "cache").read(keys)
    assert torch.equal(read.nan_to_num(7.0), values.nan_to_num(7.0)) and math.copysign(1, read[2]) == -1
    assert cache.read([*keys, cache.keys(metric(), ["another"], [""])[0]]) is None  # all or none


def test_a_key_is_made_of_pixels_shape_fingerprint_and_prompt_where_it_counts(tmp_path, metric):
    cache = ScoreCache(tmp_path)
    first, second = tensor_digests(videos())
    assert first != second and tensor_digests(videos())[0] == first
    reshaped = tensor_digests(videos().reshape(2, 3, 3, 2, 8))[0]
    assert reshaped != first and tensor_digests(videos().double())[0] != first
    assert tensor_digests(videos().transpose(3, 4).contiguous().transpose(3, 4)) == [first, second]
    key = cache.keys(metric(), [first], ["a"])
    assert cache.keys(metric(), [first], ["b"]) == key
    assert cache.keys(metric(version="2"), [first], ["a"]) != key
    assert cache.keys(metric("test.other"), [first], ["a"]) != key
    reading = metric("test.words", needs_prompt=True)
    assert cache.keys(reading, [first], ["a"]) != cache.keys(reading, [first], ["b"])
    assert cache.keys(reading, [first], [{"prompt": "a"}]) == cache.keys(reading, [first], ["a"])


class Stateful:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, videos):
        return [self.scale] * len(videos)


def test_what_must_not_be_kept_has_no_keys(tmp_path, metric):
    cache = ScoreCache(tmp_path)
    assert cache.keys(metric(), ["v"], [""]) is not None
    assert cache.keys(metric(deterministic=False), ["v"], [""]) is None
    assert cache.keys(metric(batch_invariant=False), ["v"], [""]) is None
    assert cache.keys(create_metric(Stateful(2)), ["v"], [""]) is None
    assert cache.keys(Stateful(2), ["v"], [""]) is None
    tool = ["true", "{folder}"]
    assert cache.keys(command_metric("tool", tool, version="1"), ["v"], [""]) is None
    assert cache.keys(command_metric("tool", tool, version="1", deterministic=True), ["v"], [""]) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.5", "0.75"),
        lambda text: text.replace('"value": 0.5', '"value": null'),
        lambda text: json.dumps({**json.loads(text), "key": "0" * 64}),
        lambda text: "[1, 2]",
        lambda text: "\x00" * len(text),
    ],
)
def test_a_damaged_entry_is_ignored_with_a_warning_and_replaced(tmp_path, metric, damage):
    cache = ScoreCache(tmp_path)
    keys = cache.keys(metric(), ["v"], [""])
    cache.write(keys, torch.tensor([0.5]))
    (entry,) = tmp_path.rglob("*.json")
    entry.write_text(damage(entry.read_text()))
    with pytest.warns(UserWarning, match=r"\.json is damaged"):
        assert cache.read(keys) is None
    cache.write(keys, torch.tensor([0.5]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read(keys).item() == 0.5


def test_an_entry_that_lies_in_anothers_place_is_not_believed(tmp_path, metric):
    cache = ScoreCache(tmp_path)
    one, two = cache.keys(metric(), ["v", "w"], ["", ""])
    cache.write([one], torch.tensor([0.5]))
    cache._path(two).parent.mkdir(exist_ok=True)
    cache._path(one).rename(cache._path(two))
    with pytest.warns(UserWarning, match="is damaged"):
        assert cache.read([two]) is None


def test_writers_side_by_side_leave_whole_entries(tmp_path, metric):
    keys = ScoreCache(tmp_path).keys(metric(), [f"v{i}" for i in range(200)], [""] * 200)

    def write():
        while True:
            ScoreCache(tmp_path).write(keys, torch.arange(200.0))

    running = [multiprocessing.get_context("fork").Process(target=write) for _ in range(2)]
    for process in running:
        process.start()
    time.sleep(0.7)
    for process in running:
        process.kill()
        process.join(timeout=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ScoreCache(tmp_path).read(keys), torch.arange(200.0))


def test_a_disk_that_refuses_costs_a_warning(tmp_path, metric, monkeypatch):
    cache = ScoreCache(tmp_path)
    keys = cache.keys(metric(), ["v"], [""])
    (tmp_path / keys[0][:2]).write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        cache.write(keys, torch.tensor([0.5]))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        ScoreCache(tmp_path / "file")
