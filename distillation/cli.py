"""``latent-distill``: distillation from a shell.

    latent-distill run --config recipes/configs/distill_wan2.1_1.3b.yaml
    latent-distill encode Wan-AI/Wan2.1-T2V-1.3B-Diffusers --videos clips/ --num-frames 81 --height 480 --width 832 \
--output cache
    latent-distill sample runs/distilled/student --prompt "a red digit moves left" --num-steps 4 --output out.mp4
    latent-distill info runs/distilled/student

Every command goes on where it was killed when it is given again. Exit codes: 0, 1 if some of the work failed, 2 if it
could not begin.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distillation import encode_command, info_command, run_command, sample_command
from distillation.errors import DistillationError
from latent_rewards.training.settings import SettingsError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="latent-distill", description=__doc__, formatter_class=style)
    rooms = parser.add_subparsers(required=True, metavar="COMMAND")
    for room in (run_command, encode_command, sample_command, info_command):
        room.add_parser(rooms)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 if some of the work failed, 2 if it could not begin."""
    options = build_parser().parse_args(arguments)
    from latent_rewards.training.checkpoint import CheckpointError

    try:
        return int(options.run(options))
    except (DistillationError, SettingsError, CheckpointError, ImportError) as error:
        print(f"latent-distill: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
