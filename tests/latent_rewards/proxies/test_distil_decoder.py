"""A tiny decoder learns what a codec decodes, and a proxy on its frames learns what pixels show."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from latent_rewards.contracts import ConfigError, DataError, FingerprintMismatchError
from latent_rewards.proxies import Preferences, ProxyConfig, RewardProxy, distil_decoder, train_proxy
from latent_rewards.proxies.samples import gather_samples
from latent_rewards.proxies.trunks.tiny_decoder import TinyDecoder

SHAPE = (4, 2, 8, 8)


class MixingCodec:
    """Colours are the first three latent channels turned into one another; a frame is 32 pixels a side, T = 2 F - 1."""

    fingerprint = "mixing"
    mixture = torch.tensor([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])

    def __init__(self):
        self.decoded = 0

    def decode(self, latents):
        self.decoded += len(latents)
        colours = torch.einsum("kc,bcfhw->bfkhw", self.mixture, latents[:, :3]).sigmoid()
        frames = functional.interpolate(colours.flatten(0, 1), scale_factor=4).unflatten(0, colours.shape[:2])
        return frames.repeat_interleave(2, dim=1)[:, 1:]

    def encode(self, videos):
        raise NotImplementedError("nothing is encoded here")


def draw(count, seed):
    """Latents with a bar somewhere, and its length: positive for an upright bar, negative for a lying one."""
    source = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, *SHAPE, generator=source) * 0.3 - 2.0
    rewards = torch.zeros(count)
    for row in range(count):
        y, x, length, upright = (int(torch.randint(high, (), generator=source)) for high in (4, 4, 4, 2))
        tall, wide = (length + 2, 1) if upright else (1, length + 2)
        latents[row, :3, :, y : y + tall, x : x + wide] += 4.0
        rewards[row] = length + 1 if upright else -length - 1
    return latents, rewards


@pytest.fixture(scope="module")
def quick(quick):
    """Fewer updates than a user gets: what is drawn here is simple."""
    return lambda **changes: quick(**{"decoder_updates": 150, **changes})


@pytest.fixture(scope="module")
def trained(quick):
    latents, rewards = draw(400, 0)
    codec = MixingCodec()
    return train_proxy(latents, rewards, codec=codec, config=quick(trunk="pixels", num_updates=120)), codec


def samples_of(latents, **settings):
    return gather_samples(latents, torch.arange(len(latents)).double(), None, **settings)


def test_it_draws_what_the_codec_decodes(quick):
    latents, _ = draw(200, 0)
    decoder = distil_decoder.distil_decoder(MixingCodec(), samples_of(latents), torch.arange(160), quick())
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    drawn = decoder(latents[160:])
    wanted = functional.adaptive_avg_pool2d(MixingCodec().decode(latents[160:]).flatten(0, 1), 16).unflatten(0, (40, 3))
    assert drawn.shape == wanted.shape
    assert (drawn - wanted).square().mean() < 0.05 * wanted.var()


def test_the_same_seed_gives_the_same_decoder_and_reads_only_the_rows_it_may(quick):
    latents, _ = draw(64, 0)
    others = latents.clone()
    others[48:] = torch.nan
    settings, rows = quick(decoder_updates=5), torch.arange(48)
    first, second = (
        distil_decoder.distil_decoder(MixingCodec(), samples_of(latents), rows, settings) for _ in range(2)
    )
    samples = samples_of(latents)
    samples.latents = lambda indices: others[indices]
    third = distil_decoder.distil_decoder(MixingCodec(), samples, rows, settings)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]) and torch.equal(value, third.state_dict()[name])


def test_no_more_clips_are_decoded_than_asked_for(quick):
    (latents, _), codec = draw(64, 0), MixingCodec()
    settings = quick(decoder_clips=12, decoder_updates=5)
    distil_decoder.distil_decoder(codec, samples_of(latents), torch.arange(48), settings)
    assert codec.decoded == 12 + 1  # one more tells its geometry


def test_a_foreign_codec_or_one_that_decodes_no_video_is_refused(quick):
    latents, _ = draw(40, 0)
    rows = torch.arange(40)
    with pytest.raises(FingerprintMismatchError, match="'other' and the codec is 'mixing'"):
        distil_decoder.distil_decoder(MixingCodec(), samples_of(latents, latent_space="other"), rows, quick())
    broken = MixingCodec()
    broken.decode = lambda latents: MixingCodec().decode(latents) * torch.nan
    with pytest.raises(DataError, match="expected finite"):
        distil_decoder.distil_decoder(broken, samples_of(latents), rows, quick())


def test_a_proxy_on_pixels_learns_and_knows_its_latent_space(trained):
    proxy, codec = trained
    entry = proxy.report["reward"]
    assert entry["spearman"] > 0.97 > entry["ridge"]["spearman"]
    assert proxy.config.trunk == "pixels" and isinstance(proxy.shared, TinyDecoder)
    assert proxy.latent_space == codec.fingerprint
    assert codec.decoded == entry["num_train"] + 1, "each clip that may be looked at once, and one for its shape"


def test_each_reward_has_networks_that_are_judged_by_it_alone(trained, quick, tmp_path, monkeypatch):
    from latent_rewards.proxies import joint

    judged, keeper = [], joint.BestWeights
    monkeypatch.setattr(
        joint,
        "BestWeights",
        lambda networks, errors, *rest: judged.append((networks, errors)) or keeper(networks, errors, *rest),
    )
    latents, rewards = draw(300, 0)
    noise = torch.randn(300, generator=torch.Generator().manual_seed(1))
    config = quick(trunk="pixels", num_updates=120)
    proxy = train_proxy(latents, {"bar": rewards, "noise": noise}, codec=MixingCodec(), config=config)
    assert proxy.report["bar"]["spearman"] > 0.95 and abs(proxy.report["noise"]["spearman"]) < 0.4
    ((networks, errors),) = judged
    assert networks == [network for member in proxy.members for network in member.networks] and len(networks) == 6
    bar, hopeless = errors().unflatten(0, (3, 2)).unbind(1)
    assert (bar < 0.1).all() and (hopeless > 0.7).all()
    alone = trained[0].members[0]
    assert [p.shape for p in proxy.members[0].networks[1].parameters()] == [p.shape for p in alone.parameters()]
    proxy.save_pretrained(tmp_path / "p")
    seen = draw(4, 1)[0]
    before, after = proxy.scores(seen), RewardProxy.from_pretrained(tmp_path / "p").scores(seen)
    assert all(torch.equal(before[name], after[name]) for name in ("bar", "noise"))


def test_members_share_the_frames_and_are_differentiable(trained):
    proxy, _ = trained
    latents = draw(6, 1)[0].requires_grad_()
    calls = []
    hook = proxy.shared.register_forward_hook(lambda module, inputs, output: calls.append(tuple(output.shape)))
    proxy(latents).sum().backward()
    hook.remove()
    assert calls == [(6, 3, 3, 16, 16)]
    assert latents.grad is not None and bool(latents.grad.isfinite().all()) and float(latents.grad.abs().max()) > 0
    assert (proxy.predict(latents.detach()).std["reward"] > 0).all()


def test_no_latents_have_no_scores(trained):
    none = draw(1, 1)[0][:0]
    assert trained[0](none).shape == trained[0].predict(none).mean["reward"].shape == (0,)


def test_it_is_stored_with_its_decoder_and_loaded_without_a_codec(trained, tmp_path):
    proxy, _ = trained
    proxy.save_pretrained(tmp_path / "p")
    loaded = RewardProxy.from_pretrained(tmp_path / "p")
    latents = draw(8, 1)[0]
    assert torch.equal(loaded(latents), proxy(latents))
    assert torch.equal(loaded.predict(latents).ood["reward"], proxy.predict(latents).ood["reward"])


def test_an_update_moves_the_decoder_of_this_proxy_only(trained, tmp_path):
    proxy, _ = trained
    proxy.save_pretrained(tmp_path / "p")
    loaded = RewardProxy.from_pretrained(tmp_path / "p")
    latents, rewards = draw(64, 2)
    before = {name: value.clone() for name, value in proxy.shared.state_dict().items()}
    logs = loaded.update(latents, rewards, num_updates=8)
    assert logs["reward/mae_after"] < 1.0
    moved = [name for name, value in loaded.shared.state_dict().items() if not torch.equal(value, before[name])]
    assert "stem.weight" in moved and "output.weight" in moved and "latent_mean" not in moved
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(torch.equal(value, before[name]) for name, value in proxy.shared.state_dict().items())


def test_a_codec_chooses_pixels_and_automatic_choice_tries_them(quick):
    latents, rewards = draw(120, 0)
    automatic = quick(trunk="auto", selection_budget=30_000, decoder_updates=60)
    tried = train_proxy(latents, rewards, codec=MixingCodec(), config=automatic).selection["candidates"]
    with pytest.MonkeyPatch.context() as patch:
        quickly = partial(ProxyConfig, decoder_updates=1, num_updates=2, progress=False)
        patch.setattr("latent_rewards.proxies.fit.ProxyConfig", quickly)
        assert train_proxy(latents, rewards, codec=MixingCodec()).config.trunk == "pixels"
    assert set(tried) == {"linear", "conv3d", "transformer", "pixels"}


def test_what_cannot_be_combined_is_refused_before_anything_is_decoded(quick):
    latents, rewards = draw(64, 0)
    codec = MixingCodec()
    with pytest.raises(ConfigError, match="trunk 'conv3d' reads no pixels"):
        train_proxy(latents, rewards, codec=codec, config=quick())
    with pytest.raises(ConfigError, match="pass codec= to train_proxy"):
        train_proxy(latents, rewards, config=quick(trunk="pixels"))
    with pytest.raises(ConfigError, match="draws clean latents"):
        quick(trunk="pixels", noise_levels=(0.0, 0.5))
    pairs = Preferences(torch.arange(32), torch.arange(32, 64), torch.ones(32))
    with pytest.raises(ConfigError, match="trunk='pixels'"):
        train_proxy(latents, pairs, codec=codec, config=quick(trunk="pixels", objective="bradley_terry"))
    assert codec.decoded == 0


def test_a_decoder_learns_no_reward_before_a_policy_moves(quick):
    latents, rewards = draw(64, 0)
    settings = [quick(trunk="pixels", num_updates=8, refit_fraction=fraction) for fraction in (0.5, 0.0)]
    refitted, before = (train_proxy(latents, rewards, config=each, codec=MixingCodec()) for each in settings)
    for name, value in refitted.shared.state_dict().items():
        assert torch.equal(value, before.shared.state_dict()[name]), name
    assert not torch.equal(refitted.members[0].head.output.weight, before.members[0].head.output.weight)


def test_a_reward_of_which_nothing_was_learnt_is_not_learnt_by_heart(quick):
    latents, lengths = draw(200, 0)
    rewards = {"length": lengths, "luck": torch.randn(200, generator=torch.Generator().manual_seed(1))}
    settings = [quick(trunk="pixels", refit_fraction=fraction) for fraction in (0.5, 0.0)]
    refitted, before = (train_proxy(latents, rewards, config=each, codec=MixingCodec()) for each in settings)
    assert before.report["length"]["r2"] > 0 >= before.report["luck"]["r2"]
    pairs = zip(refitted.members, before.members, strict=True)
    for length, luck in (zip(new.networks, old.networks, strict=True) for new, old in pairs):
        assert not torch.equal(*(network.head.output.weight for network in length))
        assert all(map(torch.equal, luck[0].state_dict().values(), luck[1].state_dict().values()))


def test_a_proxy_takes_a_copy_of_the_decoder_it_is_given(trained):
    proxy, _ = trained
    given = TinyDecoder(**proxy.shared.geometry)
    two = [RewardProxy(proxy.config, SHAPE, ("reward",), proxy.prompt_features, decoder=given).shared for _ in range(2)]
    assert two[0] is not two[1] and given not in two
    assert torch.equal(two[0].stem.weight, given.stem.weight)


def test_nothing_is_decoded_where_latents_are_noisy_and_the_trunk_is_chosen(quick):
    latents, rewards = draw(64, 0)
    codec = MixingCodec()
    config = quick(trunk="auto", noise_levels=(0.0, 0.5), num_updates=2, selection_budget=20_000, ensemble_size=1)
    assert train_proxy(latents, rewards, codec=codec, config=config).config.trunk in ("conv3d", "transformer")
    assert codec.decoded == 0


def test_what_there_is_to_see_is_looked_at_once_for_all_members(quick, monkeypatch):
    from latent_rewards.proxies import members

    latents, rewards = draw(120, 0)
    proxy = train_proxy(latents, rewards, config=quick(trunk="pixels", num_updates=2), codec=MixingCodec())
    looked, look = [], members.look
    monkeypatch.setattr(members, "look", lambda frames: looked.append(len(frames)) or look(frames))
    proxy.scores(latents[:5], ["clip"] * 5)
    assert looked == [5]


def test_on_a_cpu_few_samples_are_drawn_at_once_and_seen_alike(quick, monkeypatch):
    from latent_rewards.proxies import members

    latents, rewards = draw(120, 0)
    proxy = train_proxy(latents, rewards, config=quick(trunk="pixels", num_updates=2), codec=MixingCodec())
    whole, looked, look = proxy.predict(latents[:7]), [], members.look
    monkeypatch.setattr(members, "look", lambda frames: looked.append(len(frames)) or look(frames))
    monkeypatch.setattr(members, "_DRAWN_ON_CPU", 3 * latents[0].numel())
    parts = proxy.predict(latents[:7])
    assert looked == [3, 3, 1]
    torch.testing.assert_close(parts.mean["reward"], whole.mean["reward"])
    torch.testing.assert_close(parts.ood["reward"], whole.ood["reward"])
    proxy(latents[:7].requires_grad_()).sum().backward()
    assert looked[3:] == [7], "a gradient keeps all of it anyway"


def test_a_prediction_draws_few_samples_and_judges_twice_as_many(quick, monkeypatch):
    from latent_rewards.proxies import members

    latents, rewards = draw(120, 0)
    prompts = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
    proxy = train_proxy(latents, rewards, prompts, config=quick(trunk="pixels", num_updates=9), codec=MixingCodec())
    whole, looked, judged, look = proxy.predict(latents[:14], prompts[:14]), [], [], members.look
    monkeypatch.setattr(members, "look", lambda frames: looked.append(len(frames)) or look(frames))
    monkeypatch.setattr("latent_rewards.proxies.prediction._NUMBERS_ON_CPU", 4 * latents[0].numel())
    proxy.members[0].trunk.register_forward_hook(lambda module, inputs, output: judged.append(len(output)))
    given, inputs = [], RewardProxy.member_inputs
    monkeypatch.setattr(RewardProxy, "member_inputs", lambda self, *part: given.append(part) or inputs(self, *part))
    parts = proxy.predict(latents[:14], prompts[:14])
    assert (looked, judged) == ([4, 3, 4, 3], [7, 7])
    assert torch.equal(torch.cat([clips for clips, _ in given]), proxy.normalise(latents[:14]))
    assert torch.equal(torch.cat([read for _, read in given]), proxy.read_prompts(prompts[:14], 14))
    assert whole.mean["reward"].std() > 0
    for kind in ("mean", "std", "ood"):
        torch.testing.assert_close(getattr(parts, kind)["reward"], getattr(whole, kind)["reward"])


def test_what_a_decoder_explains_is_a_share_of_the_variance():
    frames = torch.rand(10, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    samples, grey = samples_of(torch.arange(10.0)[:, None, None, None, None]), frames[:7].float().mean()

    def explained(part):
        def decoder(latents):
            return grey + part * (frames[latents.flatten().long()].float() - grey)

        return distil_decoder._explained(decoder, samples, torch.arange(7), dict(enumerate(frames)))

    for part, share in ((1.0, 1.0), (0.5, 0.75), (0.0, 0.0), (-1.0, -3.0)):
        assert explained(part) == pytest.approx(share, abs=1e-5)


def test_a_decoder_that_draws_nothing_is_told_of(quick, recwarn):
    latents, _ = draw(64, 0)
    given = samples_of(latents), torch.arange(64)
    distil_decoder.distil_decoder(MixingCodec(), *given, quick())
    assert not [warning for warning in recwarn if "tiny decoder" in str(warning.message)]
    with pytest.warns(UserWarning, match="the tiny decoder explains -?[0-9]+% of the variance"):
        distil_decoder.distil_decoder(MixingCodec(), *given, quick(decoder_updates=1))
