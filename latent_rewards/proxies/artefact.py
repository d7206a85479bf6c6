"""A proxy in a folder or on the hub: safetensors, JSON, and a model card for people.

``proxy.json`` says what the proxy is and holds its report, ``proxy.safetensors`` its weights, ``heldout.safetensors``
what it said of samples before it was trained on them, and ``README.md`` the same for a reader. A manifest with
every file's sha256 is checked before anything is read; the card is left out of that, since people edit cards.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_rewards.contracts import ConfigError, FingerprintMismatchError
from latent_rewards.proxies.config import ProxyConfig
from latent_rewards.proxies.heldout import HeldOut
from latent_rewards.proxies.noise import Schedule
from latent_rewards.proxies.text import PromptEncoder, PromptFeatures
from latent_rewards.proxies.trunks.backbone import VideoBackbone
from latent_rewards.proxies.trunks.shared import SharedTrunk, check_backbone
from latent_rewards.proxies.trunks.tiny_decoder import TinyDecoder
from latent_rewards.training.checkpoint import CheckpointError, check_target, commit_directory, verify_directory

if TYPE_CHECKING:
    from latent_rewards.proxies.proxy import RewardProxy

FORMAT = "latent-rewards/proxy/3"
DESCRIPTION, WEIGHTS, HELD_OUT, CARD = "proxy.json", "proxy.safetensors", "heldout.safetensors", "README.md"

_EARLIER = "latent-rewards/proxy/2"
_SINCE = ("calibration.ratios", "ood_score.")
"""Buffers that the earlier format has not; their initial values stand for it."""

_OTHER_NETWORKS = (
    "both files are as they were stored, by another version or with another trunk of that name; fit the proxy again, "
    "or load it with what stored it"
)
"""After the manifest was checked what does not fit is not damaged: the trunk has come to mean other networks."""

_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def save_proxy(proxy: RewardProxy, path: str | Path) -> None:
    """Commit ``proxy`` to the folder ``path``: all of it or nothing; the proxy of an existing folder is replaced.

    Raises:
        FolderInUseError: the folder holds something else.
    """
    from latent_rewards.proxies.card import model_card

    check_target(path, DESCRIPTION)
    description = {
        "format": FORMAT,
        "config": asdict(proxy.config),
        "latent_shape": proxy.latent_shape,
        "latent_shapes": proxy.latent_shapes,
        "reward_names": proxy.reward_names,
        "prompt_features": asdict(proxy.prompt_features),
        "latent_space": proxy.latent_space,
        "metric_fingerprints": proxy.metric_fingerprints,
        "report": proxy.report,
        "selection": proxy.selection,
        "backbone": proxy.shared.fingerprint if isinstance(proxy.shared, SharedTrunk) else None,
        "decoder": proxy.shared.geometry if isinstance(proxy.shared, TinyDecoder) else None,
        "schedule": None if proxy.noise is None else proxy.noise.probed,
    }
    with commit_directory(path) as folder:
        save_file({name: value.cpu().contiguous() for name, value in proxy.state_dict().items()}, folder / WEIGHTS)
        if proxy.heldout is not None:
            save_file(proxy.heldout.tensors(), folder / HELD_OUT)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))
        (folder / CARD).write_text(model_card(proxy), encoding="utf-8")


def load_proxy(
    path: str | Path,
    *,
    encode: PromptEncoder | None = None,
    backbone: VideoBackbone | None = None,
    schedule: Schedule | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> RewardProxy:
    """Load a proxy, on the CPU; see :meth:`latent_rewards.proxies.proxy.RewardProxy.from_pretrained`.

    Raises:
        CheckpointError: ``path`` is neither a folder nor a repository that can be had, or a file is missing, altered,
            or of another format; the message names it.
    """
    folder = Path(path) if Path(path).is_dir() else _download(str(path), revision, token)
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}: it is not a saved reward proxy")
    verify_directory(folder, ignoring=(CARD,))
    proxy, stored_format = _described(folder, encode, backbone, schedule)
    missing, unexpected = proxy.load_state_dict(_tensors(folder / WEIGHTS, proxy), strict=False, assign=True)
    if stored_format == _EARLIER:
        missing = [name for name in missing if not name.startswith(_SINCE)]
    if missing or unexpected:
        raise CheckpointError(
            f"{folder / WEIGHTS} lacks {missing} and has {unexpected} beside what {DESCRIPTION} describes: "
            f"{_OTHER_NETWORKS}"
        )
    if (folder / HELD_OUT).is_file():
        try:
            proxy.heldout = HeldOut.from_tensors(load_file(folder / HELD_OUT))
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(f"{folder / HELD_OUT} cannot be read: {error}; save the proxy again") from error
    return proxy.requires_grad_(False)


def _described(
    folder: Path, encode: PromptEncoder | None, backbone: VideoBackbone | None, schedule: Schedule | None
) -> tuple[RewardProxy, str]:
    """Return the proxy that ``proxy.json`` describes, with initial weights, and the format it is in."""
    from latent_rewards.proxies.proxy import RewardProxy

    try:
        described: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
        stored_format = described["format"]
        if stored_format not in (FORMAT, _EARLIER):
            raise CheckpointError(f"{folder} has format {stored_format!r}; this version reads {FORMAT!r}")
        config = ProxyConfig(**{"refit_fraction": 0.0, **described["config"]})  # those of before were not refitted
    except _MALFORMED as error:
        raise _undescribed(folder, error) from error
    check_backbone(described.get("backbone"), backbone)
    try:
        proxy = RewardProxy(
            config,
            tuple(described["latent_shape"]),
            tuple(described["reward_names"]),
            PromptFeatures(**described["prompt_features"]),
            latent_shapes=described.get("latent_shapes"),
            latent_space=described["latent_space"],
            metric_fingerprints=described["metric_fingerprints"],
            report=described["report"],
            encode=encode or getattr(backbone, "embed", None),
            backbone=backbone,
            decoder=TinyDecoder(**drawn) if (drawn := described.get("decoder")) else None,
            schedule=schedule,
            schedule_probe=described.get("schedule"),
        )
    except (ConfigError, FingerprintMismatchError):
        raise  # what is given does not fit what is stored: the files are sound
    except _MALFORMED as error:
        raise _undescribed(folder, error) from error
    proxy.selection = described.get("selection") or {}
    return proxy, stored_format


def _undescribed(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder / DESCRIPTION} describes no proxy that this version can make: {type(error).__name__}: {error}"
    )


def _tensors(file: Path, proxy: RewardProxy) -> dict[str, Tensor]:
    """Return the stored tensors, each of the shape that ``proxy`` has."""
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read: {error}; save the proxy again") from error
    for name, wanted in proxy.state_dict().items():
        if name in tensors and tensors[name].shape != wanted.shape:
            raise CheckpointError(
                f"{file} holds {name} of shape {tuple(tensors[name].shape)}; what {DESCRIPTION} describes has "
                f"{tuple(wanted.shape)}: {_OTHER_NETWORKS}"
            )
    return tensors


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    if not _REPOSITORY.fullmatch(repo_id):
        raise CheckpointError(
            f"{repo_id!r} is no folder, and no name 'organisation/name' of a hub repository either; give one of the two"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, token=token))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repo_id!r} is no folder here, and as a hub repository it cannot be had ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); check the path, or the name, the network and the token"
        ) from error


def push_proxy(
    proxy: RewardProxy,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Reward proxy",
) -> str:
    """Upload a proxy with its card to a hub repository, which is made if there is none.

    Args:
        proxy: what is uploaded, as :func:`save_proxy` stores it.
        repo_id: "organisation/name".
        private: of a repository that is made; None takes the organisation's default.
        token: with the right to write; None takes the stored one.
        commit_message: of the commit.

    Returns:
        The commit's URL.

    Raises:
        CheckpointError: ``repo_id`` is no such name.
    """
    if not _REPOSITORY.fullmatch(repo_id):
        raise CheckpointError(f"a hub repository is named 'organisation/name'; got {repo_id!r}")
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "proxy"
        save_proxy(proxy, folder)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(commit.commit_url)
