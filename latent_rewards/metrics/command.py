"""A judge in an environment of its own, such as VBench, run as a command.

For every call the videos are written into a temporary folder as mp4 files, beside a request in JSON:

    {"metric": "name", "fps": 8.0, "clips": [{"video": "/tmp/.../000000.mp4", "prompt": "a dog"}, ...]}

The command reads it and writes its answer: ``{"values": [0.5, null, ...]}``, one number per clip in the order of the
request, null where it has no opinion. In its arguments ``{request}`` and ``{answer}`` stand for the paths of the two
files, ``{folder}`` for their folder, in which they are called ``request.json`` and ``answer.json``:

    command_metric("vbench.scene", ["/opt/vbench/bin/python", "scene.py", "{request}", "{answer}"], version="1")

There is no shell. The command starts once per call, so large batches spread what its start costs.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from latent_rewards.contracts import (
    ConfigError,
    MetricCrashError,
    MetricError,
    MetricOutputError,
    MetricTimeoutError,
)
from latent_rewards.metrics.children import Ending, run_command
from latent_rewards.metrics.metric import Metric
from latent_rewards.video import encode_mp4

PLACEHOLDERS = ("{folder}", "{request}", "{answer}")
OWN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables of this environment that would reach into the other one; the command does not see them."""

_SHOWN_BYTES = 200
_BYTES_PER_VALUE = 1024

Failure = TypeVar("Failure", bound=MetricError)


def command_metric(
    name: str,
    command: Sequence[str],
    *,
    version: str,
    value_range: tuple[float, float] | None = None,
    higher_is_better: bool = True,
    needs_prompt: bool = True,
    deterministic: bool = False,
    fps: float = 8.0,
    lossless: bool = False,
    timeout: float = 600.0,
    environment: Mapping[str, str] | None = None,
) -> Metric:
    """Return a metric that runs a command.

    Args:
        name: of the metric.
        command: program and arguments; at least one argument holds ``{folder}``, or both ``{request}`` and
            ``{answer}`` occur. It runs in the caller's working directory.
        version: of the tool; change it whenever its values change, since nobody here can see its weights.
        value_range: what a value may be; an answer outside is an error.
        higher_is_better: the direction of improvement.
        needs_prompt: whether the request holds the prompts; without, they are null.
        deterministic: the same videos give the same values.
        fps: frame rate of the mp4 files.
        lossless: write every pixel as its 8-bit RGB value; otherwise H.264 of high quality as yuv420p, odd sizes
            padded to even ones by repeating the border.
        timeout: seconds the command may take. After it, it is killed with everything it started.
        environment: variables added to this process's (without :data:`OWN_VARIABLES`); not part of the fingerprint,
            never stored.

    Returns:
        A metric whose fingerprint holds the command and the version. Calling it raises :class:`MetricTimeoutError`,
        :class:`MetricCrashError` for another exit status than 0, :class:`MetricOutputError` for an answer that is
        missing or wrong, or :class:`MetricError` if the command cannot be started; each names the command and how it
        ended, with the last lines of its standard error.

    Raises:
        ConfigError: the command is no list of texts, its program is not found, it has no place for the files, or a
            number is out of range.
    """
    if isinstance(command, str) or not command or not all(isinstance(part, str) for part in command):
        raise ConfigError(f"metric {name!r}: command must be a list of texts, [program, argument]; got {command!r}")
    places = {place for place in PLACEHOLDERS if any(place in part for part in command)}
    if "{folder}" not in places and len(places) < 2:
        raise ConfigError(
            f"metric {name!r}: the command {shlex.join(command)} is not told where the files are; give it {{request}} "
            "and {answer}, or {folder}"
        )
    if shutil.which(command[0]) is None:
        raise ConfigError(f"metric {name!r}: there is no program {command[0]!r} to run")
    for label, value in (("fps", fps), ("timeout", timeout)):
        if not value > 0:
            raise ConfigError(f"metric {name!r}: {label} must be positive; got {value!r}")
    return Metric(
        name=name,
        version=version,
        value_range=value_range,
        higher_is_better=higher_is_better,
        needs_prompt=needs_prompt,
        deterministic=deterministic,
        may_be_nan=True,
        description=f"What the command {Path(command[0]).name} says of a video",
        score=_Command(name, tuple(command), fps, lossless, timeout, dict(environment or {})),
        options={"command": list(command), "fps": fps, "lossless": lossless},
        origin=__name__,
        recreatable=False,
    )


@dataclass(frozen=True)
class _Command:
    name: str
    command: tuple[str, ...]
    fps: float
    lossless: bool
    timeout: float
    environment: dict[str, str] = field(repr=False)

    def __call__(self, videos: Tensor, *, prompts: Sequence[str] | None = None) -> list[float]:
        with tempfile.TemporaryDirectory(prefix="latent-rewards-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary)
            request, answer = folder / "request.json", folder / "answer.json"
            clips = []
            for index, video in enumerate(videos.cpu()):
                path = folder / f"{index:06d}.mp4"
                path.write_bytes(encode_mp4(video.expand(-1, 3, -1, -1), fps=self.fps, lossless=self.lossless))
                clips.append({"video": str(path), "prompt": None if prompts is None else prompts[index]})
            content = {"metric": self.name, "fps": self.fps, "clips": clips}
            request.write_text(json.dumps(content, indent=1), encoding="utf-8")
            paths = dict(zip(PLACEHOLDERS, (str(folder), str(request), str(answer)), strict=True))
            return self._read(answer, len(videos), self._run(paths))

    def _run(self, paths: Mapping[str, str]) -> Ending:
        command = list(self.command)
        for place, path in paths.items():
            command = [part.replace(place, path) for part in command]
        inherited = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
        try:
            ending = run_command(command, seconds=self.timeout, environment={**inherited, **self.environment})
        except OSError as error:
            raise self._failure(MetricError, f"could not be started: {error}") from error
        if ending.late:
            late = f"did not end within {self.timeout:g} s and was killed with all it started"
            raise self._failure(MetricTimeoutError, late, ending)
        if not ending.succeeded:
            raise self._failure(MetricCrashError, f"failed ({ending.text})", ending)
        return ending

    def _read(self, answer: Path, count: int, ending: Ending) -> list[float]:
        """Return the values of an answer, NaN for null."""

        def refuse(what: str) -> MetricOutputError:
            wanted = f'{answer.name} must be {{"values": [...]}} with {count} finite numbers or nulls'
            return self._failure(MetricOutputError, f"ended with {ending.text} and {what}; {wanted}", ending)

        if not answer.is_file():
            raise refuse("wrote no answer")
        if answer.stat().st_size > _BYTES_PER_VALUE * (count + 1):
            raise refuse(f"answered with {answer.stat().st_size} bytes")
        raw = answer.read_bytes()
        try:
            values = json.loads(raw)["values"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise refuse(f"answered {raw[:_SHOWN_BYTES]!r}") from error
        if not isinstance(values, list) or len(values) != count:
            raise refuse(f"gave {len(values) if isinstance(values, list) else type(values).__name__} value(s)")
        for index, value in enumerate(values):
            if value is not None and not _is_finite_number(value):
                raise refuse(f"gave {value!r} for clip {index}")
        return [math.nan if value is None else float(value) for value in values]

    def _failure(self, kind: type[Failure], happened: str, ending: Ending | None = None) -> Failure:
        words = ending.last_words if ending is not None else ""
        said = f"; its standard error ended with:\n{words}" if words else ""
        return kind(f"metric {self.name!r}: the command {shlex.join(self.command)} {happened}{said}")


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False
