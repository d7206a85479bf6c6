"""Other ways to few steps, for comparison: progressive distillation, T2V-Turbo, and CD decoupled as in AnimateLCM.

CD alone (latent consistency models) and VSD alone need no trainer of their own: they are
:class:`~distillation.trainer.DistillationTrainer` with ``vsd_steps=0`` or ``cd_steps=0``.
"""
