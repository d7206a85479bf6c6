"""Child processes: how one is run with a deadline, how it ended, how it is killed with all it started. POSIX only."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_POLL_SECONDS = 0.05
_CHUNK = 2**16
_KEPT_BYTES = 4096
_KEPT_LINES = 8


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Attributes:
        late: it was killed because its time was up.
        succeeded: it ended by itself with exit status 0.
        text: the same in words.
        last_words: the last lines of its standard error.
    """

    late: bool
    succeeded: bool
    text: str
    last_words: str


def run_command(command: Sequence[str], *, seconds: float, environment: Mapping[str, str]) -> Ending:
    """Run a command to its end, in a session of its own, and kill whatever is left of it.

    Standard output is dropped; of standard error only the end is kept, however much there is.

    Raises:
        OSError: the command cannot be started.
    """
    running = subprocess.Popen(  # noqa: S603 - the caller's command, an argument list without a shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=dict(environment),
    )
    assert running.stderr is not None  # noqa: S101 - it is a pipe
    errors, kept = running.stderr.fileno(), bytearray()
    os.set_blocking(errors, False)
    try:
        late = not _listen(running.pid, errors, kept, time.monotonic() + seconds)
    finally:
        # Before the leader is reaped: until then nobody else can have its number.
        kill_family(running.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(timeout=1.0)
        _read_errors(errors, kept, most=16)
        running.stderr.close()
    lines = kept.decode("utf-8", "replace").strip().splitlines()[-_KEPT_LINES:]
    succeeded = not late and running.returncode == 0
    return Ending(late, succeeded, describe_exit(running), "\n".join(lines))


def _listen(leader: int, errors: int, kept: bytearray, deadline: float) -> bool:
    """Read standard error until the process ends (True) or its time is up (False)."""
    poll = select.poll()
    poll.register(errors, select.POLLIN)
    is_open = True
    while os.waitid(os.P_PID, leader, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if not is_open:
            time.sleep(min(left, _POLL_SECONDS))
        elif poll.poll(1000 * min(left, _POLL_SECONDS)):
            is_open = _read_errors(errors, kept, most=1)
    return True


def _read_errors(errors: int, kept: bytearray, *, most: int) -> bool:
    """Read what there is, ``most`` chunks of it, and keep the end; False once nobody writes any more."""
    for _ in range(most):
        try:
            chunk = os.read(errors, _CHUNK)
        except BlockingIOError:
            return True
        if not chunk:
            return False
        kept += chunk
        del kept[:-_KEPT_BYTES]
    return True


def kill_family(leader: int) -> None:
    """Kill a process group by its leader, and the leader's descendants that left the group.

    What left the group and lost its parents is out of reach.
    """
    import psutil

    strays: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        strays = psutil.Process(leader).children(recursive=True)
    for stray in strays:
        with contextlib.suppress(psutil.Error):
            stray.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def describe_exit(running: subprocess.Popen[bytes]) -> str:
    """Return how a process ended, in words; it is given a second to do so."""
    try:
        code = running.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return "it closed its connection"
    if code >= 0:
        return f"exit status {code}"
    return f"killed by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"killed by signal {-code}"
