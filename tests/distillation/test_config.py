import argparse

import pytest

from distillation.baselines.decoupled import DecoupledConfig
from distillation.baselines.turbo import TurboConfig
from distillation.config import DistillationConfig, SettingsGuard
from distillation.errors import DistillationConfigError
from latent_rewards.training.flags import add_settings, chosen_settings
from latent_rewards.training.settings import read_settings


def test_stages_follow_the_schedule():
    assert DistillationConfig(vsd_steps=3, cd_steps=4).stages == {"vsd": 3, "cd": 4}
    assert DistillationConfig(vsd_steps=0, cd_steps=4).stages == {"cd": 4}
    assert DistillationConfig(schedule="joint", vsd_steps=3, cd_steps=4).stages == {"joint": 3}


def test_step_counts_may_be_a_tuple():
    assert DistillationConfig(step_counts=(1, 4)).step_counts == [1, 4]


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "both"},
        {"mixed_precision": "int8"},
        {"vsd_steps": 0, "cd_steps": 0},
        {"schedule": "joint", "vsd_steps": 0},
        {"batch_size": 0},
        {"fake_updates": 0},
        {"num_timesteps": 0},
        {"solver_steps": 0},
        {"checkpoint_every": 0},
        {"cd_weight": -1.0},
        {"cd_keep_weight": -1.0},
        {"cd_max_time": 0.0},
        {"cd_max_time": 1.5},
        {"cd_max_time": 0.1, "num_timesteps": 4},
        {"temporal_weight": float("nan")},
        {"learning_rate": 0.0},
        {"huber_c": 0.0},
        {"ema_decay": 1.0},
        {"cd_learning_rate": 0.0},
        {"cd_ema_decay": -0.1},
        {"learning_rate_floor": 1.5},
        {"step_counts": ()},
        {"guidance_scale": 0.0},
        {"refine_guidance_scale": -1.0},
        {"cd_guidance_scale": 0.0},
        {"r1_weight": -1.0},
        {"r1_sigma": 0.0},
        {"r1_weight": 1.0},
        {"adversarial_weight": 1.0, "vsd_steps": 0},
        {"vsd_steps": 4.5},
        {"cd_steps": float("inf")},
        {"learning_rate": float("inf")},
        {"adapter_rank": True},
        {"guidance_scale": "5"},
        {"step_counts": 4},
        {"progress": "yes"},
        {"output_dir": 3},
    ],
)
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(DistillationConfigError, match=next(iter(wrong))):
        DistillationConfig(**wrong)


def test_settings_without_effect_are_refused():
    with pytest.raises(DistillationConfigError, match="adversarial_weight = 1.0 has no effect: .* are cd; set"):
        DistillationConfig(adversarial_weight=1.0, vsd_steps=0)
    with pytest.raises(DistillationConfigError, match="adversarial_weight = 1.0 has no effect"):
        TurboConfig(adversarial_weight=1.0)
    with pytest.raises(DistillationConfigError, match="r1_weight = 1.0 has no effect without a discriminator"):
        DistillationConfig(r1_weight=1.0)
    DistillationConfig(adversarial_weight=1.0, r1_weight=1.0, schedule="joint")
    with pytest.raises(DistillationConfigError, match=r"cd_keep_weight = 2.0 has no effect.* lower cd_max_time"):
        DistillationConfig(cd_keep_weight=2.0)
    DistillationConfig(cd_keep_weight=2.0, cd_max_time=0.01, curriculum=True)
    with pytest.raises(DistillationConfigError, match=r"cd_keep_weight = 2.0 has no effect in the joint schedule"):
        DistillationConfig(cd_keep_weight=2.0, cd_max_time=0.5, schedule="joint")


def test_guard_refuses_what_would_change_the_weights_and_nothing_else():
    stored = SettingsGuard(DistillationConfig(), "vsd").state_dict()
    free = DistillationConfig(vsd_steps=5000, huber_c=0.1, log_every=1, cd_learning_rate=1e-3, cd_ema_decay=0.5)
    free.cd_guidance_scale = 2.0
    SettingsGuard(free, "vsd").load_state_dict(stored)
    with pytest.raises(DistillationConfigError, match=r"guidance_scale = 5\.0, this run has 2\.0"):
        SettingsGuard(DistillationConfig(guidance_scale=2.0), "vsd").load_state_dict(stored)
    after_vsd = SettingsGuard(DistillationConfig(), "cd").state_dict()
    with pytest.raises(DistillationConfigError, match="vsd_steps"):
        SettingsGuard(DistillationConfig(vsd_steps=5000), "cd").load_state_dict(after_vsd)
    with pytest.raises(DistillationConfigError, match="cd_learning_rate"):
        SettingsGuard(DistillationConfig(cd_learning_rate=1e-3), "cd").load_state_dict(after_vsd)


def test_guard_compares_facts_but_those_that_an_older_checkpoint_does_not_know():
    stored = SettingsGuard(DistillationConfig(), "vsd", {"eta": 1.0}).state_dict()
    SettingsGuard(DistillationConfig(), "vsd", {"eta": 1.0, "number of prompts": 3}).load_state_dict(stored)
    with pytest.raises(DistillationConfigError, match=r"eta = 1\.0, this run has 0\.5"):
        SettingsGuard(DistillationConfig(), "vsd", {"eta": 0.5}).load_state_dict(stored)


def test_cd_alone_does_not_depend_on_what_vsd_alone_reads():
    alone = SettingsGuard(DistillationConfig(vsd_steps=0), "cd").state_dict()
    SettingsGuard(DistillationConfig(vsd_steps=0, fake_updates=9), "cd").load_state_dict(alone)
    after = SettingsGuard(DistillationConfig(), "cd").state_dict()
    with pytest.raises(DistillationConfigError, match="fake_updates"):
        SettingsGuard(DistillationConfig(fake_updates=9), "cd").load_state_dict(after)


def test_the_image_stage_can_go_on_further_and_the_clips_after_it_cannot_begin_elsewhere():
    stored = {stage: SettingsGuard(DecoupledConfig(), stage).state_dict() for stage in ("image_cd", "clip_cd")}
    SettingsGuard(DecoupledConfig(image_steps=900, vsd_steps=1), "image_cd").load_state_dict(stored["image_cd"])
    with pytest.raises(DistillationConfigError, match="image_steps"):
        SettingsGuard(DecoupledConfig(image_steps=900), "clip_cd").load_state_dict(stored["clip_cd"])


def test_a_checkpoint_from_before_a_setting_existed_is_continued_with_its_default():
    stored = SettingsGuard(DistillationConfig(), "vsd").state_dict()
    older = {name: value for name, value in stored.items() if name != "learning_rate_floor"}
    SettingsGuard(DistillationConfig(), "vsd").load_state_dict(older)
    with pytest.raises(DistillationConfigError, match=r"learning_rate_floor = 1\.0, this run has 0\.5"):
        SettingsGuard(DistillationConfig(learning_rate_floor=0.5), "vsd").load_state_dict(older)


@pytest.mark.parametrize(
    ("stage", "steps"),
    [
        ("vsd", "vsd_steps"),
        ("cd", "cd_steps"),
        ("joint", "vsd_steps"),
        ("clip_cd", "cd_steps"),
        ("image_cd", "image_steps"),
    ],
)
def test_a_falling_learning_rate_fixes_the_length_of_its_stage(stage, steps):
    falling = DecoupledConfig(learning_rate_floor=0.1)
    SettingsGuard(falling, stage).load_state_dict(SettingsGuard(falling, stage).state_dict())
    with pytest.raises(DistillationConfigError, match=steps):
        longer = DecoupledConfig(learning_rate_floor=0.1, **{steps: 5000})
        SettingsGuard(longer, stage).load_state_dict(SettingsGuard(falling, stage).state_dict())


def test_the_default_precision_can_be_given_in_a_file_and_as_a_flag(tmp_path):
    (tmp_path / "s.yaml").write_text("distillation: {mixed_precision: no, progress: no}")
    found = read_settings(tmp_path / "s.yaml", {"distillation": DistillationConfig})["distillation"]
    assert (found.mixed_precision, found.progress) == ("no", False)
    parser = argparse.ArgumentParser()
    add_settings(parser, DistillationConfig)
    options = parser.parse_args(["--mixed-precision", "no"])
    assert chosen_settings(options, DistillationConfig) == {"mixed_precision": "no"}
