from types import SimpleNamespace

from latent_rewards.directions import falling, falling_by_fingerprint


def test_a_registered_metrics_fingerprint_tells_its_direction():
    known = {"soft": "quality.blur@1#abc", "sharp": "quality.sharpness@1", "quality.blur": "somebody.elses@1"}
    assert falling_by_fingerprint(known) == {"soft"}
    assert falling_by_fingerprint({}) == set()


def test_whoever_knows_the_metric_is_asked():
    lower = SimpleNamespace(lower_is_better=frozenset({"a", "other"}))
    assert falling(SimpleNamespace(reward_names=("a", "b")), lower) == {"a"}
    assert falling(SimpleNamespace(reward_names=("a", "b"), oracle=lower), None) == {"a"}
    fitted = SimpleNamespace(reward_names=("a", "b"), metric_fingerprints={"b": "quality.blur@1"})
    assert falling(fitted) == {"b"}
