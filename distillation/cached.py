"""Encoded prompts and videos on disk, so that a distillation encodes nothing.

A cache holds ``settings``, one ``texts-NNNNN`` per shard of distinct prompts, one ``clips-NNNNN`` per shard of videos
(none in a cache of prompts), and at the end ``complete``. Each is committed whole, tensors in safetensors, so a killed
encoding goes on with the shard it was at. The empty prompt, which guidance needs, is always among the texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distillation.condition import TextCondition
from distillation.errors import ConditionError, DistillationError, MissingPartError
from distillation.fingerprints import add_weights
from distillation.latents import ShardedLatents
from distillation.trimmed import TrimmedText, trimmed_rows
from latent_rewards.training.checkpoint import MANIFEST, commit_directory, verify_directory

COMPLETE, SETTINGS = "complete", "settings"
_TENSORS, _FACTS = "tensors.safetensors", "facts.json"

Encode = Callable[[Sequence[Any]], TextCondition]


class CacheError(DistillationError, ValueError):
    """A cache is missing, unfinished, or was made with another codec, text encoder or size of videos."""


@dataclass(frozen=True)
class CacheSettings:
    """What the content of a cache depends on.

    Attributes:
        text: fingerprint of the text encoder, see :func:`text_fingerprint`.
        codec: fingerprint of the codec; None in a cache of prompts.
        latent_shape: (C, F, H, W) of one video.
        num_frames: frames of one video; the sizes are None in a cache of prompts.
        height: pixels.
        width: pixels.
        fps: frames per second that were taken; None: each frame of a file.
        dtype: of the stored latents, "float32" or "bfloat16".
        sources: sha256 of the prompts, or of the names of the videos.
        num_sources: prompts, or videos.
        shard_size: prompts or videos in one shard.
    """

    text: str
    codec: str | None
    latent_shape: list[int]
    num_frames: int | None
    height: int | None
    width: int | None
    fps: float | None
    dtype: str
    sources: str
    num_sources: int
    shard_size: int


class CachedText:
    """What a text encoder made of some prompts; called like one, it looks them up.

    Args:
        rows: prompt -> {"embeddings": [l, D] without the zeros at its end, name of an extra tensor: its row}.
        length: tokens of a row, padding included.
    """

    def __init__(self, rows: Mapping[str, Mapping[str, Tensor]], length: int) -> None:
        self.rows, self.length = dict(rows), length

    def __call__(self, prompts: Sequence[Any]) -> TextCondition:
        """Return the condition of prompts (texts, or mappings with a text under "prompt") on the CPU.

        Raises:
            ConditionError: there is no prompt.
            CacheError: a prompt is not in the cache.
        """
        return self.trimmed(prompts).to("cpu")

    def trimmed(self, prompts: Sequence[Any]) -> TrimmedText:
        """Return the condition of many prompts as it is held, without padding; a batch that is taken of it has it.

        Raises:
            ConditionError: there is no prompt.
            CacheError: a prompt is not in the cache.
        """
        texts = [prompt["prompt"] if isinstance(prompt, dict) else prompt for prompt in prompts]
        if not texts:
            raise ConditionError("no prompts to look up; pass at least one")
        if unknown := [text for text in texts if text not in self.rows]:
            raise CacheError(f"the cache does not hold the prompt {unknown[0]!r}; encode it, or load the text encoder")
        return TrimmedText([self.rows[text] for text in texts], self.length)


@dataclass(frozen=True)
class EncodedClip:
    """A video's prompt and latents [C, F, H, W], and its file's size in bytes (None: made before it was kept)."""

    prompt: str
    latents: Tensor
    size: int | None


@dataclass(frozen=True)
class CachedData:
    """A finished cache: texts and prompts in memory, latents on disk.

    Attributes:
        settings: what it was made with.
        prompts: one per row, in the order of the file or of the videos' names.
        latents: [N, C, F, H, W] in normalised model space, read by the row; None in a cache of prompts.
        encode: looks the prompts up.
        failures: ``{video: why}`` of those that were left out.
    """

    settings: CacheSettings
    prompts: list[str]
    latents: ShardedLatents | None
    encode: CachedText
    failures: dict[str, str]

    @property
    def source(self) -> Any:  # noqa: ANN401 - what DistillationTrainer takes
        """What :class:`~distillation.trainer.DistillationTrainer` takes, with a teacher whose ``encode`` is this one's.

        (latents, prompts) or the prompts alone: the trainer encodes each distinct one, and the negative, by look-up.
        With ``encode.trimmed`` in place of ``encode`` they are padded batch by batch and not all at once.
        """
        return self.prompts if self.latents is None else (self.latents, self.prompts)

    def check(self, *, codec: str, text: str, latent_shape: Sequence[int], folder: str | Path) -> None:
        """Check that a teacher speaks the cache's language.

        Args:
            codec: the fingerprint of the teacher's codec.
            text: that of its text encoder.
            latent_shape: of its videos.
            folder: of the cache, for the message.

        Raises:
            CacheError: something differs; the message names both.
        """
        mine = self.settings
        pairs: list[tuple[str, object, object]] = [("text encoder", mine.text, text)]
        if self.latents is not None:
            pairs += [("codec", mine.codec, codec), ("latent shape", mine.latent_shape, list(latent_shape))]
        for name, cached, teachers in pairs:
            if cached != teachers:
                raise CacheError(
                    f"{folder} was encoded with the {name} {cached}, and the teacher's is {teachers}: encode again "
                    "with this teacher, or distil the one it was encoded with"
                )


def read_cache_settings(folder: str | Path) -> CacheSettings:
    """Return the settings of a finished cache, without reading its tensors.

    Raises:
        CacheError: the folder is no cache, or one that is not finished.
        CheckpointError: a file is missing or altered.
    """
    root = Path(folder)
    if not (root / SETTINGS).is_dir():
        raise CacheError(f"{root} holds no cache; give a folder written by `latent-distill encode`")
    if not (root / COMPLETE).is_dir():
        raise CacheError(f"{root} is not finished; give the same `latent-distill encode` again, it goes on")
    verify_directory(root / SETTINGS)
    try:
        return CacheSettings(**json.loads((root / SETTINGS / "settings.json").read_text())["cache"])
    except (KeyError, TypeError) as error:
        raise CacheError(f"{root} holds the settings of something else than a cache ({error})") from error


def parts_fingerprint(folder: str | Path) -> str:
    """Return sha256 of the manifests of a cache's shards, which list the sha256 of all they hold; no tensor is read."""
    manifests = sorted(path for kind in ("texts", "clips") for path in Path(folder).glob(f"{kind}-*/{MANIFEST}"))
    listed = {path.parent.name: path.read_text(encoding="utf-8") for path in manifests}
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def load_cache(folder: str | Path) -> CachedData:
    """Read a finished cache; every file is checked against its manifest.

    Raises:
        CacheError: see :func:`read_cache_settings`; or no video could be encoded.
        CheckpointError: a file is missing, truncated or altered.
    """
    root, settings = Path(folder), read_cache_settings(folder)
    rows: dict[str, dict[str, Tensor]] = {}
    length = 0
    for shard in sorted(root.glob("texts-*")):
        tensors, facts = _read(shard)
        length = facts["length"]
        for index, text in enumerate(facts["texts"]):
            prefix = f"{index}."
            rows[text] = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
    text = CachedText(rows, length)
    if settings.codec is None:
        _, facts = _read(root / COMPLETE)
        return CachedData(settings, facts["prompts"], None, text, {})
    parts: list[Tensor] = []
    prompts: list[str] = []
    failures: dict[str, str] = {}
    for shard in sorted(root.glob("clips-*")):
        tensors, facts = _read(shard)
        prompts += [row["prompt"] for row in facts["rows"]]
        failures |= facts["failures"]
        if "latents" in tensors:
            parts.append(tensors["latents"])
    if not parts:
        name, why = next(iter(failures.items()))
        raise CacheError(f"none of the {len(failures)} videos of {root} could be encoded; {name}: {why}")
    return CachedData(settings, prompts, ShardedLatents(parts), text, failures)


def save_texts(folder: Path, texts: Sequence[str], condition: TextCondition) -> None:
    """Commit what a text encoder made of some prompts; zeros at the end of a row are left out."""
    rows = trimmed_rows(condition)
    tensors = {f"{index}.{name}": tensor for index, row in enumerate(rows) for name, tensor in row.items()}
    write_shard(folder, tensors, {"texts": list(texts), "length": condition.embeddings.shape[1]})


def texts_of(folder: Path) -> list[str]:
    """Return the prompts of a shard, none where there is no such shard.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
    """
    return list(_read(folder)[1]["texts"]) if folder.is_dir() else []


def load_clips(folder: Path) -> tuple[dict[str, EncodedClip], dict[str, str]]:
    """Return ``{video: clip}`` and ``{video: why}`` of a shard; both are empty where there is none.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
    """
    if not folder.is_dir():
        return {}, {}
    tensors, facts = _read(folder)
    rows = {
        row["video"]: EncodedClip(row["prompt"], tensors["latents"][index], row.get("bytes"))
        for index, row in enumerate(facts["rows"])
    }
    return rows, facts["failures"]


def save_clips(folder: Path, rows: Mapping[str, EncodedClip], failures: Mapping[str, str]) -> None:
    """Commit a shard of videos: latents, prompts and sizes of the files, and why the others are left out."""
    tensors = {"latents": torch.stack([clip.latents for clip in rows.values()])} if rows else {}
    listed = [{"video": name, "prompt": clip.prompt, "bytes": clip.size} for name, clip in rows.items()]
    write_shard(folder, tensors, {"rows": listed, "failures": dict(failures)})


def write_shard(folder: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Commit tensors and JSON-able facts as a folder."""
    with commit_directory(folder) as temporary:
        if tensors:
            save_file(tensors, temporary / _TENSORS)
        (temporary / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    verify_directory(folder)
    file = folder / _TENSORS
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    return load_file(file) if file.is_file() else {}, facts


def text_fingerprint(encode: Any) -> str:  # noqa: ANN401 - a family's text encoder
    """Return what identifies a text encoder: its class, vocabulary, length, and weights rounded to bfloat16.

    Args:
        encode: has ``fingerprint``, or ``text_encoder`` (a module), ``tokenizer`` and ``max_sequence_length``.

    Raises:
        MissingPartError: it has none of these.
    """
    if (stated := getattr(encode, "fingerprint", None)) is not None:
        return str(stated)
    encoder = getattr(encode, "text_encoder", None)
    if not isinstance(encoder, nn.Module):
        raise MissingPartError(f"a {type(encode).__name__} cannot be told from others: it has no text_encoder")
    vocabulary = sorted(encode.tokenizer.get_vocab().items())
    settings = [type(encoder).__name__, encode.max_sequence_length, vocabulary]
    digest = hashlib.sha256(json.dumps(settings).encode())
    add_weights(digest, encoder.state_dict())
    return f"text-{digest.hexdigest()[:32]}"
