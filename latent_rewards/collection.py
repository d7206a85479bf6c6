"""A collection on disk: parts that are whole or absent, shared by ranks, continued after a kill.

The folder holds ``settings``, one ``part-NNNNNN`` per batch of samples (``failed-NNNNNN`` where no sample could be
scored), and at the end ``complete``, which lists the parts. Each is committed whole. What a part holds depends on its
number and the settings only, so who makes it, and when, changes no byte.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latent_rewards.contracts import ConfigError, MetricError, RankError
from latent_rewards.dataset import COMPLETE, RewardDataset, join, write_complete
from latent_rewards.training.checkpoint import TEMPORARY_PREFIX, commit_directory, verify_directory
from latent_rewards.training.folder_lock import exclusive
from latent_rewards.training.ranks import Ranks, current_ranks

GIVE_UP_AFTER = 16
"""Samples whose scoring failed, with none scored yet, after which a collection stops instead of failing to its end."""

Outcome = tuple[RewardDataset | None, dict[int, str]]
"""The samples of a part that could be scored (None if none), and ``{sample index: error}`` of the others."""

Begin = Callable[[list[int]], Callable[[], Outcome]]
"""Sample indices -> a function that waits for their outcome."""

_SETTINGS = "settings"
_UNUSABLE = "unusable.json"
_FAILED_RANK = f"{TEMPORARY_PREFIX}failed-rank-"
_FAILED_PART = re.compile(r"failed-\d{6}")
_LEFTOVER = re.compile(
    rf"{re.escape(TEMPORARY_PREFIX)}(old-)?({_SETTINGS}|{COMPLETE}|(part|failed)-\d{{6}})-[0-9a-f]{{8}}"
    rf"|{re.escape(_FAILED_RANK)}\d+"
)
"""What killed runs of a collection leave."""
_POLL_SECONDS = 0.2


@dataclass
class Collection:
    """Collects ``num_samples`` samples in parts of ``batch_size``.

    Attributes:
        num_samples: at least 1.
        batch_size: samples per part.
        settings: JSON-able; what the samples and scores depend on.
        root: the folder, or None to keep everything in memory (then every rank collects everything).
        ahead: parts that are begun before the oldest must be done.
        progress: draw a progress bar.
        unusable: indices of samples with nothing to score, such as files that cannot be read; whoever begins them adds
            them. They fail, and say nothing of whether others will: they do not count towards giving up.
    """

    num_samples: int
    batch_size: int
    settings: Mapping[str, Any]
    root: Path | None = None
    ahead: int = 0
    progress: bool = True
    unusable: set[int] = field(default_factory=set)
    _outcomes: dict[int, Outcome] = field(default_factory=dict, init=False)

    def run(self, begin: Begin) -> RewardDataset:
        """Make the parts that are missing and return the whole.

        Raises:
            ConfigError: the folder holds a collection with other settings or something else, or another run is
                collecting into it.
            MetricError: every sample failed.
            RankError: another rank failed.
            CheckpointError: a stored part is damaged; the message names the file.
        """
        if self.root is None:
            self._make(list(self._numbers), begin, Ranks())
            return self._reporting_failures(self._joined())
        _refuse_foreign(self.root, self.settings)
        ranks = current_ranks()
        if ranks.agree((self.root / COMPLETE).is_dir()):
            check_settings(self.root, self.settings)  # reading needs no lock: nothing is written any more
            return RewardDataset.load(self.root)
        with exclusive(self.root, ranks, "collecting into", ConfigError), _reported(self.root, ranks):
            if ranks.index == 0:
                _prepare(self.root, self.settings)
            ranks.wait()
            check_settings(self.root, self.settings)
            if (self.root / COMPLETE).is_dir():  # meanwhile
                return RewardDataset.load(self.root)
            missing = [number for number in self._numbers if not self._part(number).is_dir()]
            ranks.wait()  # nobody writes before everybody has looked
            if ranks.index == 0:
                for number in sorted(set(self._numbers) - set(missing)):
                    self._outcome(number)
            self._make(missing[ranks.index :: ranks.count], begin, ranks)
            if ranks.index > 0:
                _wait_for(self.root, (self.root / COMPLETE).is_dir)
                return RewardDataset.load(self.root)
            return self._reporting_failures(self._finished(self.root))

    @property
    def _numbers(self) -> range:
        return range(-(-self.num_samples // self.batch_size))

    def _indices(self, number: int) -> list[int]:
        return list(range(number * self.batch_size, min((number + 1) * self.batch_size, self.num_samples)))

    def _part(self, number: int) -> Path:
        assert self.root is not None  # noqa: S101 - asked for with a folder only
        return self.root / f"part-{number:06d}"

    def _failed(self, number: int) -> Path:
        assert self.root is not None  # noqa: S101
        return self.root / f"failed-{number:06d}"

    def _make(self, numbers: list[int], begin: Begin, ranks: Ranks) -> None:
        """Make parts in order, with some begun ahead of the one that is waited for."""
        waiting: deque[tuple[int, Callable[[], Outcome]]] = deque()
        ours = sum(len(self._indices(number)) for number in numbers)
        total, label = (self.num_samples, "collect") if ranks.count == 1 else (ours, f"collect, 1 of {ranks.count}")
        shown = self.progress and ranks.index == 0
        with tqdm(total=total, initial=total - ours, desc=label, disable=not shown, dynamic_ncols=True) as bar:

            def settle() -> None:
                number, wait = waiting.popleft()
                part, failures = wait()
                self._keep(number, part, failures)
                self._give_up_if_hopeless(number)
                bar.update(len(self._indices(number)))
                bar.set_postfix(_means(part), refresh=False)

            for number in numbers:
                waiting.append((number, begin(self._indices(number))))
                while len(waiting) > self.ahead:
                    settle()
            while waiting:
                settle()

    def _keep(self, number: int, part: RewardDataset | None, failures: dict[int, str]) -> None:
        if self.root is not None and part is not None:
            part.save(self._part(number))
            part = RewardDataset.load(self._part(number))  # so that a long collection does not stay in memory
        elif self.root is not None:
            with commit_directory(self._failed(number)) as folder:
                (folder / "failures.json").write_text(json.dumps(list(failures.items()), indent=1))
                if unusable := sorted(self.unusable & failures.keys()):  # the other ranks ask
                    (folder / _UNUSABLE).write_text(json.dumps(unusable))
        self._outcomes[number] = part, failures

    def _outcome(self, number: int) -> Outcome | None:
        """Return what is known of a part, whoever made it; None if it is not made yet."""
        if number not in self._outcomes and self.root is not None:
            if self._part(number).is_dir():
                part = RewardDataset.load(self._part(number))
                self._outcomes[number] = part, part.failures
            elif self._failed(number).is_dir():
                verify_directory(self._failed(number))
                pairs = json.loads((self._failed(number) / "failures.json").read_text())
                self._outcomes[number] = None, {int(index): error for index, error in pairs}
                if (self._failed(number) / _UNUSABLE).is_file():
                    self.unusable.update(json.loads((self._failed(number) / _UNUSABLE).read_text()))
        return self._outcomes.get(number)

    def _give_up_if_hopeless(self, latest: int) -> None:
        """Raise MetricError when the first samples have all failed, and they are many or all there are."""
        if self._outcomes[latest][0] is not None:
            return
        failures: dict[int, str] = {}
        for number in self._numbers:
            outcome = self._outcome(number)
            if outcome is None or outcome[0] is not None:
                break
            failures |= outcome[1]
        unscored = {index: error for index, error in failures.items() if index not in self.unusable}
        if len(unscored) >= GIVE_UP_AFTER or len(failures) == self.num_samples:
            raise MetricError(f"all of the first {len(failures)} samples failed; {_first(unscored or failures)}")

    def _finished(self, root: Path) -> RewardDataset:
        """Wait for the other ranks' parts and list all of them."""
        _wait_for(root, lambda: all(self._outcome(number) is not None for number in self._numbers))
        self._give_up_if_hopeless(self._numbers[-1])
        dataset = self._joined()
        parts = [self._part(number) for number in self._numbers if self._outcomes[number][0] is not None]
        write_complete(root, parts, dataset.failures)
        return dataset

    def _joined(self) -> RewardDataset:
        outcomes = [self._outcomes[number] for number in self._numbers]
        dataset = join([part for part, _ in outcomes if part is not None])
        dataset.failures = {index: error for _, failures in outcomes for index, error in failures.items()}
        return dataset

    def _reporting_failures(self, dataset: RewardDataset) -> RewardDataset:
        if dataset.failures:
            warnings.warn(
                f"{len(dataset.failures)} of {self.num_samples} samples could not be scored and are left out (see "
                f"dataset.failures); {_first(dataset.failures)}",
                stacklevel=5,
            )
        return dataset


def check_settings(root: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming what differs, unless the collection in ``root`` was begun with these settings.

    One that was not stored, by an earlier version, is not compared.
    """
    folder = root / _SETTINGS
    verify_directory(folder)
    stored = json.loads((folder / "settings.json").read_text())
    for name, value in settings.items():
        if stored.get(name, value) != value:
            before, now = _first_difference(stored[name], value)
            raise ConfigError(
                f"{root} holds a collection with another {name}: {before} there, {now} now; use the same settings to "
                "continue it, or another output_dir"
            )


def _refuse_foreign(root: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where a folder is neither new nor a collection: what else it holds is not ours to remove."""
    stored = root / _SETTINGS / "settings.json"
    try:
        begun = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else None
    except ValueError:  # damaged, as will be said
        begun = {}
    ours = begun is not None and (not begun or not settings.keys().isdisjoint(begun))
    others = [entry for entry in root.iterdir() if not _LEFTOVER.fullmatch(entry.name)] if root.is_dir() else []
    if root.is_file() or (others and not ours):
        what = f"holds {others[0].name!r}" if others else "is a file"
        raise ConfigError(f"{root} {what} and is no collection of samples; give a new folder")


def _prepare(root: Path, settings: Mapping[str, Any]) -> None:
    """Remove what a killed run was writing and the parts that failed as a whole; store the settings of a new run.

    A run of which no part was kept is a new one: its settings may have been the reason.
    """
    done = (root / COMPLETE).is_dir()
    for entry in [*root.iterdir()]:
        if _LEFTOVER.fullmatch(entry.name) or (_FAILED_PART.fullmatch(entry.name) and not done):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not (done or any(root.glob("part-*"))):
        with commit_directory(root / _SETTINGS) as temporary:
            (temporary / "settings.json").write_text(json.dumps(settings, indent=1))


@contextmanager
def _reported(root: Path, ranks: Ranks) -> Iterator[None]:
    """Leave a mark for the other ranks when this one fails."""
    try:
        yield
    except BaseException:
        if ranks.count > 1:
            (root / f"{_FAILED_RANK}{ranks.index}").touch()
        raise


def _wait_for(root: Path, done: Callable[[], bool]) -> None:
    """Wait for other ranks; files, because a collective call has a deadline and a collection may take days."""
    while not done():
        if failed := sorted(root.glob(f"{_FAILED_RANK}*")):
            number = failed[0].name.removeprefix(_FAILED_RANK)
            raise RankError(
                f"rank {number} failed (its own message says why); run again to continue with what {root} has"
            )
        time.sleep(_POLL_SECONDS)


def _first(failures: dict[int, str]) -> str:
    index, error = next(iter(failures.items()))
    return f"sample {index}: {error}"


def _means(part: RewardDataset | None) -> dict[str, str]:
    rewards = part.rewards if part is not None else {}
    return {name: f"{float(values.nanmean()):.4g}" for name, values in list(rewards.items())[:3]}


def _first_difference(before: object, now: object) -> tuple[object, object]:
    """Return the two values, or of two lists their lengths or first differing entries."""
    if not (isinstance(before, list) and isinstance(now, list)):
        return before, now
    if len(before) != len(now):
        return f"{len(before)} entries", f"{len(now)} entries"
    row = next(i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b)
    return f"entry {row} is {before[row]!r}", f"{now[row]!r}"
