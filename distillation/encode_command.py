r"""``latent-distill encode``: prompts, or videos and their captions, become a cache that a distillation reads.

    latent-distill encode TEACHER --prompts prompts.txt --output cache
    latent-distill encode TEACHER --videos clips/ --num-frames 81 --height 480 --width 832 --fps 16 --output cache

TEACHER is the folder or hub id of a diffusers video pipeline. A video gives its first frames, scaled and cropped to the
size the teacher takes; its caption is the .txt beside it, or a line video<TAB>prompt of --captions. A file that cannot
be read is listed at the end and left out; the same command tries it again, goes on where it was killed, and encodes
anew a video whose caption changed or whose file has another size. The cache keeps the fingerprints of codec and text
encoder, which a run that reads it compares with its teacher's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillation.errors import DistillationConfigError
from distillation.prompts import PromptsError, caption_of, read_captions, read_prompts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distillation.cached import CacheSettings, EncodedClip
    from distillation.families import Teacher
    from latent_rewards.training.ranks import Ranks


@dataclass(frozen=True)
class Sources:
    """Videos by name, the prompts of those that have one, and what a captions file said (None: there is none)."""

    files: Mapping[str, Path]
    prompts: Mapping[str, str]
    captions: Mapping[str, str] | None


def add_parser(rooms: Any) -> None:  # noqa: ANN401 - argparse's sub-parsers have no public type
    """Add the command to those of ``latent-distill``."""
    command = rooms.add_parser(
        "encode",
        help="encode prompts, or videos and captions, once",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("teacher", metavar="TEACHER", help="folder or hub id of a diffusers video pipeline")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", metavar="FILE", help="one prompt a line")
    source.add_argument("--videos", metavar="FOLDER", help="searched for videos, folders below it too")
    command.add_argument("--captions", metavar="FILE", help="lines video<TAB>prompt (default: the .txt beside each)")
    command.add_argument("--output", required=True, metavar="FOLDER", help="where the cache goes")
    command.add_argument("--num-frames", type=int, help="frames of a video; needed unless the teacher's folder says")
    command.add_argument("--height", type=int, help="pixels, likewise")
    command.add_argument("--width", type=int, help="pixels, likewise")
    command.add_argument("--fps", type=float, help="frames taken per second (default: each frame of a file)")
    command.add_argument(
        "--shard-size", type=int, default=64, help="prompts or videos per shard (default: %(default)s)"
    )
    command.add_argument("--batch-size", type=int, default=4, help="encoded at once (default: %(default)s)")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of stored latents (default: %(default)s)"
    )
    command.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: an accelerator if there is one)")
    command.set_defaults(run=encode_command)


def encode_command(options: argparse.Namespace) -> int:
    """Encode, say what was left out, and return 1 if something was."""
    from distillation.cached import COMPLETE, load_clips, write_shard
    from distillation.places import begin_folder, launched
    from latent_rewards.training.run_folder import RunFolder

    for name in ("shard_size", "batch_size", "fps"):
        if (value := getattr(options, name)) is not None and not 0 < value < math.inf:
            raise DistillationConfigError(f"--{name.replace('_', '-')} must be positive and finite; got {value}")
    items, files, captions = sources(options)
    ranks, device = launched(options.device)
    root = begin_folder(options.output)
    teacher, settings = load(options, files or items, device)
    RunFolder(root).remember({"cache": settings})
    texts = list(dict.fromkeys(["", *items.values()]))
    encode_texts(root, teacher, texts, options.shard_size, ranks)
    encode_clips(root, teacher, Sources(files, items, captions), settings, options.batch_size, ranks)
    failures: dict[str, str] = {}
    for shard in shards(root, "clips", len(files), options.shard_size):
        failures |= load_clips(shard)[1]
    if ranks.index == 0:
        write_shard(root / COMPLETE, {}, {"prompts": list(items.values()) if not files else [], "failures": failures})
        for name, why in failures.items():
            print(f"failed: {name}: {why}", file=sys.stderr)
        what = f"{len(files) - len(failures)} of {len(files)} videos" if files else f"{len(items)} prompts"
        print(f"{what} and {len(texts)} distinct texts in {root}")
    ranks.leave()
    return 1 if failures else 0


def sources(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, Path], dict[str, str] | None]:
    """Return ``{row or video: prompt}``, ``{video: file}`` (empty for prompts alone) and the captions, if any.

    A video without a caption has no entry among the first; it is found again, with the reason, when it is encoded.

    Raises:
        PromptsError: a prompts or captions file cannot be used, or a captions file comes without videos.
        VideoError: there is no video.
        MissingPartError: videos are to be read and PyAV is not installed.
    """
    if options.prompts is not None:
        if options.captions is not None:
            raise PromptsError("--captions belongs to --videos; leave it out with --prompts")
        return {f"{row}": prompt for row, prompt in enumerate(read_prompts(options.prompts))}, {}, None
    from distillation.videos import find_videos, require_av

    require_av()
    files = find_videos(options.videos)
    captions = None if options.captions is None else read_captions(options.captions)
    items = {}
    for name, file in files.items():
        try:
            items[name] = caption_of(name, file, captions)
        except PromptsError:
            continue  # accounted for when the video's turn comes
    if not items:
        caption_of(*next(iter(files.items())), captions)
    return items, files, captions


def load(options: argparse.Namespace, named: Mapping[str, Any], device: torch.device) -> tuple[Teacher, CacheSettings]:
    """Return the teacher and the settings of the cache."""
    import distillation as ds
    from distillation.cached import CacheSettings, text_fingerprint

    print(f"loading {options.teacher}", file=sys.stderr)
    size = {"num_frames": options.num_frames, "height": options.height, "width": options.width}
    teacher = ds.load_teacher(options.teacher, device=device, **size)
    listed = json.dumps(list(named.values()) if options.prompts is not None else list(named))
    pixels: dict[str, int | None] = dict.fromkeys(size)
    if options.videos is not None:
        pixels = dict(zip(size, teacher.codec.video_size(teacher.latent_shape), strict=True))
    settings = CacheSettings(
        text=text_fingerprint(teacher.encode),
        codec=teacher.codec.fingerprint if options.videos is not None else None,
        latent_shape=list(teacher.latent_shape),
        fps=options.fps,
        dtype=options.dtype,
        sources=hashlib.sha256(listed.encode()).hexdigest(),
        num_sources=len(named),
        shard_size=options.shard_size,
        **pixels,
    )
    return teacher, settings


def shards(root: Path, kind: str, count: int, shard_size: int) -> list[Path]:
    """Return the folders of the shards that ``count`` things make."""
    return [root / f"{kind}-{number:05d}" for number in range(-(-count // shard_size))]


def encode_texts(root: Path, teacher: Teacher, texts: Sequence[str], shard_size: int, ranks: Ranks) -> None:
    """Encode prompts that are not in their shard yet; the processes of a launch share the shards."""
    from tqdm import tqdm

    from distillation.cached import save_texts, texts_of

    folders = shards(root, "texts", len(texts), shard_size)
    parts = [list(texts[start : start + shard_size]) for start in range(0, len(texts), shard_size)]
    mine = list(zip(folders, parts, strict=True))[ranks.index :: ranks.count]
    for folder, part in tqdm(mine, desc="prompts", unit="shard", dynamic_ncols=True, disable=hidden(ranks)):
        if texts_of(folder) != part:
            save_texts(folder, part, teacher.encode(part))
    ranks.wait_for(lambda: all(folder.is_dir() for folder in folders))


def encode_clips(
    root: Path, teacher: Teacher, sources: Sources, settings: CacheSettings, batch_size: int, ranks: Ranks
) -> None:
    """Encode the videos that are not in their shard yet, or failed; the processes of a launch share the shards."""
    from tqdm import tqdm

    from distillation.cached import load_clips, save_clips

    folders = shards(root, "clips", len(sources.files), settings.shard_size)
    mine = range(len(folders))[ranks.index :: ranks.count]
    total = sum(len(named_in(sources, number, settings.shard_size)) for number in mine)
    with tqdm(total=total, desc="videos", unit="video", dynamic_ncols=True, disable=hidden(ranks)) as bar:
        for number in mine:
            names = named_in(sources, number, settings.shard_size)
            rows, failures = load_clips(folders[number])
            done = {name: rows[name] for name in names if name in rows and unchanged(rows[name], name, sources)}
            missing = [name for name in names if name not in done]
            bar.update(len(done))
            faults: dict[str, str] = {}
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                done |= encode_batch(batch, teacher, sources, settings, faults)
                bar.update(len(batch))
            if done.keys() & set(missing) or faults != failures:
                save_clips(folders[number], {name: done[name] for name in names if name in done}, faults)
    ranks.wait_for(lambda: all(folder.is_dir() for folder in folders))
    ranks.wait()  # for those that tried failed videos again


def unchanged(clip: EncodedClip, name: str, sources: Sources) -> bool:
    """Return whether a video's caption and the size of its file are those it was encoded with."""
    return clip.prompt == sources.prompts.get(name) and clip.size in (None, sources.files[name].stat().st_size)


def named_in(sources: Sources, number: int, shard_size: int) -> list[str]:
    """Return the names of the videos of one shard."""
    return list(sources.files)[number * shard_size : (number + 1) * shard_size]


def encode_batch(
    names: Sequence[str], teacher: Teacher, sources: Sources, settings: CacheSettings, faults: dict[str, str]
) -> dict[str, EncodedClip]:
    """Return ``{video: clip}`` of those that can be read; the others go into ``faults``."""
    import torch

    from distillation.cached import EncodedClip
    from distillation.errors import DistillationError
    from distillation.videos import VideoError, read_clip

    size = settings.num_frames, settings.height, settings.width
    read: dict[str, tuple[str, int, Tensor]] = {}
    for name in names:
        file = sources.files[name]
        try:
            held, prompt = file.stat().st_size, caption_of(name, file, sources.captions)
            if prompt != sources.prompts.get(name):
                raise VideoError(f"the caption of {name} changed meanwhile; give the same command again")
            read[name] = prompt, held, read_clip(file, *size, fps=settings.fps)  # type: ignore[arg-type]
        except DistillationError as error:
            faults[name] = str(error)
    if not read:
        return {}
    with torch.no_grad():
        latents = teacher.codec.encode(torch.stack([video for *_, video in read.values()])).cpu()
    encoded = {}
    for (name, (prompt, held, _)), row in zip(read.items(), latents, strict=True):
        if bool(torch.isfinite(row).all()):
            encoded[name] = EncodedClip(prompt, row.to(getattr(torch, settings.dtype)).contiguous(), held)
        else:
            faults[name] = f"the latents of {name} are not finite"
    return encoded


def hidden(ranks: Ranks) -> bool:
    """Return whether this process draws no progress bars."""
    return ranks.index > 0 or not sys.stderr.isatty()
