"""A metric in a child process of its own, with a deadline for every call.

A metric that raises, hangs, exits or crashes the interpreter becomes a typed error, and whatever it started is killed.
The child is a fresh interpreter in its own session; videos and scores travel over a socket as raw float32 bytes behind
a JSON header, so nothing is pickled. POSIX only.

This contains faults; it is not a sandbox. The child runs with the same rights, files and network as its parent, and a
program that deliberately leaves its session after the child has died is out of reach.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_rewards import contracts
from latent_rewards.contracts import (
    ConfigError,
    LatentRewardsError,
    MetricCrashError,
    MetricError,
    MetricTimeoutError,
)
from latent_rewards.metrics.children import describe_exit, kill_family
from latent_rewards.metrics.metric import Metric
from latent_rewards.metrics.registry import create_metric, source_of

_LENGTHS = struct.Struct("!QQ")
_POLL_SECONDS = 0.1
_ENTRY = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from {module} import serve; serve(int(sys.argv[1]))"


class ChildTraceback(Exception):
    """The traceback of an error that was raised in a child process; the cause of the error raised in its parent.

    Attributes:
        message: what the error said there.
    """

    def __init__(self, traceback: str, message: str) -> None:
        super().__init__(traceback)
        self.message = message


@dataclass(frozen=True, kw_only=True, eq=False)
class IsolatedMetric(Metric):
    """A metric that runs in a child process; also a context manager that closes it."""

    child: MetricChild

    def _run(self, videos: Tensor, texts: list[str] | None) -> Tensor:
        return self.child.call(videos, prompts=texts)[0]

    def close(self) -> None:
        """Kill the child and everything it started; a later call would start a new one."""
        self.child.stop()

    def __enter__(self) -> IsolatedMetric:
        """Return the metric."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def isolate(
    metric: str | Callable[..., Any] | Metric,
    *,
    timeout: float,
    startup_timeout: float = 120.0,
    **options: Any,  # noqa: ANN401 - options are the metric's own
) -> IsolatedMetric:
    """Run a metric in a child process.

    The child is started here, so that a metric that cannot be made fails now. A call that raises leaves the child
    running; one that hangs or crashes ends it, and the next call starts a new one.

    Args:
        metric: a registered name, ``"pkg.mod:attr"``, an importable function or class, or a metric made of one.
        timeout: seconds a call may take, transfer included.
        startup_timeout: seconds a child may take to start and make the metric, which includes importing torch.
        options: the metric's options; JSON values only, because they travel as JSON.

    Raises:
        ConfigError: a timeout is not positive, an option is not JSON, or the metric cannot be imported by the child.
        UnknownMetricError: nothing has that name.
        MetricError: the metric could not be made; its subclasses say that the child died or took too long.
    """
    for label, seconds in (("timeout", timeout), ("startup_timeout", startup_timeout)):
        if not seconds > 0:
            raise ConfigError(f"{label} must be positive seconds; got {seconds!r}")
    recipe = recipe_of(metric, options)
    child = MetricChild([recipe], timeout, startup_timeout)
    (described,) = child.start()
    info = described["info"]
    info["differentiable"] = False  # a gradient does not cross to another process
    made = {"options": described["options"], "recreatable": described["recreatable"], "origin": recipe["module"]}
    isolated = IsolatedMetric(**info, **made, score=child.call, child=child)
    isolated.__dict__["fingerprint"] = described["fingerprint"]  # fills the cached property: the weights are elsewhere
    weakref.finalize(isolated, child.stop)
    return isolated


def recipe_of(metric: str | Callable[..., Any] | Metric, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what another process needs to make a metric, as JSON-able ``{"name", "module", "options"}``.

    Args:
        metric: a registered name, ``"pkg.mod:attr"``, an importable function or class, or a metric made of one.
        options: the metric's options; none for a metric that is made already, which brings its own.

    Raises:
        ConfigError: an option is not JSON, or the metric cannot be imported by another process.
        UnknownMetricError: nothing has that name.
    """
    name, module = source_of(metric)
    options = dict(options or {})
    if isinstance(metric, Metric):
        if options:
            raise ConfigError(f"metric {name!r} is made already; options {sorted(options)} have no effect")
        if not metric.recreatable:
            raise ConfigError(
                f"metric {name!r} cannot be imported by another process, which does not get it by its name: register "
                "a function of an importable module that returns it with register_metric, and pass the name that is "
                "registered; or use num_workers=0"
            )
        options = dict(metric.options)
    recipe = {"name": name, "module": module, "options": options}
    try:
        json.dumps(recipe)
    except TypeError as error:
        raise ConfigError(f"metric {name!r}: options travel to the child as JSON: {error}") from error
    return recipe


class MetricChild:
    """The parent's end: a child process that is started when needed and killed with all its descendants.

    Args:
        recipes: of the metrics it holds, see :func:`recipe_of`.
        timeout: seconds one metric may take for a call, transfer included.
        startup_timeout: seconds it may take to start and make its metrics.
    """

    def __init__(self, recipes: Sequence[dict[str, Any]], timeout: float, startup_timeout: float) -> None:
        self._recipes = list(recipes)
        self._names = [str(recipe["name"]) for recipe in recipes]
        self._timeout, self._startup_timeout = timeout, startup_timeout
        self._lock = threading.RLock()
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def start(self) -> list[dict[str, Any]]:
        """Start a child and return what it says of each metric: ``{"info", "options", "recreatable", "fingerprint"}``.

        Raises:
            MetricError: a metric could not be made; its subclasses say that the child died or took too long.
        """
        with self._lock:
            self.stop()
            ours, theirs = socket.socketpair()
            with theirs:
                number = str(theirs.fileno())
                command = [sys.executable, "-c", _ENTRY.format(module=__name__), number, json.dumps(sys.path)]
                running = subprocess.Popen(  # noqa: S603 - this interpreter, and a command made here
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )
            self._running = running, ours
            name = "', '".join(self._names)
            request = {"metrics": self._recipes, "threads": torch.get_num_threads()}
            try:
                answer, _ = self._exchange(name, request, b"", self._startup_timeout, "to start")
            except LatentRewardsError:
                self.stop()
                raise
            described: list[dict[str, Any]] = answer["metrics"]
            self._names = [entry["info"]["name"] for entry in described]
            return described

    def call(
        self, videos: Tensor, *, prompts: Sequence[str] | None = None, slots: Sequence[int] = (0,)
    ) -> list[Tensor]:
        """Return the values ``[B]`` of the metrics at ``slots`` of its list for videos ``[B, T, C, H, W]``.

        The videos travel once. The first metric that fails ends the call.

        Raises:
            MetricError: a metric failed; its subclasses say that the child died or took too long.
        """
        with self._lock:
            if self._running is None:
                self.start()
            columns: list[Tensor] = []
            for slot in slots:
                sent = bool(columns)
                request = {"slot": slot, "prompts": prompts, "shape": None if sent else list(videos.shape)}
                raw = b"" if sent else videos.cpu().numpy().tobytes()
                what = f"with {len(videos)} sample(s)"
                _, payload = self._exchange(self._names[slot], request, raw, self._timeout, what)
                columns.append(torch.from_numpy(np.frombuffer(payload, dtype=np.float32).copy()))
            return columns

    def stop(self) -> None:
        """Kill the child and everything it started, even while another thread waits for its answer."""
        stopped, self._running = self._running, None
        if stopped is not None:
            running, ours = stopped
            kill_family(running.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(timeout=1.0)
            ours.close()

    def _exchange(
        self, name: str, request: dict[str, Any], raw: bytes, seconds: float, what: str
    ) -> tuple[dict[str, Any], bytes]:
        if self._running is None:
            raise MetricCrashError(f"metric '{name}' has no child process")
        running, ours = self._running
        deadline = time.monotonic() + seconds
        try:
            ours.settimeout(seconds)
            _send(ours, request, raw)
            answer, payload = _receive(ours, lambda: _wait_more(ours, running, deadline))
        except (OSError, EOFError) as error:
            late = isinstance(error, TimeoutError) and running.poll() is None
            ending = "" if late else describe_exit(running)
            self.stop()
            if late:
                raise MetricTimeoutError(
                    f"metric '{name}' {what} did not answer within {seconds:g} s; its child process was killed"
                ) from None
            raise MetricCrashError(f"metric '{name}' {what}: its child process died ({ending})") from None
        except BaseException:
            self.stop()  # an interrupted exchange would answer the next call with this one's reply
            raise
        if "error" in answer:
            kind = getattr(contracts, answer["error"], MetricError)
            known = isinstance(kind, type) and issubclass(kind, LatentRewardsError)
            raise (kind if known else MetricError)(
                f"{answer['message']} (in a child process, {what})"
            ) from ChildTraceback(answer["traceback"], answer["message"])
        return answer, payload


def _wait_more(ours: socket.socket, running: subprocess.Popen[bytes], deadline: float) -> None:
    """Allow one short read; a dead child is noticed even while something it started holds its socket open."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    ours.settimeout(min(left, _POLL_SECONDS))
    if running.poll() is not None:
        ours.settimeout(0.0)


def serve(descriptor: int) -> None:
    """Run the child's end on an open socket until the parent closes it; not for callers."""
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    with socket.socket(fileno=descriptor) as ours:
        os.set_inheritable(descriptor, False)
        request, _ = _receive(ours)
        torch.set_num_threads(request["threads"])
        metrics: list[Metric] = []
        described: list[dict[str, Any]] = []
        for recipe in request["metrics"]:
            try:
                if recipe["module"]:
                    importlib.import_module(recipe["module"])
                metric = create_metric(recipe["name"], **recipe["options"])
                told = {"info": metric.info, "options": metric.options, "recreatable": metric.recreatable}
                described.append({**told, "fingerprint": metric.fingerprint})
                json.dumps(described)
            except Exception as error:
                _send(ours, _describe_error(recipe["name"], error))
                return
            metrics.append(metric)
        _send(ours, {"metrics": described})
        videos = torch.empty(0)
        while True:
            try:
                request, raw = _receive(ours)
            except (EOFError, ConnectionError):
                return
            metric = metrics[request["slot"]]
            if request["shape"] is not None:
                videos = torch.from_numpy(np.frombuffer(raw, dtype=np.float32).copy()).reshape(request["shape"])
            try:
                values = metric(videos, request["prompts"])
            except Exception as error:
                _send(ours, _describe_error(metric.name, error))
            except SystemExit as leaving:
                os._exit(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))
            else:
                _send(ours, {}, values.cpu().numpy().tobytes())


def _describe_error(name: str, error: Exception) -> dict[str, str]:
    message = str(error) if isinstance(error, LatentRewardsError) else f"metric {name!r} could not be made: {error!r}"
    text = "".join(traceback.format_exception(error))
    return {"error": type(error).__name__, "message": message, "traceback": text}


def _die_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    kill_family(os.getpid())


def _send(connection: socket.socket, header: dict[str, Any], raw: bytes = b"") -> None:
    text = json.dumps(header).encode()
    connection.sendall(_LENGTHS.pack(len(text), len(raw)) + text)
    if raw:
        connection.sendall(raw)


def _receive(connection: socket.socket, before_read: Callable[[], None] | None = None) -> tuple[dict[str, Any], bytes]:
    """Read one message; EOFError when the other end is gone. ``before_read`` may set a timeout for each short read."""

    def read(count: int) -> bytearray:
        buffer = bytearray(count)
        view, done = memoryview(buffer), 0
        while done < count:
            if before_read:
                before_read()
            try:
                received = connection.recv_into(view[done:])
            except TimeoutError:
                continue
            if not received:
                raise EOFError
            done += received
        return buffer

    header_length, raw_length = _LENGTHS.unpack(read(_LENGTHS.size))
    return json.loads(read(header_length)), bytes(read(raw_length))
