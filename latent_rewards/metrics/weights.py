"""Weight files that a metric needs and this library does not ship.

Nothing is downloaded. A metric names the file it wants; the file is looked for where the caller says, else in the
folder named by the environment variable ``LATENT_REWARDS_WEIGHTS``, and it is read as safetensors only. What is read is
compared with the model it goes into, so that a file of another model or layout is refused by the names of its tensors
and never loaded in part.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from latent_rewards.contracts import DataError

VARIABLE = "LATENT_REWARDS_WEIGHTS"
_SHOWN = 4


@dataclass(frozen=True)
class WeightsFile:
    """A published set of weights.

    Attributes:
        name: file name it is looked for under, ending in ``.safetensors``.
        source: where its publisher offers it.
        megabytes: its size, roughly.
        licence: of the weights.
        note: what has to be done to the published file, if it is not safetensors as it comes.
    """

    name: str
    source: str
    megabytes: int
    licence: str = ""
    note: str = ""

    def locate(self, path: str | Path | None = None) -> Path:
        """Return the file: ``path``, ``path / name`` if that is a folder, else ``$LATENT_REWARDS_WEIGHTS / name``.

        Raises:
            DataError: there is no such file, or it is not named ``.safetensors``; the message says what is wanted.
        """
        folder = os.environ.get(VARIABLE)
        wanted = Path(path) if path is not None else Path(folder or ".") / self.name
        if wanted.is_dir():
            wanted = wanted / self.name
        if wanted.suffix != ".safetensors":
            raise DataError(f"{wanted}: weights are read as .safetensors only. {self.how_to_get()}")
        if not wanted.is_file():
            raise DataError(f"{wanted} does not exist. {self.how_to_get()}")
        return wanted

    def how_to_get(self) -> str:
        """Say which file is wanted, what it costs and where to put it."""
        facts = ", ".join(part for part in (f"about {self.megabytes} MB", self.licence) if part)
        note = f" {self.note}" if self.note else ""
        return (
            f"Wanted: {self.name} ({facts}), from {self.source}.{note} Put it into the folder that the environment "
            f"variable {VARIABLE} names, or pass its path as the option `weights`."
        )

    def read(self, path: str | Path | None = None, *, sha256: str | None = None) -> dict[str, Tensor]:
        """Return the tensors of the file.

        Args:
            path: see :meth:`locate`.
            sha256: of the file, or its beginning (8 characters or more), if it must be a certain one.

        Raises:
            DataError: the file is missing, damaged, or not the one that ``sha256`` names.
        """
        found = self.locate(path)
        if sha256 is not None:
            if len(sha256) < 8:
                raise DataError(f"sha256 must have at least 8 characters; got {sha256!r}")
            digest = file_sha256(found)
            if not digest.startswith(sha256.lower()):
                raise DataError(f"{found} has sha256 {digest}, not {sha256}. {self.how_to_get()}")
        try:
            return load_file(found)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{found} cannot be read as safetensors: {error}. {self.how_to_get()}") from error


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], *, name: str) -> None:
    """Load ``tensors`` into ``module``, all of them or none, as float32 and without gradients.

    Args:
        module: takes every tensor of its ``state_dict`` from the file.
        tensors: of the file, under the module's names.
        name: of the file, for messages.

    Raises:
        DataError: tensors are missing, left over or of another shape; the message names the first of each.
    """
    wanted = module.state_dict()
    shapes = [
        f"{key} is {list(tensors[key].shape)}, not {list(value.shape)}"
        for key, value in wanted.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    faults = [
        f"{kind} {', '.join(keys[:_SHOWN])}" + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
        for kind, keys in (
            ("without", sorted(set(wanted) - set(tensors))),
            ("with", sorted(set(tensors) - set(wanted))),
            ("where", shapes),
        )
        if keys
    ]
    if faults:
        raise DataError(f"{name} does not fit {type(module).__name__}: a file {'; '.join(faults)}")
    # A buffer that counts (BatchNorm's) keeps its integer dtype.
    module.load_state_dict({key: tensors[key].to(value.dtype) for key, value in wanted.items()})
    module.requires_grad_(False).eval()
