"""A stored proxy comes back whole or not at all, from a folder and from a hub that is a small server here."""

import base64
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies import RewardProxy, train_proxy
from latent_rewards.proxies.artefact import CARD, DESCRIPTION, FORMAT, HELD_OUT, WEIGHTS
from latent_rewards.training.checkpoint import MANIFEST, CheckpointError, FolderInUseError, commit_directory

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def proxy(world, quick):
    draw, curved = world
    latents = draw(150, 0)
    data = RewardDataset.from_tensors(latents, ["a"] * 150, {"curve": curved(latents)}, latent_space="vae-a")
    return train_proxy(data, config=quick(num_updates=5, ensemble_size=2, calibrate_mean="isotonic"))


@pytest.fixture
def stored(proxy, tmp_path):
    proxy.save_pretrained(tmp_path / "proxy")
    return tmp_path / "proxy"


def same(one, two, latents):
    mine, theirs = one.predict(latents, ["a"] * len(latents)), two.predict(latents, ["a"] * len(latents))
    pairs = [
        *zip(mine.interval(0.8), theirs.interval(0.8), strict=True),
        (mine.mean, theirs.mean),
        (mine.ood, theirs.ood),
    ]
    return all(torch.equal(a["curve"], b["curve"]) for a, b in pairs)


def rewrite(folder, change):
    """Commit the folder again after ``change(copy)``, so that the manifest agrees with what changed."""
    with commit_directory(folder) as copy:
        for file in folder.iterdir():
            if file.name != MANIFEST:
                shutil.copy(file, copy)
        change(copy)


def describe(folder, **changes):
    content = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({**content, **changes}))


def test_everything_comes_back(proxy, stored, world):
    loaded = RewardProxy.from_pretrained(stored)
    assert same(proxy, loaded, world[0](20, 1)) and loaded.report == proxy.report
    assert loaded.ood_threshold(0.2) == proxy.ood_threshold(0.2)
    assert all(torch.equal(value, loaded.heldout.tensors()[name]) for name, value in proxy.heldout.tensors().items())
    assert {file.name for file in stored.iterdir()} == {CARD, DESCRIPTION, WEIGHTS, HELD_OUT, MANIFEST}


@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS, HELD_OUT, MANIFEST])
@pytest.mark.parametrize("fault", ["truncated", "altered", "missing"])
def test_a_damaged_file_is_named(stored, name, fault):
    file, content = stored / name, (stored / name).read_bytes()
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(
            content[:-7] if fault == "truncated" else content[:-9] + bytes([content[-9] ^ 255]) + content[-8:]
        )
    with pytest.raises(CheckpointError, match=name):
        RewardProxy.from_pretrained(stored)


def test_an_edited_card_is_no_damage(stored):
    (stored / CARD).write_text("better words")
    RewardProxy.from_pretrained(stored)
    (stored / CARD).unlink()
    RewardProxy.from_pretrained(stored)


def test_files_that_do_not_belong_together_are_named(stored, proxy):
    refit = ".*by another version or with another trunk of that name; fit the proxy again"
    cases = [
        (lambda folder: describe(folder, format="other/1"), "format 'other/1'"),
        (lambda folder: describe(folder, config={"trunk": "none"}), "proxy.json describes no proxy .*unknown trunk"),
        (lambda folder: describe(folder, latent_shape=[4, 3, 4, 4]), f"proxy.safetensors holds .* of shape {refit}"),
        (lambda folder: (folder / DESCRIPTION).write_text("[1"), "proxy.json describes no proxy"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 40), "proxy.safetensors cannot be read"),
        (lambda folder: (folder / HELD_OUT).write_bytes(b"x" * 40), "heldout.safetensors cannot be read"),
        (lambda folder: save_file({"std": torch.zeros(1)}, folder / HELD_OUT), "heldout.safetensors cannot be read"),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds no proxy.safetensors"),
        (
            lambda folder: save_file({"reward_mean": torch.zeros(1)}, folder / WEIGHTS),
            f"proxy.safetensors lacks {refit}",
        ),
    ]
    for change, message in cases:
        proxy.save_pretrained(stored)
        rewrite(stored, change)
        with pytest.raises(CheckpointError, match=message):
            RewardProxy.from_pretrained(stored)


def test_a_proxy_of_the_earlier_format_is_read(world, quick, tmp_path):
    draw, curved = world
    proxy = train_proxy(draw(150, 0), curved(draw(150, 0)), config=quick(num_updates=5, ensemble_size=2))
    folder = tmp_path / "proxy"
    proxy.save_pretrained(folder)

    def age(copy):
        weights = load_file(copy / WEIGHTS)
        new = [name for name in weights if name == "calibration.ratios" or name.startswith("ood_score.")]
        assert len(new) == 6
        save_file({name: value for name, value in weights.items() if name not in new}, copy / WEIGHTS)
        since = ("calibrate_mean", "learning_curve", "refit_fraction")
        config = {k: v for k, v in vars(proxy.config).items() if k not in since}
        describe(copy, format="latent-rewards/proxy/2", config=config)
        (copy / HELD_OUT).unlink()

    rewrite(folder, age)
    old, latents = RewardProxy.from_pretrained(folder), draw(30, 1)
    assert torch.equal(old(latents), proxy(latents)) and old.heldout is None
    assert old.config.refit_fraction == 0, "before there was such a thing nothing was refitted"
    features = proxy.distance_features(proxy.normalise(latents), None)
    assert torch.equal(old.predict(latents).ood["reward"], proxy.distance(features))
    low, high = old.predict(latents).interval(0.9)
    assert torch.allclose(high["reward"] - low["reward"], 2 * 1.6448536 * old.predict(latents).std["reward"])


def digest(content):
    return hashlib.sha256(content).hexdigest()[:40]


class Hub(BaseHTTPRequestHandler):
    """The requests that making, filling and reading a repository take; every file is a regular one."""

    repositories: dict = {}

    def log_message(self, *_):
        """Say nothing."""

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            made = json.loads(body)
            self.repositories.setdefault(f"{made['organization']}/{made['name']}", {})
            self.answer({"url": f"http://{self.headers['Host']}/{made['organization']}/{made['name']}"})
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\nlibrary_name: latent-rewards")
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = self.repositories.get(name)
        if files is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif "/tree/" in path:
            self.answer([{"type": "file", "path": k, "size": len(v), "oid": digest(v)} for k, v in files.items()])
        elif path.startswith("/api/models"):
            self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
        else:
            content = files[path.partition(f"/resolve/{COMMIT}/")[2]]
            self.answer(content, ETag=f'"{digest(content)}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Hub, "repositories", {})
    public = huggingface_hub.constants.ENDPOINT
    for name, value in [*vars(huggingface_hub.constants).items()]:
        if isinstance(value, str) and value.startswith(public):
            local = value.replace(public, f"http://127.0.0.1:{server.server_port}")
            monkeypatch.setattr(huggingface_hub.constants, name, local)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield Hub.repositories
    server.shutdown()
    server.server_close()


def test_the_hub_gives_back_what_it_was_given(proxy, hub, world, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    url = proxy.push_to_hub("org/name", token="t")  # noqa: S106
    assert url.endswith(f"/org/name/commit/{COMMIT}")
    assert set(hub["org/name"]) == {CARD, DESCRIPTION, WEIGHTS, HELD_OUT, MANIFEST}
    loaded = RewardProxy.from_pretrained("org/name")
    assert same(proxy, loaded, world[0](20, 1)) and loaded.latent_space == "vae-a"
    assert json.loads(hub["org/name"][DESCRIPTION])["format"] == FORMAT


def test_neither_folder_nor_repository_names_both_possibilities(proxy, hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"'org/gone' is no folder here, and as a hub repository .*check the path"
    ):
        RewardProxy.from_pretrained("org/gone")
    with pytest.raises(CheckpointError, match="is no folder, and no name 'organisation/name'"):
        RewardProxy.from_pretrained(tmp_path / "gone" / "far")
    with pytest.raises(CheckpointError, match="is named 'organisation/name'; got 'name'"):
        proxy.push_to_hub("name")


def test_what_was_altered_on_the_hub_is_refused(proxy, hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    proxy.push_to_hub("org/name", token="t")  # noqa: S106
    hub["org/name"][WEIGHTS] = hub["org/name"][WEIGHTS][:-4] + b"\x00\x01\x02\x03"
    with pytest.raises(CheckpointError, match="proxy.safetensors differs"):
        RewardProxy.from_pretrained("org/name")


def test_a_folder_that_holds_something_else_is_left_alone(proxy, stored):
    proxy.save_pretrained(stored)
    with pytest.raises(FolderInUseError, match="give a new folder"):
        proxy.save_pretrained(stored.parent)
    RewardProxy.from_pretrained(stored)
