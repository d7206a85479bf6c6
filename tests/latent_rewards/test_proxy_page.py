"""The page draws what the proxy says of held-out samples, each value where it is."""

import math
import re
from html.parser import HTMLParser

import pytest
import torch

from latent_rewards.proxies import ProxyConfig, train_proxy
from latent_rewards.proxies.refit import LEARNT_HELDOUT
from latent_rewards.proxy_page import proxy_page

VOID = {"meta", "br", "hr", "input", "link", "img", "source", "col"}


class Balance(HTMLParser):
    """Checks that every element that opens is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def proxy():
    latents = torch.randn(200, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    rewards = {"level": latents.mean(dim=(1, 2, 3, 4)), "<odd>": latents[:, 0].mean(dim=(1, 2, 3)) ** 3}
    rewards["<odd>"][::3] = math.nan
    config = ProxyConfig(trunk="linear", learning_curve=True, holdout_fraction=0.3)
    return train_proxy(latents, rewards, [f"clip {i % 40}" for i in range(200)], latent_space="vae-a", config=config)


def test_the_page_has_every_plot_of_every_reward_and_is_well_formed(proxy):
    page = proxy_page(proxy, "p").render()
    checked = Balance()
    checked.feed(page)
    assert not checked.open and checked.seen.count("svg") == 2 * 3 + 1
    for title in ("Predicted against true", "Reliability", "Learning curve"):
        assert page.count(f"<h3>{title}</h3>") == 2
    assert page.count("<h3>Score of held-out samples</h3>") == 1 and "&lt;odd&gt;" in page and "<odd>" not in page
    assert "vae-a" in page and f"A score above {proxy.ood_threshold(0.05):.3f}" in page
    row = next(row for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL) if "proxy" in row)
    assert f"{proxy.report['level']['mae']:.3f}" in row and f"{proxy.report['level']['calibration_error']:.3f}" in row


def test_a_scatter_has_a_point_for_each_known_sample(proxy):
    page = proxy_page(proxy, "p").render()
    figures = [part for part in page.split("<figure") if "Predicted against true" in part]
    for column, figure in enumerate(figures):
        known = int((~proxy.heldout.truth[:, column].isnan()).sum())
        assert figure.count('style="fill: #0072b2; fill-opacity: 0.5"') == known


def test_without_held_out_predictions_the_tables_remain(proxy):
    heldout, proxy.heldout = proxy.heldout, None
    page = proxy_page(proxy, "p").render()
    proxy.heldout = heldout
    assert "stored without its held-out predictions" in page and "Reliability" not in page and "Learning curve" in page


def test_it_says_where_the_networks_learnt_from_held_out_samples_since(proxy):
    latents = torch.randn(64, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    config = ProxyConfig(width=16, num_updates=60, ensemble_size=1, progress=False)
    networks = train_proxy(latents, latents.mean(dim=(1, 2, 3, 4)), config=config)
    assert LEARNT_HELDOUT in proxy_page(networks, "p").render()
    assert LEARNT_HELDOUT not in proxy_page(proxy, "p").render()
