"""`latent-rewards fit`: a dataset becomes a stored proxy, and every setting is a flag with its help."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from latent_rewards import collect_command
from latent_rewards.cli import build_parser, main
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies import ProxyConfig, RewardProxy
from latent_rewards.training.flags import attribute_docs, chosen_settings


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards") / "data"
    latents = torch.randn(120, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    rewards = {"level": latents.mean(dim=(1, 2, 3, 4))}
    RewardDataset.from_tensors(
        latents,
        [f"clip {i % 30}" for i in range(120)],
        rewards,
        latent_space="vae",
        metric_fingerprints={"level": "m@1"},
    ).save(folder)
    return folder


def test_a_dataset_becomes_a_proxy_with_its_report_and_card(dataset, tmp_path, capsys):
    flags = ["--trunk", "linear", "--ridge-alpha", "0.5", "--no-use-prompts", "--seed", "3", "--learning-curve"]
    assert main(["fit", str(dataset), "--output", str(tmp_path / "proxy"), *flags]) == 0
    printed = capsys.readouterr().out
    proxy = RewardProxy.from_pretrained(tmp_path / "proxy")
    assert "level   proxy" in printed and "level: Spearman with" in printed and "90% covers" in printed
    assert (proxy.config.trunk, proxy.config.ridge_alpha, proxy.config.use_prompts, proxy.config.seed) == (
        "linear", 0.5, False, 3,
    )  # fmt: skip
    assert (proxy.latent_space, proxy.metric_fingerprints) == ("vae", {"level": "m@1"})
    assert "| latent space | `vae` |" in (tmp_path / "proxy" / "README.md").read_text()
    assert json.loads((tmp_path / "proxy" / "proxy.json").read_text())["config"]["learning_curve"] is True


def test_with_a_codec_the_proxy_reads_pixels(toys, tmp_path, monkeypatch):
    latents = torch.randn(80, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    RewardDataset.from_tensors(latents, ["a"] * 80, {"level": latents.mean(dim=(1, 2, 3, 4))}).save(tmp_path / "data")
    (tmp_path / "codec").mkdir()
    point = SimpleNamespace(name="toy", load=lambda: lambda path: toys.Codec())
    monkeypatch.setattr(
        collect_command, "entry_points", lambda group: [point] if group == "latent_rewards.codecs" else []
    )
    arguments = ["fit", str(tmp_path / "data"), "--output", str(tmp_path / "proxy")]
    arguments += ["--num-updates", "5", "--decoder-updates", "5"]
    assert main([*arguments, "--codec", str(tmp_path / "codec"), "--kind", "toy"]) == 0
    proxy = RewardProxy.from_pretrained(tmp_path / "proxy")
    assert (proxy.config.trunk, proxy.config.num_updates, proxy.latent_space) == ("pixels", 5, "toy-codec")


def test_every_setting_is_a_flag_that_says_what_the_docstring_says(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    documented = attribute_docs(ProxyConfig)
    assert set(documented) == {field.name for field in dataclasses.fields(ProxyConfig)}
    for field in dataclasses.fields(ProxyConfig):
        assert f"--{field.name.replace('_', '-')}" in shown and f"(default: {field.default})" in shown
        assert documented[field.name].split(":mod:")[0].split()[0] in shown


def test_only_what_was_given_is_chosen_and_read_as_its_type():
    options = build_parser().parse_args(
        [
            "fit",
            "d",
            "--output",
            "o",
            "--num-updates",
            "none",
            "--width",
            "32",
            "--learning-rate",
            "1e-3",
            "--device",
            "cpu",
        ]
    )
    assert chosen_settings(options, ProxyConfig) == {
        "num_updates": None, "width": 32, "learning_rate": 1e-3, "device": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/none", "--output", "{out}"], "holds no dataset.json"),
        (["{root}", "--output", "{out}", "--width", "12"], "width must be a multiple of 8; got 12"),
        (["{root}", "--output", "{out}", "--min-samples", "500"], "120 samples are too few"),
    ],
)
def test_what_cannot_begin_says_why(dataset, tmp_path, capsys, arguments, message):
    out = tmp_path / "proxy"
    assert main(["fit", *(argument.format(root=dataset, out=out) for argument in arguments)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("latent-rewards: ") and not out.exists()


def test_a_number_that_is_none_is_refused(dataset, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", str(dataset), "--output", str(tmp_path / "proxy"), "--width", "wide"])
    assert "--width: invalid int value: 'wide'" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_refused_before_the_training(dataset, monkeypatch, capsys):
    monkeypatch.setattr("latent_rewards.proxies.train_proxy", None)
    for taken in (dataset, dataset.parent):
        assert main(["fit", str(dataset), "--output", str(taken), "--trunk", "linear"]) == 2
        assert f"{taken} exists and was not written by this library" in capsys.readouterr().err
    assert len(RewardDataset.load(dataset)) == 120
