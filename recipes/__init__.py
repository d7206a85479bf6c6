"""Compositions to copy: one file each, plus YAML."""

import latent_rewards.training  # noqa: F401 - mends a CPU build's torchvision before diffusers is imported
