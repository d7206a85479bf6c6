"""What an update costs in passes of a network, so that trainings that are compared cost the same."""

from __future__ import annotations

import distillation as ds


def passes(config: ds.DistillationConfig, objective: str, *, frames: int = 1) -> float:
    """Return the forward passes that one update of an objective costs per sample; a backward pass counts as two.

    Args:
        config: the settings.
        objective: "vsd", "cd", "joint", "progressive" (a round after the first), or "image_cd" (single frames).
        frames: latent frames of a clip, of which an image is one.
    """
    guided = 2 if config.guides else 1
    exits = [exit_step for count in config.step_counts for exit_step in range(count)]
    chain = sum(exits) / len(exits)
    # Below ``guidance_start`` the teacher is not guided; what is kept costs a call of what was and a gradient.
    asked = guided if config.cd_max_time > config.guidance_start else 1
    cd = asked * config.solver_steps + 3 + 1 + (1 + 3 if config.cd_keep_weight else 0)
    # The student, the teacher's and the fake score's opinion; then the fake score, on these samples and on fresh ones.
    vsd = chain + 3 + guided + 1 + 3 + (config.fake_updates - 1) * (chain + 1 + 3)
    made = max(config.step_counts) if config.cd_on_samples else 0  # at once, the samples are VSD's
    costs = {"vsd": vsd, "cd": made + cd, "joint": vsd + cd, "progressive": 2 + 3, "image_cd": cd / frames}
    return costs[objective]
