"""A judge over HTTP, against a local server that answers, stalls, fails, truncates and lies."""

import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from latent_rewards.contracts import ConfigError, MetricError, MetricOutputError, MetricTimeoutError
from latent_rewards.metrics.remote import http_metric

VIDEOS = torch.linspace(0, 1, 4).view(4, 1, 1, 1, 1).expand(4, 5, 3, 16, 16).contiguous()
PROMPTS = ["zero", "one", "two", "three"]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: Counter[str] = Counter()
        self.requests: list[dict] = []
        self.busy, self.most_busy, self.lock = 0, 0, threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:  # noqa: N802 - the standard library's name
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.calls[content["prompt"]] += 1
            self.server.requests.append({**content, "key": self.headers.get("X-Key")})
            self.server.busy, self.counted = self.server.busy + 1, True
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        try:
            getattr(self, self.path.strip("/"))(content, self.server.calls[content["prompt"]])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.leave()

    def leave(self) -> None:
        """Count as busy no longer: before the answer is out, since the client asks again as soon as it has it."""
        with self.server.lock:
            self.server.busy, self.counted = self.server.busy - self.counted, False

    def answer(self, body: bytes, status: int = 200, length: int | None = None) -> None:
        self.leave()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def good(self, content: dict, call: int) -> None:
        time.sleep(0.02)
        self.answer(json.dumps({"score": PROMPTS.index(content["prompt"]) / 10}).encode())

    def silent(self, content: dict, call: int) -> None:
        self.answer(b'{"score": null}')

    def recovers(self, content: dict, call: int) -> None:
        self.answer(b"busy", 503) if call < 3 else self.good(content, call)

    def truncates(self, content: dict, call: int) -> None:
        self.answer(b'{"score": 0', length=50) if call == 1 else self.good(content, call)

    def broken(self, content: dict, call: int) -> None:
        self.answer(b"out of memory", 500)

    def refuses(self, content: dict, call: int) -> None:
        self.answer(b"no such model", 404)

    def stalls(self, content: dict, call: int) -> None:
        time.sleep(1.0)

    def drips(self, content: dict, call: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        for _ in range(20):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.05)

    def lies(self, content: dict, call: int) -> None:
        self.answer(json.dumps({"score": "very good"}).encode())

    def truth(self, content: dict, call: int) -> None:
        self.answer(b'{"score": true}')

    def chats(self, content: dict, call: int) -> None:
        self.answer(b"I like it")

    def exaggerates(self, content: dict, call: int) -> None:
        self.answer(b'{"score": 11}')


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join(5)


def judge(server: Server, path: str, **options):
    options = {"version": "1", "timeout": 0.3, "retries": 2, "backoff": 0.01, **options}
    return http_metric("judge", f"http://127.0.0.1:{server.server_port}/{path}", **options)


def test_every_video_is_asked_once_with_its_prompt_as_a_real_mp4(server):
    metric = judge(server, "good", timeout=5.0, headers={"X-Key": "secret"}, concurrency=2)
    assert metric(VIDEOS, PROMPTS).tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert sorted(request["prompt"] for request in server.requests) == sorted(PROMPTS)
    assert server.most_busy == 2
    assert {request["key"] for request in server.requests} == {"secret"}
    assert "secret" not in repr(metric) + metric.fingerprint + json.dumps(metric.options)
    av = pytest.importorskip("av")
    sent = next(request for request in server.requests if request["prompt"] == "two")
    with av.open(io.BytesIO(base64.b64decode(sent["video"]))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (16, 16, 3)
    assert abs(frames[0].mean() / 255 - 2 / 3) < 0.02
    assert (sent["metric"], sent["fps"]) == ("judge", 8.0)


def test_no_opinion_is_nan(server):
    assert judge(server, "silent", timeout=5.0)(VIDEOS[:2], PROMPTS[:2]).isnan().all()


@pytest.mark.parametrize(("path", "calls"), [("recovers", 3), ("truncates", 2)])
def test_what_may_pass_is_tried_again(server, path, calls):
    assert judge(server, path, timeout=5.0)(VIDEOS[:2], PROMPTS[:2]).tolist() == pytest.approx([0.0, 0.1])
    assert server.calls == {"zero": calls, "one": calls}


@pytest.mark.parametrize(
    ("path", "error", "message", "calls"),
    [
        ("broken", MetricError, r"'judge', sample 0 at http.*status 500: out of memory, 3 attempt", 3),
        ("refuses", MetricError, "status 404: no such model", 1),
        ("stalls", MetricTimeoutError, r"no answer within 0\.3 s, 2 attempt", 2),
        ("drips", MetricTimeoutError, r"no answer within 0\.3 s, 2 attempt", 2),
        ("lies", MetricOutputError, "number or null; got 'very good'", 1),
        ("truth", MetricOutputError, "number or null; got True", 1),
        ("chats", MetricOutputError, "got b'I like it'", 1),
        ("exaggerates", MetricOutputError, r"promises values in \[0, 1\] and returned 11", 1),
    ],
)
def test_each_fault_is_an_error_that_says_what_happened(server, path, error, message, calls):
    retries = 1 if calls == 2 else 2
    with pytest.raises(error, match=message):
        judge(server, path, retries=retries, value_range=(0, 1))(VIDEOS[:1, :, :1], PROMPTS[:1])
    assert server.calls["zero"] == calls


def test_nobody_at_home_is_an_error():
    metric = http_metric("judge", "http://127.0.0.1:9/score", version="1", timeout=1.0, retries=1, backoff=0.0)
    with pytest.raises(MetricError, match=r"the connection failed.*2 attempt"):
        metric(VIDEOS[:1], PROMPTS[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "file:///etc/passwd"}, "http or https"),
        ({"timeout": 0.0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"concurrency": 0}, "concurrency"),
        ({"backoff": -1.0}, "backoff"),
        ({"fps": 0.0}, "fps"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    settings = {"url": "http://localhost/", "version": "1", **change}
    with pytest.raises(ConfigError, match=message):
        http_metric("judge", settings.pop("url"), **settings)
