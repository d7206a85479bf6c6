"""The processes of one launch (``accelerate launch``, ``torchrun``) that share a piece of work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

Item = TypeVar("Item")
Made = TypeVar("Made")

_POLL_SECONDS = 0.2
_BUCKET = 2**24
"""Numbers that are averaged in one call; each call needs a copy of as many."""


class OutOfStepError(RuntimeError):
    """The processes of a launch have come to different places of their work; the message names them."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its launch.

    Attributes:
        index: 0 to ``count - 1``.
        count: number of processes; 1 without a launcher.
    """

    index: int = 0
    count: int = 1

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Return when ``done()`` is true, however long that takes: a collective call has a deadline, this has none.

        A launcher ends the waiting processes when the one they wait for fails.
        """
        while not done():
            time.sleep(_POLL_SECONDS)

    def part(self, count: int) -> range:
        """Return which of ``count`` neighbouring things are this process's; every number of processes gives the same.

        Their sizes differ by one at most.
        """
        return range(count * self.index // self.count, count * (self.index + 1) // self.count)

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, many in one call: most networks have small ones."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            torch.distributed.all_reduce(flat)
            _fill(bucket, flat.div_(self.count))

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by what it is in the first process."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            torch.distributed.broadcast(flat.view(torch.uint8), src=0)
            _fill(bucket, flat)

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[Tensor], at: str = "an update") -> None:
        """Replace each gradient by its mean over the processes; where only some have one, that of the others is 0.

        A batch may leave out a part of a network (one of two experts) here and not there; a parameter that was used
        nowhere keeps no gradient, so that an optimiser passes over it as it does in a single process.

        Args:
            parameters: the same ones, in the same order, in every process.
            at: see :meth:`gather`.
        """
        if self.count == 1 or not parameters:
            return
        used = self.gather(bytes(parameter.grad is not None for parameter in parameters), at)
        for parameter, *anywhere in zip(parameters, *used, strict=True):
            if any(anywhere) and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.average(parameter.grad for parameter in parameters if parameter.grad is not None)

    def share(self, items: Sequence[Item], make: Callable[[Item], Made], progress: str | None = None) -> list[Made]:
        """Return ``[make(item) for item in items]``: each process makes its part, and all get the whole.

        What ``make`` returns travels between the processes, so its tensors should be on the CPU. The first process
        draws a bar named ``progress``, if there is a name.
        """
        hidden = progress is None or self.index > 0
        mine = tqdm(items[self.index :: self.count], desc=progress, disable=hidden, dynamic_ncols=True)
        parts = self.gather([make(item) for item in mine])
        return [parts[i % self.count][i // self.count] for i in range(len(items))]

    def gather(self, mine: Made, at: str = "a gathering") -> list[Made]:
        """Return what each process passes, by rank.

        Args:
            mine: what this process passes.
            at: the place of the work this is; processes that meet at different ones would take one thing for another.

        Raises:
            OutOfStepError: another process is at another place.
        """
        if self.count == 1:
            return [mine]
        parts: list[tuple[str, Made] | None] = [None] * self.count
        torch.distributed.all_gather_object(parts, (at, mine))
        told = cast(list[tuple[str, Made]], parts)
        if len({place for place, _ in told}) > 1:
            places = ", ".join(f"process {index} at {place}" for index, (place, _) in enumerate(told))
            raise OutOfStepError(
                f"the processes of this launch are not in step: {places}; let what decides over the course of the work "
                "be known to all of them (Ranks.gather)"
            )
        return [part for _, part in told]

    def agree(self, fact: bool) -> bool:
        """Return whether ``fact`` is true in every process, and not before each has looked."""
        return all(self.gather(fact))

    def once(self, make: Callable[[], Made]) -> Made:
        """Return what ``make()`` returns in the first process, which has the CPU threads of all of this machine."""
        if self.count == 1:
            return make()
        box: list[Made | None] = [None]
        if self.index == 0:
            with self.all_threads():
                box = [make()]
        torch.distributed.broadcast_object_list(box)
        return cast(Made, box[0])

    def leave(self) -> None:
        """Take leave of the others, when all is done."""
        if self.count > 1:
            torch.distributed.destroy_process_group()

    @contextmanager
    def all_threads(self) -> Iterator[None]:
        """In the block compute on the CPU threads of all processes on this machine, while the others wait."""
        own = torch.get_num_threads()
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(own, min(own * processes, os.cpu_count() or 1)))
        try:
            yield
        finally:
            torch.set_num_threads(own)


ALONE = Ranks()
"""The one process of a program that was not launched as several."""


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield runs of tensors of one type, of at least :data:`_BUCKET` numbers but for the last of a type."""
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bucket = buckets.setdefault((tensor.dtype, tensor.device), [])
        bucket.append(tensor)
        if sum(part.numel() for part in bucket) >= _BUCKET:
            yield buckets.pop((tensor.dtype, tensor.device))
    yield from buckets.values()


def _fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Copy consecutive parts of ``flat`` into the tensors."""
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def current_ranks(*, cpu: bool = False) -> Ranks:
    """Return this process's place in its launch; joins the launch's process group if that is still to be done.

    Args:
        cpu: join as one that computes on the CPU, also where there is an accelerator.
    """
    if not torch.distributed.is_available():
        return Ranks()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # Without being told, accelerate takes the processes of a launch on CPUs for strangers.
        PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    if not torch.distributed.is_initialized():
        return Ranks()
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
