"""``latent-distill info``: what a folder holds, as JSON.

    latent-distill info runs/distilled/student
    latent-distill info runs/distilled
    latent-distill info cache --check

Of a student: its family, the shape of its latents, its grids with the noise levels they stand for, and its fingerprint
(sha256 of the manifest that lists every file). Of an adapter: its rank and grids, and the hash of the weights it
belongs to. Of a teacher: family and sizes. Of a run: its settings and how far each stage is. Of a cache: what it was
encoded with. Of sampled videos: how many there are and how they were made. Only small files are read; --check reads all
of them, compares them with their manifests and adds the codec's fingerprint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distillation.errors import DistillationError

_ANY_SIZE: dict[str, Any] = {"num_frames": 81, "height": 480, "width": 832}
"""Fits every family. What is told of a pipeline that states no size does not depend on it."""


class InfoError(DistillationError, ValueError):
    """A folder holds nothing this library knows."""


def add_parser(rooms: Any) -> None:  # noqa: ANN401 - argparse's sub-parsers have no public type
    """Add the command to those of ``latent-distill``."""
    command = rooms.add_parser(
        "info",
        help="describe a student, adapter, teacher, run, cache or sampled videos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "folder", metavar="FOLDER", help="of a student, an adapter, a teacher, a run, a cache or videos"
    )
    command.add_argument("--check", action="store_true", help="read and verify every file; slow for large weights")
    command.set_defaults(run=info_command)


def info_command(options: argparse.Namespace) -> int:
    """Print what the folder holds."""
    print(json.dumps(describe(Path(options.folder), check=options.check), indent=1))
    return 0


def describe(folder: Path, *, check: bool = False) -> dict[str, Any]:
    """Return what a folder holds, as JSON can hold it; ``check`` reads and verifies all of it.

    Raises:
        InfoError: it holds nothing this library knows.
        CheckpointError: a file is missing or altered.
        TeacherError: a pipeline cannot be loaded; only where its weights are read.
    """
    from distillation.cached import SETTINGS
    from distillation.families import MODEL_INDEX, SIDECAR

    kinds: list[tuple[Path, Callable[..., dict[str, Any]]]] = [
        (folder / MODEL_INDEX, pipeline),
        (folder / SIDECAR, adapter),
        (folder / SETTINGS / "settings.json", worked_in),
    ]
    for mark, told in kinds:
        if mark.is_file():
            return told(folder, check=check)
    raise InfoError(
        f"{folder} holds no pipeline, adapter, run or cache: it has neither {MODEL_INDEX} nor {SIDECAR} nor {SETTINGS}/"
    )


def adapter(folder: Path, *, check: bool) -> dict[str, Any]:
    """Return what a stored adapter is, and on which weights.

    Raises:
        InfoError: the folder holds no adapter, but what describes something else.
        CheckpointError: a file is missing or altered.
    """
    from distillation.families import SIDECAR, read_sidecar
    from distillation.families.adapters import ADAPTER_KIND
    from latent_rewards.training.checkpoint import MANIFEST, file_sha256, verify_directory

    facts = read_sidecar(folder)
    if facts.get("kind") != ADAPTER_KIND:
        raise InfoError(f"{folder} has a {SIDECAR} of kind {facts.get('kind')!r} and no pipeline; write it again")
    if whole := (folder / MANIFEST).is_file():
        facts |= {"fingerprint": file_sha256(folder / MANIFEST)}
    if whole and check:
        verify_directory(folder)
    return {**facts, "step_counts": sorted(map(int, facts["timesteps"]))} | ({"checked": True} if check else {})


def pipeline(folder: Path, *, check: bool) -> dict[str, Any]:
    """Return what a stored student or teacher is."""
    import torch

    from distillation.families import FAMILIES, MODEL_INDEX, STUDENT_KIND, read_json, read_sidecar
    from latent_rewards.training.checkpoint import MANIFEST, file_sha256, verify_directory

    sidecar, name = read_sidecar(folder), read_json(folder / MODEL_INDEX).get("_class_name")
    whole = (folder / MANIFEST).is_file()
    facts: dict[str, Any] = {
        "kind": sidecar.get("kind", "diffusers pipeline"),
        "pipeline": name,
        "supported": name in FAMILIES,
        "family": sidecar.get("family"),
        "latent_shape": sidecar.get("latent_shape"),
        "video": video_size(folder, sidecar.get("latent_shape")),
        "fingerprint": file_sha256(folder / MANIFEST) if whole else None,
    }
    if sidecar.get("kind") == STUDENT_KIND:
        facts |= {"step_counts": sorted(map(int, sidecar["timesteps"])), "timesteps": sidecar["timesteps"]}
        facts |= {key: value for key, value in sidecar.items() if key not in facts}
    if not check:
        return facts
    if whole:
        verify_directory(folder)
    if sidecar.get("kind") == STUDENT_KIND:
        from distillation.families.export import load_student

        student = load_student(folder)
        schedule: Any = student.denoiser.schedule
        levels = {n: schedule(torch.tensor(grid, dtype=torch.float64))[1] for n, grid in student.grids.items()}
        facts["noise_levels"] = {str(count): sigma.tolist() for count, sigma in levels.items()}
        return {**facts, "schedule": str(schedule), "codec": student.exporter.codec.fingerprint, "checked": True}
    from distillation.families import load_teacher

    stated = facts["video"] is not None or facts["latent_shape"] is not None
    teacher = load_teacher(folder, **({} if stated else _ANY_SIZE))
    return {**facts, "schedule": str(teacher.denoiser.schedule), "codec": teacher.codec.fingerprint, "checked": True}


def video_size(folder: Path, latent_shape: Sequence[int] | None) -> dict[str, int] | None:
    """Return frames, height and width of a video, or None where its latents or the pipeline's family are not known.

    Args:
        folder: of a pipeline.
        latent_shape: (C, F, H, W); None takes what the transformer was made for, where it says (CogVideoX).
    """
    from distillation.families import TeacherError, family_of, read_json
    from distillation.families.codec import video_size

    try:
        family = family_of(folder)
        shape = family.latent_shape_of(folder, (None, None, None), latent_shape)
    except TeacherError:
        return None
    size = video_size(shape, family.scale_of(read_json(folder / "vae" / "config.json")))
    return dict(zip(("num_frames", "height", "width"), size, strict=True))


def worked_in(folder: Path, *, check: bool) -> dict[str, Any]:
    """Return what a run, a cache or a folder of sampled videos is, and how far it is.

    Raises:
        InfoError: it is the work of something else, such as a collection of rewards.
        CheckpointError: a file is missing or altered.
    """
    from distillation.cached import COMPLETE, SETTINGS
    from latent_rewards.training.checkpoint import MANIFEST, latest_checkpoint, verify_directory

    content = json.loads((folder / SETTINGS / "settings.json").read_text(encoding="utf-8"))
    if check:
        for manifest in sorted(folder.glob(f"*/{MANIFEST}")) + sorted(folder.glob(f"*/*/{MANIFEST}")):
            verify_directory(manifest.parent)
    checked = {"checked": True} if check else {}
    if "cache" in content:
        shards = {kind: len(list(folder.glob(f"{kind}-*"))) for kind in ("texts", "clips")}
        return {"kind": "cache", "finished": (folder / COMPLETE).is_dir(), "shards": shards} | content | checked
    if "sample" in content:
        return {"kind": "videos", "videos": len(list(folder.glob("*.mp4"))), "settings": content["sample"]} | checked
    if "distillation" not in content:
        raise InfoError(
            f"{folder} is the work of another command, whose settings are {', '.join(sorted(content))}; a run of "
            "latent-distill, a cache, or videos it sampled can be described"
        )
    stages = folder / "distillation" if "run" in content else folder  # one of recipes.dollar has others too
    newest = {stage: latest_checkpoint(stages / stage) for stage in ("vsd", "cd", "joint")}
    updates = {stage: int(path.name.removeprefix("step-")) for stage, path in newest.items() if path is not None}
    finished = (folder / "student" / MANIFEST).is_file()
    return {"kind": "run", "finished": finished, "updates": updates, "settings": content} | checked
