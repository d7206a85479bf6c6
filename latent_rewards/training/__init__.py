"""What any training loop here needs: a loop, checkpoints that are whole or absent, stateless randomness, ranks."""
