"""Families: each makes a diffusers video pipeline a denoiser, its VAE a codec, and its text encoder a function.

A pipeline folder says nothing about the size of a video, so the shape of the latents stands beside ``model_index.json``
in ``latent_rewards.json`` where this library wrote the folder, and is asked of the caller otherwise.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distillation.condition import TextCondition
from distillation.denoiser import Denoiser
from distillation.errors import DistillationError
from distillation.student import LatentShape

if TYPE_CHECKING:
    from distillation.families.codec import VideoCodec
    from distillation.families.parts import PipelineParts

MODEL_INDEX = "model_index.json"
SIDECAR = "latent_rewards.json"
STUDENT_KIND = "few_step_student"
TEACHER_KIND = "teacher"

FAMILIES = {
    "CogVideoXPipeline": "distillation.families.cogvideox",
    "WanImageToVideoPipeline": "distillation.families.wan_image",
    "WanPipeline": "distillation.families.wan",
}
"""Pipeline class named in ``model_index.json`` -> module with ``FAMILY``, ``latent_shape_of``, ``load``,
``load_student`` and ``parts_of``."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class TeacherError(DistillationError, ValueError):
    """A pipeline cannot serve as a teacher: it is missing, of another class, or does not say what is needed."""


@dataclass(frozen=True)
class Teacher:
    """A diffusers video pipeline in the library's terms.

    Attributes:
        denoiser: the network and its noise schedule, frozen.
        codec: latents [B, C, F, H, W] <-> videos [B, T, 3, H', W'].
        encode: prompts (texts, or mappings with "prompt", and with "image" where one is animated) -> condition.
        latent_shape: (C, F, H, W) of one video.
        pipeline_path: the folder it was read from.
        family: name of the family, e.g. "wan".
        exporter: give it to :class:`~distillation.student.FewStepStudent` so that the student can be saved.
    """

    denoiser: Denoiser
    codec: VideoCodec
    encode: Callable[[Sequence[Any]], TextCondition]
    latent_shape: LatentShape
    pipeline_path: Path
    family: str
    exporter: PipelineParts


def load_teacher(
    path_or_hub_id: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Teacher:
    """Load any supported diffusers video pipeline; only safetensors weights are read and no code is fetched.

    Args:
        path_or_hub_id: a folder with ``model_index.json``, or ``"owner/name"`` on the hub.
        device: where the networks go.
        dtype: of the denoiser and the text encoder; the codec stays in float32. A denoiser in bfloat16 is the base of
            shared roles (``adapter_rank``) at half the memory; what is trained is held in float32 all the same.
        num_frames: frames of a video. The three sizes go together, and are needed unless the folder states a shape, or
            its transformer was made for one (CogVideoX).
        height: pixels.
        width: pixels.

    Raises:
        TeacherError: there is no such pipeline, its class is not supported, or the size of the videos is unknown or
            impossible. Raised before any weights are read.
    """
    folder = pipeline_folder(path_or_hub_id)
    sidecar = read_sidecar(folder)
    if sidecar.get("kind") == STUDENT_KIND:
        raise TeacherError(f"{folder} holds a few-step student; load it with distillation.families.export.load_student")
    family = family_of(folder)
    shape: LatentShape = family.latent_shape_of(folder, (num_frames, height, width), sidecar.get("latent_shape"))
    teacher: Teacher = family.load(folder, device=device, dtype=dtype, latent_shape=shape, sidecar=sidecar)
    return teacher


def family_of(folder: Path) -> Any:  # noqa: ANN401 - a module
    """Return the module of the family whose pipeline is in ``folder``; see :data:`FAMILIES`.

    Raises:
        TeacherError: the class of the pipeline is not supported.
    """
    return importlib.import_module(FAMILIES[_pipeline_class(folder / MODEL_INDEX)])


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Return what ``latent_rewards.json`` in ``folder`` says, or an empty dict where there is none.

    Raises:
        TeacherError: the file is not a JSON object.
    """
    return read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else {}


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in ``file``.

    Raises:
        TeacherError: the file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TeacherError(f"{file} cannot be read ({error.strerror}): the pipeline is incomplete") from error
    except ValueError as error:
        raise TeacherError(f"{file} is not valid JSON ({error}); download or write the pipeline again") from error
    if not isinstance(content, dict):
        raise TeacherError(f"{file} holds a {type(content).__name__}, not an object; write the pipeline again")
    return content


def import_diffusers() -> Any:  # noqa: ANN401 - the module
    """Return the module ``diffusers``, imported on first use, for it takes seconds."""
    from latent_rewards.training.torchvision_guard import mend_torchvision

    mend_torchvision()
    import diffusers

    return diffusers


def _pipeline_class(index: Path) -> str:
    name = read_json(index).get("_class_name")
    if name not in FAMILIES:
        raise TeacherError(f"{index} names the pipeline class {name!r}; supported: {', '.join(sorted(FAMILIES))}")
    return str(name)


def pipeline_folder(source: str | Path) -> Path:
    """Return the folder of a pipeline, which is fetched if it is on the hub.

    Raises:
        TeacherError: ``source`` is neither such a folder nor a hub id.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / MODEL_INDEX).is_file():
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
            raise TeacherError(
                f"{folder} has no {MODEL_INDEX} (it holds {found}); give the top folder of a diffusers pipeline of one "
                f"of the classes {', '.join(sorted(FAMILIES))}"
            )
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(source)):
        raise TeacherError(
            f"{source} is neither a folder nor a hub id 'owner/name'; give the top folder of a diffusers pipeline of "
            f"one of the classes {', '.join(sorted(FAMILIES))}"
        )
    return _download(str(source))


def _download(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # The index first: an unsupported class is refused before gigabytes of weights are fetched.
        _pipeline_class(Path(hf_hub_download(hub_id, MODEL_INDEX)))
        return Path(import_diffusers().DiffusionPipeline.download(hub_id, use_safetensors=True))
    except (OSError, HfHubHTTPError) as error:
        raise TeacherError(
            f"{hub_id} is no local folder, and the hub did not give a pipeline of that name "
            f"({type(error).__name__}: {error}); check the name and the connection, or give a folder"
        ) from error
