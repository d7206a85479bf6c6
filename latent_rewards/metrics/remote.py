"""A judge behind HTTP, such as a vision-language model on another machine, as a metric.

One request per video: ``POST`` of the JSON ``{"metric", "prompt", "fps", "video"}``, the video an H.264 mp4 in base64;
the answer is the JSON ``{"score": number}``, null where the judge has no opinion. Requests run side by side; what may
pass (a refused or broken connection, no answer in time, status 429 or 5xx) is tried again after a growing pause, what
will not (another status, an answer that is not a score) is an error at once. Nothing is sent unless a metric made here
is called.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from torch import Tensor

from latent_rewards.contracts import ConfigError, MetricError, MetricOutputError, MetricTimeoutError
from latent_rewards.metrics.metric import Metric
from latent_rewards.video import encode_mp4

MAX_ANSWER_BYTES = 2**20
_CHUNK = 2**14


class _MayPass(Exception):
    """A failure worth another attempt."""


def http_metric(
    name: str,
    url: str,
    *,
    version: str,
    value_range: tuple[float, float] | None = None,
    higher_is_better: bool = True,
    fps: float = 8.0,
    timeout: float = 60.0,
    retries: int = 3,
    backoff: float = 0.5,
    concurrency: int = 4,
    headers: Mapping[str, str] | None = None,
) -> Metric:
    """Return a metric that asks a judge over HTTP.

    Args:
        name: of the metric; sent with every request.
        url: http or https address that takes the request described above.
        version: of the judge; change it whenever its answers change, since nobody here can see its weights.
        value_range: what a score may be; an answer outside is an error.
        higher_is_better: the direction of improvement.
        fps: frame rate of the mp4.
        timeout: seconds one attempt may take, answer included.
        retries: further attempts after a failure that may pass.
        backoff: seconds before the first retry; each further pause is twice as long.
        concurrency: most requests under way.
        headers: sent with every request, such as an authorisation; not part of the fingerprint, never stored.

    Returns:
        A metric that takes prompts. Calling it raises :class:`MetricTimeoutError` if the last attempt took too long,
        :class:`MetricOutputError` for an answer that is not a score, else :class:`MetricError`; each names the sample.

    Raises:
        ConfigError: another kind of address, or a number out of range.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigError(f"url must be an http or https address; got {url!r}")
    for label, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
        if not value >= least:
            raise ConfigError(f"{label} must be at least {least}; got {value!r}")
    for label, seconds in (("timeout", timeout), ("fps", fps)):
        if not seconds > 0:
            raise ConfigError(f"{label} must be positive; got {seconds!r}")
    if not backoff >= 0:
        raise ConfigError(f"backoff must not be negative; got {backoff!r}")
    return Metric(
        name=name,
        version=version,
        value_range=value_range,
        higher_is_better=higher_is_better,
        needs_prompt=True,
        deterministic=False,
        may_be_nan=True,
        description=f"What the judge at {urlsplit(url).hostname} says of a video and its prompt",
        score=_Judge(name, url, fps, timeout, retries, backoff, concurrency, dict(headers or {})),
        options={"url": url, "fps": fps},
        origin=__name__,
        recreatable=False,
    )


@dataclass(frozen=True)
class _Judge:
    name: str
    url: str
    fps: float
    timeout: float
    retries: int
    backoff: float
    concurrency: int
    headers: dict[str, str] = field(repr=False)

    def __call__(self, videos: Tensor, *, prompts: Sequence[str]) -> list[float]:
        with ThreadPoolExecutor(min(self.concurrency, len(videos))) as pool:
            return list(pool.map(self._ask, range(len(videos)), videos.cpu(), prompts))

    def _ask(self, index: int, video: Tensor, prompt: str) -> float:
        encoded = base64.b64encode(encode_mp4(video.expand(-1, 3, -1, -1), fps=self.fps)).decode("ascii")
        content = {"metric": self.name, "prompt": prompt, "fps": self.fps, "video": encoded}
        body = json.dumps(content).encode()
        where = f"metric {self.name!r}, sample {index} at {self.url}"
        for attempt in range(self.retries + 1):
            try:
                return self._score(self._post(body, where), where)
            except _MayPass as failure:
                if attempt == self.retries:
                    kind = MetricTimeoutError if isinstance(failure.__cause__, TimeoutError) else MetricError
                    raise kind(f"{where}: {failure}, {attempt + 1} attempt(s)") from failure.__cause__
                time.sleep(self.backoff * 2**attempt)
        raise AssertionError("unreachable")

    def _post(self, body: bytes, where: str) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", **self.headers}
        request = urllib.request.Request(self.url, body, headers, method="POST")  # noqa: S310 - http(s) only
        deadline = time.monotonic() + self.timeout
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:  # noqa: S310
                return _read(response, deadline, where)
        except urllib.error.HTTPError as error:
            said = error.read(200).decode("utf-8", "replace")
            if error.code == 429 or error.code >= 500:
                raise _MayPass(f"status {error.code}: {said}") from error
            raise MetricError(f"{where}: status {error.code}: {said}") from error
        except TimeoutError as error:
            raise _MayPass(f"no answer within {self.timeout:g} s") from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
            late = isinstance(getattr(error, "reason", None), TimeoutError)
            if late:
                raise _MayPass(f"no answer within {self.timeout:g} s") from TimeoutError()
            raise _MayPass(f"the connection failed ({error})") from error

    def _score(self, answer: bytes, where: str) -> float:
        try:
            score = json.loads(answer)["score"]
        except (ValueError, KeyError, TypeError) as error:
            raise MetricOutputError(f'{where}: expected {{"score": number}}; got {answer[:200]!r}') from error
        if score is None:
            return float("nan")
        if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
            raise MetricOutputError(f"{where}: the score must be a number or null; got {score!r}")
        return float(score)


def _read(response: http.client.HTTPResponse, deadline: float, where: str) -> bytes:
    """Read an answer, also a slow one, until the deadline."""
    answer = b""
    while chunk := response.read1(_CHUNK):
        answer += chunk
        if len(answer) > MAX_ANSWER_BYTES:
            raise MetricOutputError(f"{where}: the answer is longer than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:
        raise http.client.IncompleteRead(answer, response.length)
    return answer
