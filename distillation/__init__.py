"""Distil a many-step video diffusion teacher into a 1-4-step student."""
