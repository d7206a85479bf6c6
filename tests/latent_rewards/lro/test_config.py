from __future__ import annotations

import argparse

import pytest

from latent_rewards.contracts import ConfigError
from latent_rewards.lro.config import GRADIENT_ESTIMATORS, SCORE_ESTIMATORS, LROConfig, StartedWith
from latent_rewards.training.flags import add_settings, chosen_settings
from latent_rewards.training.settings import SettingsError, read_section, read_settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_updates", 0),
        ("num_updates", 2.5),
        ("beta", float("inf")),
        ("learning_rate", 0.0),
        ("prompts_per_update", 0),
        ("num_generations", 0),
        ("epsilon", 1.0),
        ("step_counts", []),
        ("step_counts", [0]),
        ("estimator", "ppo"),
        ("head_std", 0.0),
        ("num_draws", 1),
        ("num_draws", 7),
        ("last_k", 0),
        ("scale_rewards", "all"),
        ("warmup", -1),
        ("learning_rate_floor", 1.1),
        ("beta", -1.0),
        ("beta", float("nan")),
        ("kl", "both"),
        ("kl_target", 0.0),
        ("kl_target", -0.1),
        ("kl_target", float("nan")),
        ("kl_gate", "strange"),
        ("ref_model_sync_steps", 0),
        ("ref_model_mixup_alpha", 0.0),
        ("ref_model_mixup_alpha", 1.1),
        ("pessimism", -0.5),
        ("refresh_queries", 7),
        ("max_queries", -1),
        ("acquisition", "best"),
        ("acquisition_pool", 1),
        ("replay_half_life", 0.0),
        ("holdout_samples", 0),
        ("patience", 0),
        ("mixed_precision", "fp16"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(setting, value):
    with pytest.raises(ConfigError, match=setting.replace("_", "[_ ]")):
        LROConfig(**{setting: value})


def test_defaults_and_edges_are_accepted():
    assert LROConfig(step_counts=(1, 4)).step_counts == [1, 4]
    LROConfig(num_draws=7, antithetic=False, beta=0.0, max_queries=0, patience=None, reward_cap=None)


@pytest.mark.parametrize("setting", [{"kl_target": 0.1}, {"kl_gate": "uncertain"}, {"sync_ref_model": True}])
def test_what_needs_a_price_is_refused_without_one(setting):
    LROConfig(**setting)
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}=.*beta=0"):
        LROConfig(beta=0.0, **setting)
    LROConfig(beta=0.0, kl="return", ref_model_mixup_alpha=1.0)


def test_each_trainer_has_its_estimators():
    assert LROConfig().check_estimator(SCORE_ESTIMATORS) == "smoothed"
    assert LROConfig().check_estimator(GRADIENT_ESTIMATORS) == "pathwise"
    assert LROConfig(estimator="reinforce").check_estimator(SCORE_ESTIMATORS) == "reinforce"
    with pytest.raises(ConfigError, match="other trainer"):
        LROConfig(estimator="hybrid").check_estimator(SCORE_ESTIMATORS)


def test_a_group_baseline_needs_a_group():
    one = {"num_generations": 1, "step_counts": [1]}
    assert LROConfig(**one).check_estimator(SCORE_ESTIMATORS) == "smoothed"
    assert LROConfig(num_generations=1).check_estimator(GRADIENT_ESTIMATORS) == "pathwise"
    for settings, allowed in (
        ({"estimator": "reinforce", **one}, SCORE_ESTIMATORS),
        ({"num_generations": 1, "chain": "score"}, SCORE_ESTIMATORS),
        ({"num_generations": 1, "estimator": "hybrid"}, GRADIENT_ESTIMATORS),
        ({"num_generations": 1, "scale_rewards": "group"}, GRADIENT_ESTIMATORS),
    ):
        with pytest.raises(ConfigError, match="num_generations"):
            LROConfig(**settings).check_estimator(allowed)
    with pytest.raises(ConfigError, match="num_iterations"):
        LROConfig(num_iterations=2).check_estimator(GRADIENT_ESTIMATORS)


def test_a_resumed_run_keeps_its_settings():
    stored = StartedWith(LROConfig(beta=0.1), 3).state_dict()
    StartedWith(LROConfig(beta=0.1, num_updates=900, progress=False), 3).load_state_dict(stored)
    with pytest.raises(ConfigError, match=r"beta=0.1.*0.2"):
        StartedWith(LROConfig(beta=0.2), 3).load_state_dict(stored)
    StartedWith(LROConfig(beta=0.1), 3, {"policy": "a"}).load_state_dict(stored)  # not known then
    with pytest.raises(ConfigError, match="number of prompts"):
        StartedWith(LROConfig(beta=0.1), 4).load_state_dict(stored)
    falling = StartedWith(LROConfig(learning_rate_floor=0.1, num_updates=100), 3).state_dict()
    with pytest.raises(ConfigError, match="num_updates=100"):
        StartedWith(LROConfig(learning_rate_floor=0.1, num_updates=900), 3).load_state_dict(falling)


def test_a_run_from_before_a_setting_existed_had_its_default():
    stored = StartedWith(LROConfig(), 3).state_dict()
    old = {name: value for name, value in stored.items() if name != "acquisition"}
    StartedWith(LROConfig(), 3).load_state_dict(old)
    with pytest.raises(ConfigError, match=r"acquisition='random'.*'top'"):
        StartedWith(LROConfig(acquisition="top"), 3).load_state_dict(old)
    changes = {
        "kl": "return",
        "kl_target": 0.1,
        "kl_gate": "uncertain",
        "sync_ref_model": True,
        "ref_model_sync_steps": 4,
        "ref_model_mixup_alpha": 0.5,
    }
    old = {name: value for name, value in stored.items() if name not in changes}
    StartedWith(LROConfig(), 3).load_state_dict(old)
    for name, value in changes.items():
        with pytest.raises(ConfigError, match=f"{name}=.*{value!r}"):
            StartedWith(LROConfig(**{name: value}), 3).load_state_dict(old)


def test_a_yaml_section_is_read_strictly():
    section = read_section("run.yaml", "lro", LROConfig, {"beta": "1e-2", "step_counts": [1, 2], "estimator": "hybrid"})
    assert section == LROConfig(beta=0.01, step_counts=[1, 2], estimator="hybrid")
    with pytest.raises(SettingsError, match="num_generations"):
        read_section("run.yaml", "lro", LROConfig, {"num_generation": 4})


def test_the_kl_of_the_return_is_not_taken_once_for_each_reward():
    chosen = LROConfig(kl="return", gradient_aggregation="upgrad", estimator="reinforce")
    with pytest.raises(ConfigError, match="once for each reward; use kl='per_state'"):
        chosen.check_estimator(("reinforce", "smoothed"))
    LROConfig(kl="return", gradient_aggregation="upgrad", estimator="pathwise").check_estimator(("hybrid", "pathwise"))


def test_the_default_precision_can_be_given_in_a_file_and_as_a_flag(tmp_path):
    (tmp_path / "s.yaml").write_text("lro: {mixed_precision: no, progress: no}")
    found = read_settings(tmp_path / "s.yaml", {"lro": LROConfig})["lro"]
    assert (found.mixed_precision, found.progress) == ("no", False)
    parser = argparse.ArgumentParser()
    add_settings(parser, LROConfig)
    options = parser.parse_args(["--mixed-precision", "no"])
    assert chosen_settings(options, LROConfig) == {"mixed_precision": "no"}
