"""Members on a backbone: its blocks run once per batch, each member leaves out its own samples, adapters learn."""

import math
from types import SimpleNamespace

import pytest
import torch

from latent_rewards.contracts import ConfigError, FingerprintMismatchError
from latent_rewards.proxies import RewardProxy, WanBackbone, joint, train_proxy
from latent_rewards.proxies.features import linear_features
from latent_rewards.proxies.heads import SeparateMember
from latent_rewards.proxies.joint import JointMember, JointReader, joint_loss, left_out, network_errors, networks_of
from latent_rewards.proxies.text import PromptFeatures
from latent_rewards.proxies.trunks.tiny_decoder import TinyDecoder

SHAPE = (4, 2, 4, 4)
WORDS = {"still": 0, "moving": 1, "clip": 2}


def embed(texts):
    """One token of the transformer's text dimension per word."""
    tokens = torch.zeros(len(texts), 3, 12)
    for row, text in enumerate(texts):
        for column, word in enumerate(text.split()):
            tokens[row, column, WORDS.get(word, 3)] = 1.0
    return tokens


@pytest.fixture(scope="module")
def backbone(make_wan):
    return WanBackbone(make_wan(), num_blocks=2, embed=embed, text_length=4)


def draw(count, seed):
    source = torch.Generator().manual_seed(seed)
    offsets = torch.randn(count, 4, 1, 1, 1, generator=source)
    latents = offsets + 0.5 * torch.randn(count, *SHAPE, generator=source)
    return latents, latents[:, 0].mean(dim=(1, 2, 3)) - latents[:, 1].mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def trained(backbone, quick):
    latents, rewards = draw(300, 0)
    prompts = [f"{'still' if i % 2 else 'moving'} clip {i % 30}" for i in range(300)]
    return train_proxy(latents, rewards, prompts, config=quick(trunk="backbone", num_updates=50), backbone=backbone)


def count_calls(backbone):
    calls = []
    hook = backbone.transformer.blocks[0].register_forward_hook(
        lambda module, inputs, output: calls.append(len(output))
    )
    return calls, hook


def test_what_a_transformer_keeps_of_a_prediction_can_be_climbed_through(trained, backbone):
    kept = {}
    hook = backbone.transformer.blocks[0].register_forward_hook(
        lambda module, inputs, output: output * kept.setdefault("ones", torch.ones_like(output[:1]))
    )
    latents, prompts = draw(2, 1)[0], ["still clip", "moving clip"]
    try:
        before = trained.predict(latents, prompts).mean["reward"]
        climbed = trained(latents.requires_grad_(), prompts)
        climbed.sum().backward()
    finally:
        hook.remove()
    assert kept and latents.grad.abs().sum() > 0
    torch.testing.assert_close(climbed.detach(), before)


def test_heads_on_frozen_features_learn_and_disagree(trained):
    assert trained.report["reward"]["spearman"] > 0.8
    assert trained.prompt_features == PromptFeatures("tokens", 12, encoded=True)
    latents = draw(8, 1)[0]
    _, variance = trained.ensemble(trained.normalise(latents), trained.read_prompts(["still clip"] * 8, 8))
    assert (variance > 0).all() and not any(p.requires_grad for p in trained.parameters())


def test_the_blocks_run_once_per_batch_whatever_the_ensemble(trained, backbone):
    latents = draw(150, 1)[0]
    calls, hook = count_calls(backbone)
    trained.predict(latents, ["still clip"] * 150)
    trained(latents[:5], ["still clip"] * 5)
    assert calls == [75, 75, 5]
    calls.clear()
    trained.update(latents, draw(150, 1)[1], ["still clip"] * 150, num_updates=0)
    evaluating = len(calls)
    calls.clear()
    trained.update(latents, draw(150, 1)[1], ["still clip"] * 150, num_updates=7)
    assert len(calls) == evaluating + 7 and calls.count(64) == 7
    hook.remove()


def test_the_transformer_sees_latents_and_prompts_before_scaling(trained, backbone):
    latents, prompts = draw(4, 1)[0], ["still clip", "moving clip", "clip", "moving"]
    read = trained.read_prompts(prompts, 4)
    inputs = trained.member_inputs(trained.normalise(latents), read)
    shared = trained.shared
    expected = (backbone.features(latents, embed(prompts), torch.zeros(4)) - shared.feature_mean) / shared.feature_std
    torch.testing.assert_close(inputs[0], expected, rtol=1e-3, atol=1e-3)
    assert inputs[1] is read


def test_what_is_stored_is_heads_and_the_fingerprint(trained, backbone, make_wan, tmp_path):
    trained.save_pretrained(tmp_path / "p")
    assert not any("blocks" in name for name in trained.state_dict())
    loaded = RewardProxy.from_pretrained(
        tmp_path / "p", backbone=WanBackbone(make_wan(), num_blocks=2, embed=embed, text_length=4)
    )
    latents, prompts = draw(5, 1)[0], ["still clip"] * 5
    assert torch.equal(loaded(latents, prompts), trained(latents, prompts))
    with pytest.raises(ConfigError, match="'backbone' reads a backbone; pass it"):
        RewardProxy.from_pretrained(tmp_path / "p")
    other = WanBackbone(make_wan(1), num_blocks=2, embed=embed, text_length=4)
    with pytest.raises(FingerprintMismatchError, match=f"{backbone.fingerprint}.*{other.fingerprint}"):
        RewardProxy.from_pretrained(tmp_path / "p", backbone=other)


def test_a_backbone_nobody_reads_is_refused(backbone, quick):
    with pytest.raises(ConfigError, match="'conv3d' reads no backbone"):
        train_proxy(*draw(64, 0), config=quick(), backbone=backbone)
    with pytest.raises(ConfigError, match="'backbone_linear' reads a backbone"):
        train_proxy(*draw(64, 0), config=quick(trunk="backbone_linear"))
    proxy = train_proxy(*draw(40, 0), backbone=backbone, config=quick(trunk="backbone_linear"))
    assert proxy.shared is not None


@pytest.mark.parametrize("prompts", [None, [f"{'still' if i % 3 else 'moving'} clip" for i in range(120)]])
def test_a_linear_probe_is_scikit_learns_ridge_on_pooled_features(backbone, quick, prompts):
    from sklearn.linear_model import Ridge

    latents, rewards = draw(120, 0)
    config = quick(trunk="backbone_linear", ridge_alpha=3.0)
    proxy = train_proxy(latents, rewards, prompts, config=config, backbone=backbone)
    read = proxy.read_prompts(prompts, 120)
    features = linear_features(*proxy.member_inputs(proxy.normalise(latents), read)[:2])
    assert features.shape[1] == 48 + (12 if prompts else 0)
    from latent_rewards.proxies.samples import gather_samples, split_samples

    rows, _ = split_samples(gather_samples(latents, rewards, prompts), config.holdout_fraction, 0)
    torch.testing.assert_close(features[rows, :48].mean(dim=0), torch.zeros(48).double(), rtol=0, atol=1e-6)
    model = Ridge(alpha=3.0).fit(features[rows].numpy(), rewards[rows].double().numpy())
    predicted = proxy(latents.double(), prompts)
    torch.testing.assert_close(predicted, torch.from_numpy(model.predict(features.numpy())), rtol=0, atol=1e-6)
    assert proxy.report["reward"]["spearman"] > 0.8 and proxy.report["reward"]["ridge"]["spearman"] > 0.9
    few = latents[:2].clone().requires_grad_()
    proxy(few, prompts and prompts[:2]).sum().backward()
    assert (few.grad != 0).all()


def test_members_leave_out_their_folds():
    folds = torch.tensor([0, 1, 2, 0, 1, 2])
    skipped, judged = left_out(folds, 4, adapters=False)
    assert torch.equal(skipped, judged)
    assert [folds[judged[:, m]].unique().tolist() for m in range(4)] == [[0], [1], [2], [0]]
    skipped, judged = left_out(folds, 3, adapters=True)
    assert all(folds[judged[:, m]].unique().tolist() == [0] for m in range(3))
    assert [folds[skipped[:, m]].unique().tolist() for m in range(3)] == [[0, 1], [0, 2], [0, 1]]


def test_a_left_out_sample_teaches_its_member_nothing(trained):
    class Plain:
        def targets(self, indices):
            return torch.stack([indices.float(), -indices.float()], dim=1)

        def __call__(self, indices):
            return "latents", "prompts", None, "t"

    counted = torch.tensor([[True, False], [True, True], [False, True]])
    reader = JointReader(Plain(), counted, 2)
    targets = reader.targets(torch.tensor([2, 0]))
    nan = math.nan
    torch.testing.assert_close(targets, torch.tensor([[nan, nan, 2.0, -2.0], [0.0, -0.0, nan, nan]]), equal_nan=True)
    latents, prompts, joined, t = reader(torch.tensor([1]))
    assert (latents, prompts, t) == ("latents", "prompts", "t") and joined.tolist() == [[1, -1, 1, -1]]
    joint = JointMember(trained)
    assert {id(p) for p in joint.parameters()} == {id(p) for p in trained.members.parameters()}
    latents, read = trained.normalise(draw(3, 1)[0]), trained.read_prompts(["clip"] * 3, 3)
    mean, _ = trained.ensemble(latents, read)
    torch.testing.assert_close(joint(latents, read).mean(dim=1, keepdim=True), mean)


def test_adapters_are_trained_stored_and_updated(backbone, make_wan, quick, tmp_path):
    latents, rewards = draw(200, 0)
    config = quick(trunk="backbone", adapter_rank=2, num_updates=26, ensemble_size=2, use_prompts=False)
    proxy = train_proxy(latents, rewards, config=config, backbone=backbone)
    ups = [value for name, value in proxy.shared.adapters.items() if "lora_B" in name]
    assert len(ups) == 16 and any((value != 0).any() for value in ups)
    proxy.save_pretrained(tmp_path / "p")
    fresh = WanBackbone(make_wan(), num_blocks=2, text_length=4)
    loaded = RewardProxy.from_pretrained(tmp_path / "p", backbone=fresh)
    assert torch.equal(loaded(latents[:4]), proxy(latents[:4]))
    before = [value.clone() for value in ups]
    loaded.update(latents[:40], rewards[:40], num_updates=3)
    assert not torch.equal(loaded(latents[:4]), proxy(latents[:4]))
    assert all(torch.equal(value, old) for value, old in zip(ups, before, strict=True))
    assert not any(p.requires_grad for p in [*loaded.parameters(), *backbone.parameters()])
    again = train_proxy(latents, rewards, config=config, backbone=fresh)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in proxy.state_dict().items())


def test_noise_levels_reach_the_transformer(backbone, quick):
    latents, rewards = draw(120, 0)
    config = quick(trunk="backbone", noise_levels=(0.0, 0.8), num_updates=10, ensemble_size=2)
    proxy = train_proxy(latents, rewards, config=config, backbone=backbone)
    one, two = (proxy.member_inputs(latents[:2], None, torch.full((2,), t))[0] for t in (0.1, 0.7))
    assert not torch.allclose(one, two)
    assert len(proxy.report["reward"]["noise"]) == 5


def test_the_joint_loss_is_that_of_each_member_on_what_it_is_trained_on():
    source = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 3, 4, generator=source, dtype=torch.float64)  # three members, two means, two variances
    targets = torch.randn(5, 3, 2, generator=source, dtype=torch.float64)
    targets[0, 1] = math.nan
    proxy = SimpleNamespace(config=SimpleNamespace(objective="gaussian", huber_delta=1.0), members=[0, 1, 2])
    mean, std = outputs[..., :2], (outputs[..., 2:] / 2).exp()
    known = ~targets.isnan()
    exact = -torch.distributions.Normal(mean, std).log_prob(targets.nan_to_num())[known].mean()
    torch.testing.assert_close(joint_loss(proxy)(outputs.flatten(1), targets.flatten(1)), exact)


@pytest.mark.parametrize("separate", [False, True])
def test_every_network_is_judged_by_its_own_rewards(separate):
    source = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 2, 2, 3, generator=source, dtype=torch.float64)  # two members, mean and variance of three
    targets = torch.randn(5, 2, 3, generator=source, dtype=torch.float64)
    targets[0, 1, 2] = math.nan
    networks = [torch.nn.Identity() for _ in range(6)]
    members = [SeparateMember(networks[:3]), SeparateMember(networks[3:])] if separate else networks[:2]
    proxy = SimpleNamespace(config=SimpleNamespace(objective="gaussian", huber_delta=1.0), members=members)
    mean, log_variance = outputs.unbind(2)
    nll = 0.5 * ((mean - targets).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))
    expected = nll.nanmean(dim=0).flatten() if separate else nll.flatten(2).transpose(0, 1).flatten(1).nanmean(dim=1)
    torch.testing.assert_close(network_errors(proxy, outputs.flatten(1), targets.flatten(1)), expected)
    assert networks_of(proxy) == (networks if separate else members)


@pytest.mark.parametrize("trunk", ["conv3d", "pixels"])
@pytest.mark.parametrize("redraw", [False, True])
def test_what_shares_nothing_goes_on_with_sources_of_its_own_and_all_at_the_rate_asked_for(
    quick, monkeypatch, trunk, redraw
):
    decoder = TinyDecoder(4, stride=1, zoom=4, frames_per_latent=1, dropped=0) if trunk == "pixels" else None
    settings = quick(trunk=trunk, learning_rate=0.01, input_noise=0.5)
    proxy = RewardProxy(settings, SHAPE, ("a",), PromptFeatures("none", 0), decoder=decoder)
    calls = []
    monkeypatch.setattr(joint, "train_member", lambda *given, **settings: calls.append((*given, settings)))
    reader = SimpleNamespace(noised=lambda source: SimpleNamespace(draws_from=source))
    joint.continue_training(
        proxy,
        reader,
        lambda source: [source.initial_seed()],
        lambda number: torch.Generator().manual_seed(number),
        rate=0.25,
        redraw=redraw,
    )
    assert [batches for _, _, batches, _ in calls] == ([[0], [1], [2]] if decoder is None else [[0]])
    for _, noised, _, settings in calls:
        noised = noised if decoder is None else noised._reader
        assert noised.draws_from is settings["source"] and settings["learning_rate"] == 0.0025
        assert settings["input_noise"] == 0.5
    learns = {parameter for member, *_ in calls for parameter in member.parameters()}
    assert learns == {*proxy.members.parameters(), *(proxy.shared.parameters() if decoder and redraw else ())}
