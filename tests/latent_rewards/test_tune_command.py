"""`latent-rewards tune` and `evaluate`: a stored policy is tuned on a stored proxy, and compared with what it was."""

import json
from importlib.metadata import EntryPoint

import pytest
import torch

from latent_rewards import collect_command
from latent_rewards.cli import build_parser, main
from latent_rewards.contracts import ConfigError
from latent_rewards.lro import LROConfig
from latent_rewards.metrics import registry
from latent_rewards.proxies import RewardProxy
from latent_rewards.rewards import combined
from latent_rewards.tune_command import DECIDED, lower_is_better

LOADERS = '''
import json
import pathlib
import toys_of_tests as toys
import latent_rewards as lr

@lr.register_metric("toys.level", version="1", value_range=(0, 1))
def level(videos):
    return videos.mean(dim=(1, 2, 3, 4))

@lr.register_metric("toys.glow", version="1", value_range=(0, 1))
def glow(videos):
    return videos.square().mean(dim=(1, 2, 3, 4))

@lr.register_metric("toys.dark", version="1", value_range=(0, 1))
def dark(videos):
    return 1 - videos.mean(dim=(1, 2, 3, 4))

class Tunable(toys.LinearPolicy):
    """A policy that brings its codec and can be saved, the way a student is."""

    def __init__(self, path):
        file = pathlib.Path(path) / "gain.json"
        super().__init__(json.loads(file.read_text()) if file.is_file() else 0.5)
        self.exporter = type("Exporter", (), {"codec": toys.Codec()})()

    def save_pretrained(self, path):
        path = pathlib.Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / "latent_rewards.json").write_text(json.dumps({"kind": "Tunable"}))
        (path / "gain.json").write_text(json.dumps(float(self.gain.detach())))

class Stubborn(toys.LinearPolicy):
    def __init__(self, path):
        super().__init__()
        self.exporter = type("Exporter", (), {"codec": toys.Codec()})()
'''


@pytest.fixture(scope="module")
def stored(toys, toy_folder, tmp_path_factory):
    """A policy, prompts, scored samples and a proxy of two rewards, all made by the commands."""
    (toy_folder / "tunable_of_tests.py").write_text(LOADERS)
    patch = pytest.MonkeyPatch()
    points = [EntryPoint(n, f"tunable_of_tests:{n}", "latent_rewards.policies") for n in ("Tunable", "Stubborn")]
    patch.setattr(collect_command, "entry_points", lambda group: points)
    root = tmp_path_factory.mktemp("tune")
    for kind in ("Tunable", "Stubborn"):
        (root / kind).mkdir()
        (root / kind / "latent_rewards.json").write_text(json.dumps({"kind": kind}))
    (root / "prompts.txt").write_text("".join(f"{'a' * (i % 9 + 1)}{i}\n" for i in range(24)))
    (root / "empty.txt").write_text("\n\n")
    metrics = ["--metric", "toys.level", "--metric", "toys.dark"]
    import tunable_of_tests  # noqa: F401 - registers toys.*

    common = ["--policy", f"{root}/Tunable", "--prompts", f"{root}/prompts.txt", "--num-steps", "2"]
    assert main(["collect", *common, *metrics, "-n", "96", "--output", f"{root}/rewards"]) == 0
    fit = ["--num-updates", "200", "--width", "16", "--ensemble-size", "2", "--device", "cpu"]
    assert main(["fit", f"{root}/rewards", "--output", f"{root}/proxy", *fit]) == 0
    yield root
    patch.undo()


def tune(root, output, *more):
    small = "--num-updates 6 --prompts-per-update 4 --num-generations 2 --step-counts [2] --refresh-every 3"
    small += " --refresh-queries 8 --refresh-steps 2 --learning-rate 0.02 --holdout-every 3 --holdout-samples 8"
    command = ["tune", f"{root}/Tunable", "--proxy", f"{root}/proxy", "--prompts", f"{root}/prompts.txt"]
    return main([*command, "--output", str(output), *small.split(), "--device", "cpu", *more])


def test_a_policy_is_tuned_saved_and_compared_with_what_it_was(stored, tmp_path, capsys):
    out = tmp_path / "tuned"
    chosen = ["--dataset", f"{stored}/rewards", "--weight", "toys.level=1", "--holdout", "toys.glow"]
    chosen += ["--html", f"{tmp_path}/run.html"]
    assert tune(stored, out, *chosen) == 0
    printed = capsys.readouterr().out
    assert "toys.level: true" in printed and "held-out toys.glow" in printed and "6 updates, 8 true" in printed
    assert f"policy in {out / 'policy'}" in printed
    page = (tmp_path / "run.html").read_text()
    assert "pathwise towards toys.level, toys.dark" in page and "prompts_per_update" in page and page.count("<svg") >= 2
    result = json.loads((out / "result.json").read_text())
    assert len(result["history"]) == 6 and result["num_queries"] == 8 and len(result["holdout_curve"]) == 3
    assert set(RewardProxy.from_pretrained(out / "proxy").reward_names) == {"toys.level", "toys.dark"}
    gain = json.loads((out / "policy" / "gain.json").read_text())
    assert gain != 0.5
    # The same command finds the run finished and ends the same.
    assert tune(stored, out, *chosen) == 0
    assert json.loads((out / "policy" / "gain.json").read_text()) == gain
    assert json.loads((out / "result.json").read_text()) == result
    capsys.readouterr()
    command = ["evaluate", f"{out}/policy", "--baseline", f"{stored}/Tunable", "--num-steps", "2"]
    command += ["--prompts", f"{stored}/prompts.txt", "--metric", "toys.level", "--metric", "quality.sharpness"]
    command += ["--per-prompt", "3", "--output", f"{tmp_path}/evaluation", "--html", f"{tmp_path}/page.html"]
    assert main(command) == 0
    told = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    level = told["metrics"]["toys.level"]
    assert level["policy"]["count"] == 72 and told["metric"] == ["toys.level", "quality.sharpness"]
    assert level["difference"]["mean"] == pytest.approx(level["policy"]["mean"] - level["baseline"]["mean"])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<video") == 12 and "policy minus baseline" in page and "toys.level" in page
    assert "toys.level: policy " in capsys.readouterr().out


NAMES = [f"{'a' * (i % 9 + 1)}{i}" for i in range(24)]


@pytest.mark.filterwarnings("ignore:.*could not be scored")
@pytest.mark.parametrize(
    ("quiet", "loud", "shown"),
    [([], NAMES[:1], 6), (NAMES[:3], NAMES[5:], 2), (NAMES[::2], NAMES[1::2], 0)],
    ids=["one", "most", "all"],
)
def test_the_page_shows_prompts_of_which_a_sample_was_scored(stored, tmp_path, monkeypatch, capsys, quiet, loud, shown):
    """All samples of some prompts fail, of others for each policy: their rows are left out, and the page is written."""
    monkeypatch.setattr(registry, "_DEFINITIONS", dict(registry._DEFINITIONS))

    @registry.register_metric("toys.fussy", version="1", needs_prompt=True)
    def fussy(videos, *, prompts):
        if set(prompts) & set(loud if videos.std() > 0.3 else quiet):
            raise ValueError("not this one")
        return videos.mean(dim=(1, 2, 3, 4))

    baseline = tmp_path / "loud"
    baseline.mkdir()
    (baseline / "latent_rewards.json").write_text(json.dumps({"kind": "Tunable"}))
    (baseline / "gain.json").write_text("50.0")
    command = ["evaluate", f"{stored}/Tunable", "--baseline", str(baseline), "--num-steps", "2", "--per-prompt", "2"]
    command += ["--prompts", f"{stored}/prompts.txt", "--metric", "toys.fussy", "--output", f"{tmp_path}/e"]
    with pytest.warns(UserWarning, match=f"{2 * len(loud)} of 48 samples"):
        assert main([*command, "--html", f"{tmp_path}/page.html"]) == 1
    assert "failed: baseline, sample " in capsys.readouterr().err
    page = (tmp_path / "page.html").read_text()
    assert page.count("<video") == 2 * shown and "toys.fussy" in page


def test_a_policy_alone_has_no_difference(stored, tmp_path, capsys):
    command = ["evaluate", f"{stored}/Tunable", "--prompts", f"{stored}/prompts.txt", "--metric", "toys.level"]
    assert main([*command, "--output", f"{tmp_path}/e", "--num-steps", "1", "--per-prompt", "1"]) == 0
    told = json.loads((tmp_path / "e" / "evaluation.json").read_text())["metrics"]["toys.level"]
    assert set(told) == {"policy"} and "difference" not in capsys.readouterr().out


def test_the_estimator_chooses_the_trainer_and_frozen_asks_nothing(stored, tmp_path, capsys):
    with pytest.warns(UserWarning, match="no oracle"):
        assert tune(stored, tmp_path / "t", "--estimator", "smoothed", "--frozen", "--num-draws", "4") == 0
    result = json.loads((tmp_path / "t" / "result.json").read_text())
    assert result["num_queries"] == 0 and not result["true_curve"]
    assert tune(stored, tmp_path / "t") == 2, "what a run without refreshes left cannot be continued with them"
    assert "use another output_dir" in capsys.readouterr().err


def test_every_setting_but_those_the_command_decides_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    shown = capsys.readouterr().out
    for name in LROConfig.__dataclass_fields__:
        assert (f"--{name.replace('_', '-')} " in shown.replace("\n", " ")) == (name not in DECIDED), name
    assert "(default: [4])" in shown
    options = build_parser().parse_args(
        ["tune", "p", "--proxy", "q", "--prompts", "r", "--output", "o", "--step-counts", "[1, 4]", "--beta", "0.1"]
    )
    assert options.step_counts == [1, 4] and options.beta == 0.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--weight", "toys.lvl=1"], "unknown reward 'toys.lvl'. Did you mean 'toys.level'"),
        (["--prompts", "{root}/empty.txt"], "holds no prompt"),
        (["--proxy", "{root}/rewards"], "rewards holds no proxy.json: it is not a saved reward proxy"),
        (["--metric", "toys.levle"], "toys.level"),
        (["--beta", "-1"], "beta must not be negative"),
        (["--dataset", "{root}/nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_tuned_is_said_before_any_work(stored, tmp_path, capsys, changes, said):
    assert tune(stored, tmp_path / "t", *(part.format(root=stored) for part in changes)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("command", ["tune", "collect", "evaluate"])
def test_steps_that_a_policy_does_not_sample_in_are_told_as_the_policy_does(
    stored, toys, tmp_path, capsys, monkeypatch, command
):
    def timesteps(self, num_steps):
        raise ValueError(f"samples in 1, 2 and 4 steps; got {num_steps}")

    monkeypatch.setattr(toys.LinearPolicy, "timesteps", timesteps)
    if command == "tune":
        assert tune(stored, tmp_path / "t", "--step-counts", "3") == 2
    else:
        policy = ["--policy", f"{stored}/Tunable"] if command == "collect" else [f"{stored}/Tunable"]
        common = ["--prompts", f"{stored}/prompts.txt", "--metric", "toys.level", "--output", f"{tmp_path}/t"]
        assert main([command, *policy, *common, "--num-steps", "3"]) == 2
    assert "samples in 1, 2 and 4 steps; got 3" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_numbers_that_are_not_finite_end_a_run_with_1(stored, tmp_path, capsys):
    with pytest.warns(UserWarning, match="no oracle"):
        assert tune(stored, tmp_path / "t", "--frozen", "--learning-rate", "1e30") == 1
    assert "not finite" in capsys.readouterr().err


def test_weights_are_checked_against_the_proxys_rewards():
    with pytest.raises(ConfigError, match="unknown reward 'levle'. Did you mean 'level'"):
        combined(("level", "dark"), [("levle", 1.0)])
    assert combined(("level",), None) is None
    assert combined(("level", "dark"), None).weights == {"level": 1.0, "dark": 1.0}
    assert combined(("level",), [("level", -2.0)]).normalize is None
    assert combined(("level",), None, {"level"}).weights == {"level": -1.0}
    assert combined(("level", "dark"), None, {"dark"}).weights == {"level": 1.0, "dark": -1.0}
    assert combined(("level", "dark"), [("dark", 2.0)], {"dark"}).weights == {"dark": 2.0}
    specs = [("quality.blur", {}), ("quality.blur", {"resize": 8}), ("quality.sharpness", {}), ("of a model", {})]
    assert lower_is_better(specs) == {"quality.blur", "quality.blur,resize=8"}


def test_a_policy_that_cannot_be_saved_is_refused(stored, tmp_path, capsys):
    command = ["tune", f"{stored}/Stubborn", "--proxy", f"{stored}/proxy", "--prompts", f"{stored}/prompts.txt"]
    assert main([*command, "--output", f"{tmp_path}/t"]) == 2
    assert "cannot be saved after tuning" in capsys.readouterr().err


def test_wrong_numbers_and_weights_are_refused(stored, tmp_path, capsys):
    command = ["evaluate", f"{stored}/Tunable", "--prompts", f"{stored}/prompts.txt", "--metric", "toys.level"]
    assert main([*command, "--output", f"{tmp_path}/e", "--per-prompt", "0"]) == 2
    assert "--per-prompt must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune(stored, tmp_path / "t", "--weight", "toys.level")
    assert "not REWARD=WEIGHT" in capsys.readouterr().err


def test_latents_of_the_tuned_policy_are_those_that_were_scored(stored, tmp_path):
    """Policy and baseline get the same noise: the same policy twice differs in nothing."""
    command = ["evaluate", f"{stored}/Tunable", "--baseline", f"{stored}/Tunable", "--metric", "toys.level"]
    command += [
        "--prompts",
        f"{stored}/prompts.txt",
        "--num-steps",
        "2",
        "--per-prompt",
        "2",
        "--output",
        f"{tmp_path}/e",
    ]
    assert main(command) == 0
    told = json.loads((tmp_path / "e" / "evaluation.json").read_text())["metrics"]["toys.level"]
    assert told["difference"]["mean"] == 0 and told["won"] == 0.5
    assert torch.isfinite(torch.tensor(told["policy"]["mean"]))
