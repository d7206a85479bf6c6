"""Correspondence terms: where each latent vector goes from one frame to the next, matched to where a target's go.

``P_i(q | p) = softmax_q(<z_i(p), z_{i+1}(p + q)> / (sqrt(C) temperature))`` over the window ``|q| <= radius`` around
position p, and the soft flow is its expectation ``sum_q q P_i(q | p)``. Both are matched to a target's, so the motion
itself is never made smaller. No optical-flow network is needed, and everything happens in latent space.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from distillation.consistency import pseudo_huber
from distillation.errors import DistillationConfigError
from distillation.schedule import working_dtype
from distillation.temporal import check_rank, neighbouring_frames


def window_offsets(radius: int) -> Tensor:
    """Return the displacements of a window, float64 [(2 radius + 1)^2, 2] as (dy, dx) in latent pixels, row by row."""
    reach = torch.arange(-radius, radius + 1, dtype=torch.float64)
    return torch.cartesian_prod(reach, reach)


def frame_matches(
    latents: Tensor, *, radius: int = 2, temperature: float = 1.0, mask_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the matches of neighbouring frames, and which of them lie inside the frame.

    Args:
        latents: [B, C, F, H, W]; network features of that layout serve too.
        radius: of the window, in latent pixels; motion beyond it is not seen.
        temperature: divides the scores on top of sqrt(C); towards 0 the best match takes all.
        mask_first: leave out the pair of frames 0 and 1 (causal VAEs).

    Returns:
        log P [B, F - 1, H, W, (2 radius + 1)^2], float32 or float64, -inf outside the frame (F - 2 pairs with the first
        one masked), and a mask [H, W, (2 radius + 1)^2], True inside.

    Raises:
        NoiseError: the latents have another rank, or no pair is left.
        DistillationConfigError: ``radius`` is less than 1 or ``temperature`` not positive.
    """
    if radius < 1:
        raise DistillationConfigError(f"radius must be at least 1 latent pixel, or no motion is seen; got {radius}")
    if not temperature > 0:
        raise DistillationConfigError(f"temperature must be positive; got {temperature}")
    check_rank(latents)
    earlier, later = neighbouring_frames(latents.to(working_dtype(latents)), mask_first=mask_first)
    channels, height, width = latents.shape[1], latents.shape[3], latents.shape[4]
    padded = functional.pad(later, (radius,) * 4)
    within = functional.pad(torch.ones(height, width, dtype=torch.bool, device=latents.device), (radius,) * 4)
    scores, inside = [], []
    # One displacement at a time: an unfolded copy of all windows would be (2 radius + 1)^2 times the latents.
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            moved = padded[..., dy : dy + height, dx : dx + width]
            scores.append((earlier * moved).sum(dim=1))
            inside.append(within[dy : dy + height, dx : dx + width])
    mask = torch.stack(inside, dim=-1)
    logits = torch.stack(scores, dim=-1) / (math.sqrt(channels) * temperature)
    return logits.masked_fill(~mask, -math.inf).log_softmax(dim=-1), mask


def soft_flow(latents: Tensor, *, radius: int = 2, temperature: float = 1.0, mask_first: bool = False) -> Tensor:
    """Return the expected displacement of every position from each frame to the next.

    Arguments and errors are those of :func:`frame_matches`.

    Returns:
        [B, F - 1, H, W, 2] as (dy, dx) in latent pixels, each in [-radius, radius]; F - 2 pairs with the first masked.
    """
    log_p, _ = frame_matches(latents, radius=radius, temperature=temperature, mask_first=mask_first)
    return log_p.exp() @ window_offsets(radius).to(log_p)


def correspondence_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    kind: Literal["flow", "kl"] = "flow",
    radius: int = 2,
    temperature: float = 1.0,
    huber_c: float = 1.0,
    mask_first: bool = False,
) -> Tensor:
    """Return how far the motion of ``prediction`` is from the target's; zero where they match, and never negative.

    Args:
        prediction: latents that carry the gradient [B, C, F, H, W]: f_theta(x_t, t) in CD, x in VSD.
        target: likewise, it gets no gradient: f_ema(x_s, s) in CD, :func:`~distillation.vsd.vsd_target` in VSD.
        kind: "flow" is the pseudo-Huber distance of the soft flows, in latent pixels; "kl" is KL(P_target || P) in
            nats, the mean over positions and pairs, which also sees matches that average to the same flow.
        radius: see :func:`frame_matches`.
        temperature: likewise.
        huber_c: width of the quadratic part of "flow", in latent pixels.
        mask_first: leave out the pair of frames 0 and 1 (causal VAEs).

    Raises:
        NoiseError: the latents have another rank, or no pair is left.
        DistillationConfigError: an unknown kind or a value out of range.
    """
    if kind not in ("flow", "kl"):
        raise DistillationConfigError(f"kind must be 'flow' or 'kl'; got {kind!r}")
    target = target.detach()
    if kind == "flow":
        flow, wanted = (
            soft_flow(latents, radius=radius, temperature=temperature, mask_first=mask_first)
            for latents in (prediction, target)
        )
        return pseudo_huber(flow, wanted, huber_c)
    (log_p, mask), (log_wanted, _) = (
        frame_matches(latents, radius=radius, temperature=temperature, mask_first=mask_first)
        for latents in (prediction, target)
    )
    # Outside the frame both are -inf, whose difference would be NaN.
    difference = log_wanted.masked_fill(~mask, 0) - log_p.masked_fill(~mask, 0)
    return (log_wanted.exp() * difference).sum(dim=-1).mean()
