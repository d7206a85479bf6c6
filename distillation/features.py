"""Features from inside a denoiser's transformer, for terms that compare or judge latents by them.

diffusers' video transformers keep their blocks in a list, ``blocks`` (Wan) or ``transformer_blocks`` (CogVideoX, LTX,
HunyuanVideo, Mochi); a block puts out video tokens [B, S, D], alone or followed by text tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distillation.errors import DistillationConfigError, NoiseError
from distillation.roles import Role

_BLOCK_LISTS = ("blocks", "transformer_blocks")


class _BlockReached(Exception):
    """Leaves a network's forward pass once the features are known."""


class BlockFeatures:
    """The output of one transformer block of a denoiser: ``features(x_t, t, condition) -> [B, F, N, D]``.

    The gradient flows to x_t, and to the network's weights where they ask for it: freeze a teacher. For a temporal term
    bind time and condition, e.g. ``lambda latents: features(latents, t, condition)``.

    Args:
        denoiser: a :class:`~distillation.denoiser.Denoiser` around a diffusers video transformer, patches one latent
            frame long.
        block: index of the block; a negative one counts from the end. Early ones describe motion and texture.
        early_exit: leave the network after that block, which saves the time and memory of the rest. False for a network
            that is sharded (FSDP) and so must run to its end.

    Raises:
        DistillationConfigError: the denoiser has no list of blocks, or several (two experts), or no such block.
    """

    def __init__(self, denoiser: nn.Module, block: int, *, early_exit: bool = True) -> None:
        network = denoiser.roles.teacher if isinstance(denoiser, Role) else denoiser
        blocks = find_blocks(network)
        if not -len(blocks) <= block < len(blocks):
            raise DistillationConfigError(
                f"block must lie in 0..{len(blocks) - 1}, the blocks of this network; got {block}"
            )
        self.denoiser = denoiser
        self.block = blocks[block]
        index = block % len(blocks)
        self._next = blocks[index + 1] if early_exit and index + 1 < len(blocks) else None
        self._network = network

    @property
    def dim(self) -> int:
        """D, the channels of a token.

        Raises:
            DistillationConfigError: the network's configuration does not tell.
        """
        for module in self._network.modules():
            config: Any = getattr(module, "config", None) or {}
            if "num_attention_heads" in config and "attention_head_dim" in config:
                return int(config["num_attention_heads"] * config["attention_head_dim"])
        raise DistillationConfigError(
            f"the configuration of {type(self._network).__name__} does not tell the channels of its blocks"
        )

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:  # noqa: ANN401 - any Condition
        """Return the features of x_t [B, C, F, H, W] at t ([] or [B]): F frames of N tokens of D channels.

        Raises:
            NoiseError: the tokens do not divide into the frames of x_t.
        """
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401 - what blocks take and give
            seen.append(output[0] if isinstance(output, tuple) else output)

        def leave(module: nn.Module, inputs: Any) -> None:  # noqa: ANN401
            raise _BlockReached

        hooks = [self.block.register_forward_hook(keep)]
        if self._next is not None:
            # From the next block and not from this one: this one may still be inside activation checkpointing.
            hooks.append(self._next.register_forward_pre_hook(leave))
        try:
            self.denoiser(x_t, t, condition)
        except _BlockReached:
            return _by_frame(seen[0], x_t)
        finally:
            for hook in hooks:
                hook.remove()
        return _by_frame(seen[0], x_t)


def find_blocks(denoiser: nn.Module) -> nn.ModuleList:
    """Return the transformer blocks of a denoiser.

    Raises:
        DistillationConfigError: there is no list of blocks, or several: of two experts each sees only some samples.
    """
    attributes = (getattr(module, name, None) for module in denoiser.modules() for name in _BLOCK_LISTS)
    found = [blocks for blocks in attributes if isinstance(blocks, nn.ModuleList) and len(blocks)]
    if len(found) == 1:
        return found[0]
    raise DistillationConfigError(
        f"{type(denoiser).__name__} has {len(found) or 'no'} lists of blocks ({' or '.join(_BLOCK_LISTS)}), and "
        "features are of the only one; set feature_weight and adversarial_weight to 0, or pass a function "
        "latents -> [B, F, N, D] in place of BlockFeatures"
    )


def _by_frame(tokens: Tensor, x_t: Tensor) -> Tensor:
    """Return video tokens [B, S, D], frame by frame, as [B, F, N, D]."""
    frames = x_t.shape[2]
    if tokens.ndim != 3 or tokens.shape[1] % frames:
        raise NoiseError(
            f"a block put out {list(tokens.shape)} for {frames} latent frames; features are tokens [B, S, D] with S a "
            "multiple of the frames: choose another block, or pass a function of your own"
        )
    return tokens.unflatten(1, (frames, -1))
