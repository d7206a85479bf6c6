"""Settings are checked when they are made."""

import pytest

from latent_rewards.contracts import ConfigError
from latent_rewards.proxies import ProxyConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trunk": "conv"}, "unknown trunk 'conv'. Did you mean 'conv3d'"),
        ({"noise_levels": (0.5, 0.5)}, "noise_levels"),
        ({"noise_levels": (0.5, 1.5)}, "noise_levels"),
        ({"noise_levels": (0.5,)}, "noise_levels"),
        ({"noise_levels": 1}, "noise_levels must be .* got 1"),
        ({"noise_levels": (0.0, 0.5), "trunk": "linear"}, "'linear' is linear and has no time"),
        ({"adapter_rank": -1}, "adapter_rank"),
        ({"adapter_rank": 2}, "adapter_rank=2 needs trunk='backbone'; got 'conv3d'"),
        ({"selection_budget": 0}, "selection_budget"),
        ({"batch_size": 2.5}, "batch_size must be a whole number; got 2.5"),
        ({"calibrate_mean": "isotone"}, "unknown calibrate_mean 'isotone'. Did you mean 'isotonic'"),
        ({"width": 12}, "multiple of 8"),
        ({"ensemble_size": 0}, "ensemble_size must be at least 1; got 0"),
        ({"num_updates": 0}, "num_updates"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"input_noise": -0.1}, "input_noise"),
        ({"holdout_fraction": 0.6}, r"\(0, 0.5\]"),
        ({"min_samples": 2}, "min_samples"),
        ({"ridge_alpha": 0.0}, "ridge_alpha"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        ProxyConfig(**change)


def test_the_number_of_updates_follows_the_data_unless_it_is_given():
    assert [ProxyConfig().updates(n) for n in (32, 1600, 100_000)] == [200, 450, 600]
    assert ProxyConfig(num_updates=7).updates(1600) == 7


def test_a_settings_file_names_noise_levels_and_auto(tmp_path):
    from latent_rewards.training.settings import read_settings

    (tmp_path / "s.yaml").write_text("proxy: {trunk: auto, noise_levels: [0, 0.5], selection_budget: 9000}")
    config = read_settings(tmp_path / "s.yaml", {"proxy": ProxyConfig})["proxy"]
    assert (config.trunk, config.noise_levels, config.selection_budget) == ("auto", (0.0, 0.5), 9000)
