import pytest

from benchmarks.proxy_summary import summarise
from latent_rewards.contracts import ConfigError

METHODS, REWARDS = ("default", "ridge"), ("legible", "moves")


def scores(spearman, **extra):
    return {"spearman": spearman, "ceiling": 0.9, "pairwise": 0.7, "r2": 0.5, "mae": 0.1, **extra}


def result(method, seed, spearmans, **settings):
    share = 0.91 - 0.02 * seed
    interval = {"coverage": {"share": share, "low": 0.885, "high": 0.9349}} if method == "default" else {}
    sizes = {
        str(size): {
            "rewards": {name: scores(value, **interval) for name in REWARDS},
            **({"auroc": {"noise": 0.99} | ({"hacked": 0.95} if size == 64 else {})} if method == "default" else {}),
        }
        for size, value in spearmans.items()
    }
    return {"method": method, "seed": seed, "settings": {"student": "a", **settings}, "sizes": sizes}


def test_tables_are_over_seeds_and_show_what_is_missing():
    files = [result("ridge", 0, {32: 0.5}), result("default", 1, {32: 0.8, 64: 0.9}), result("default", 0, {32: 0.6})]
    markdown = summarise(files, METHODS, REWARDS)
    lines = markdown.splitlines()
    assert "| reward | method | 32 labels | 64 labels |" in lines
    assert "| legible | default | 0.700 ± 0.141 | 0.900 |" in lines
    assert "| legible | ridge | 0.500 | – |" in lines
    assert "| moves | (most without ties) | 0.900 | 0.900 |" in lines
    assert "| legible | default, seed 1 | 89.0 [88.5, 93.5] | 89.0 [88.5, 93.5] |" in lines
    assert "| legible | default, seed 0 | 91.0 [88.5, 93.5] | – |" in lines
    assert "| legible | default, mean | 90.0 ± 1.4 | 89.0 |" in lines
    assert "| noise latents | 0.990 | 0.990 |" in lines and "| hacked policy | – | 0.950 |" in lines
    assert lines.index("| legible | default | 0.700 ± 0.141 | 0.900 |") < lines.index("| legible | ridge | 0.500 | – |")


def test_baselines_alone_have_neither_intervals_nor_a_score_of_strangeness():
    markdown = summarise([result("ridge", 0, {32: 0.5})], METHODS, REWARDS)
    assert "Coverage" not in markdown and "AUROC" not in markdown and "| moves | ridge | 0.500 |" in markdown


def test_files_that_know_of_more_settings_stand_beside_those_that_do_not():
    files = [result("ridge", 0, {32: 0.5}), result("ridge", 1, {32: 0.7}, hack_rate=0.1)]
    assert "| legible | ridge | 0.600 ± 0.141 |" in summarise(files, METHODS, REWARDS)
    with pytest.raises(ConfigError, match="different samples"):
        summarise([*files, result("ridge", 2, {32: 0.6}, hack_rate=0.2)], METHODS, REWARDS)


@pytest.mark.parametrize(
    ("files", "said"),
    [([], "no results"), ([result("ridge", 0, {32: 0.5}), result("ridge", 1, {32: 0.5}, student="b")], "different")],
)
def test_nothing_and_files_of_different_students_are_refused(files, said):
    with pytest.raises(ConfigError, match=said):
        summarise(files, METHODS, REWARDS)
