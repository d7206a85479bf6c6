import torch

from recipes.moving_digits.components import build_vae
from recipes.moving_digits.train_vae import VaeConfig, decode_unclamped, normalise, train_vae, vae_loss
from recipes.moving_digits.world import draw_specs, render


def test_a_black_prediction_still_gets_a_gradient():
    """The stock decoder clamps its output, so a decoder that answers black everywhere would never learn."""
    vae = build_vae(0)
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(-5.0)
    latents = torch.zeros(1, 16, 2, 8, 8)
    decoded = decode_unclamped(vae, latents)
    assert decoded.shape == (1, 3, 5, 32, 32) and float(decoded.detach().max()) < -1
    decoded.mean().backward()
    assert float(vae.decoder.conv_out.bias.grad.abs().sum()) > 0
    assert torch.equal(vae.decode(latents).sample, torch.full_like(decoded, -1.0))


def test_loss_is_reconstruction_plus_weighted_kl():
    vae = build_vae(0)
    clips = render(draw_specs(2, seed=0), seed=0)[:, :5]
    noise = torch.zeros(2, 16, 2, 8, 8)
    (plain, l1), (weighed, _) = (vae_loss(vae, clips, noise, weight) for weight in (0.0, 1.0))
    assert 0 < float(l1) < float(plain.detach()) < float(weighed.detach())


def test_two_updates_run_and_the_config_holds_the_latents_statistics(tmp_path):
    vae = train_vae(VaeConfig(num_steps=2, batch_size=2, output_dir=str(tmp_path)))
    normalise(vae, seed=0, num_clips=8)
    assert len(vae.config.latents_mean) == 16 and all(s > 0 for s in vae.config.latents_std)
    assert (tmp_path / "step-00000002").is_dir()
