"""`latent-rewards report`: a stored proxy's report as text and as a page."""

import pytest
import torch

from latent_rewards.cli import main
from latent_rewards.proxies import ProxyConfig, RewardProxy, train_proxy
from latent_rewards.proxies.text import PromptFeatures


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    latents = torch.randn(120, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("report") / "proxy"
    train_proxy(latents, latents.mean(dim=(1, 2, 3, 4)), config=ProxyConfig(trunk="linear")).save_pretrained(folder)
    return folder


def test_text_and_page(stored, tmp_path, capsys):
    assert main(["report", str(stored)]) == 0
    assert "reward  proxy" in capsys.readouterr().out
    page = tmp_path / "deep" / "page.html"
    assert main(["report", str(stored), "--html", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    assert "Predicted against true" in page.read_text() and "Reliability" in page.read_text()


def test_what_cannot_be_reported_says_why(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is no folder, and no name 'organisation/name'" in capsys.readouterr().err
    bare = RewardProxy(ProxyConfig(trunk="linear"), (1, 1, 2, 2), ("a",), PromptFeatures("none", 0))
    bare.save_pretrained(tmp_path / "bare")
    assert main(["report", str(tmp_path / "bare"), "--html", str(tmp_path / "page.html")]) == 2
    assert "has no report" in capsys.readouterr().err and not (tmp_path / "page.html").exists()
