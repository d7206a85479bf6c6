"""What any training loop here needs: a loop, checkpoints that are whole or absent, stateless randomness, ranks."""

from latent_rewards.training.torchvision_guard import mend_torchvision

mend_torchvision()
