"""Latent-space reward proxies for few-step video generators."""
