"""The folder of a run: its settings, and what each stage made, so that a run goes on where it was killed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from latent_rewards.training.checkpoint import MANIFEST, check_target, commit_directory, write_whole
from latent_rewards.training.history import read_history
from latent_rewards.training.ranks import current_ranks
from latent_rewards.training.settings import SettingsError

Part = TypeVar("Part")


class RunFolder:
    """Where a run is kept; in a launch of several processes the first one writes.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.ranks = path, current_ranks()

    def remember(self, settings: Mapping[str, Any]) -> None:
        """Keep the settings of the run, each section a dataclass, and refuse to continue it with others.

        A setting that was not known when the folder was begun had its default's effect.

        Raises:
            SettingsError: the folder was begun with other settings (the message names the first that differs), or its
                settings cannot be read.
            FolderInUseError: it holds somebody else's ``settings``.
        """
        current = json.loads(json.dumps({name: dataclasses.asdict(section) for name, section in settings.items()}))
        stored = self.path / "settings" / "settings.json"
        if stored.is_file():
            try:
                before = json.loads(stored.read_text())
            except ValueError as error:
                raise SettingsError(f"{stored} is damaged ({error}); restore it, or use another folder") from error
            for section, values in current.items():
                # A setting without a default is as it was, unless all of its section is new to this folder.
                known = (values if section in before else {}) | _defaults(settings[section]) | before.get(section, {})
                for key, value in values.items():
                    if (was := known.get(key)) != value:
                        raise SettingsError(
                            f"{self.path} was begun with {section}.{key} = {was!r}, now {value!r}; restore it, or use "
                            "another folder"
                        )
        elif self.ranks.index == 0:
            check_target(stored.parent, MANIFEST)
            with commit_directory(stored.parent) as temporary:
                (temporary / stored.name).write_text(json.dumps(current, indent=1))

    def cached(
        self,
        name: str,
        make: Callable[[], Part],
        save: Callable[[Part, Path], None],
        load: Callable[[Path], Part],
        *,
        alone: bool = False,
    ) -> Part:
        """Return what the folder holds under ``name``, making it first if it is not there.

        Args:
            name: of a folder that ``save`` commits whole.
            make: called by all processes, which make it together; only by the first if ``alone``, which then has the
                CPU threads of all.
            save: writes it; called by the first process.
            load: reads it.
            alone: see ``make``.
        """
        path = self.path / name
        if not self.ranks.agree((path / MANIFEST).is_file()):
            if not alone:
                made = make()
                if self.ranks.index == 0:
                    save(made, path)
            elif self.ranks.index == 0:
                with self.ranks.all_threads():
                    save(make(), path)
            self.ranks.wait_for((path / MANIFEST).is_file)
        return load(path)

    def write(self, name: str, value: object) -> None:
        """Write a JSON file, which is whole or as it was before."""
        if self.ranks.index == 0:
            write_whole(self.path / name, json.dumps(value, indent=1))

    def history(self, stage: str) -> list[dict[str, Any]]:
        """Return the logged updates of the training stage in the folder ``stage``, empty if it did not run.

        Raises:
            CheckpointError: see :func:`~latent_rewards.training.history.read_history`.
        """
        return read_history(self.path / stage)


def _defaults(section: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """Return the defaults of a dataclass as JSON would give them back; fields without one are left out."""
    found = {}
    for field in dataclasses.fields(section):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return dict(json.loads(json.dumps(found, default=dataclasses.asdict)))
