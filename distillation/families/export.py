"""Students and teachers as folders that an unmodified diffusers pipeline loads.

A student's folder holds the stock pipeline, one scheduler configuration per step count (see
:mod:`distillation.families.grids`) and ``latent_rewards.json``, which says what the pipeline cannot: the grids, eta,
the shift and the shape of the latents. Folders are committed whole or not at all.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillation.errors import DistillationError, MissingPartError
from distillation.families import (
    FAMILIES,
    MODEL_INDEX,
    SIDECAR,
    STUDENT_KIND,
    TEACHER_KIND,
    TeacherError,
    family_of,
    import_diffusers,
    read_sidecar,
)
from distillation.families.grids import build_scheduler, scheduler_folder
from distillation.families.parts import PipelineParts, kept_in_float32
from distillation.student import FewStepStudent, LatentShape
from latent_rewards.training import checkpoint
from latent_rewards.training.checkpoint import MANIFEST, commit_directory, verify_directory

_CARD = """---
library_name: diffusers
pipeline_tag: {task}
---
A few-step student for diffusers' stock `{pipeline}`. Step counts: {counts}; each has its own scheduler folder.

```python
from diffusers import {pipeline}, {scheduler}

pipe = {pipeline}.from_pretrained("<this folder>")
pipe.scheduler = {scheduler}.from_pretrained("<this folder>", subfolder="{subfolder}")
video = pipe(
    {inputs}, num_inference_steps={steps}, guidance_scale=1.0, max_sequence_length={length},
    num_frames={frames}, height={height}, width={width},
).frames
```

{seeding}
"""


class StudentError(DistillationError, ValueError):
    """A folder does not hold a student that can be loaded."""


class FolderInUseError(DistillationError, checkpoint.FolderInUseError):
    """The target holds something else, which writing there would remove."""


def save_student(student: FewStepStudent, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a student as a stock pipeline folder, with one scheduler folder per step count; whole or not at all.

    ``scheduler/`` is that of the largest step count. Adapters are merged into the weights. An existing folder is
    replaced if it was written by this module.

    Args:
        student: of a supported family's denoiser, built with ``latent_shape`` and ``exporter=teacher.exporter``.
        path: the folder.
        dtype: of the stored weights, e.g. ``torch.bfloat16``; layers that diffusers keeps in float32 stay so. None
            keeps them as they are.

    Raises:
        TimestepsError: no stock scheduler reaches a grid; the message names it. Raised before anything is written.
        MissingPartError: the student lacks the parts of the pipeline, or its denoiser has no stock pipeline.
        FolderInUseError: the folder exists and holds something else.
    """
    student = student.merged()
    parts, denoiser = student.exporter, student.denoiser
    if not isinstance(parts, PipelineParts):
        raise MissingPartError(
            f"the student was built with exporter={parts!r}, so the rest of the pipeline is missing; build it with "
            "exporter=teacher.exporter"
        )
    configurations = parts.configurations(denoiser, student.grids, student.eta)
    shape = student.latent_shape()
    check_target(Path(path))
    with commit_directory(path) as folder:
        default = build_scheduler(configurations[max(configurations)])
        _write_pipeline(folder, parts.pipeline_class, {**parts.components(denoiser), "scheduler": default}, dtype)
        write_schedulers(folder, configurations)
        sidecar = {
            "kind": STUDENT_KIND,
            "timesteps": {str(count): list(grid) for count, grid in student.grids.items()},
            "eta": student.eta,
            **parts.stated(denoiser),
        }
        _write_sidecar(folder, sidecar, shape, parts)
        (folder / "README.md").write_text(_card(parts, configurations, shape), encoding="utf-8")


def load_student(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> FewStepStudent:
    """Return the student in ``path``; ``student.exporter.codec`` is its codec.

    Args:
        path: a folder written by :func:`save_student`.
        device: where the networks go.
        dtype: of the denoiser and the text encoder; the codec stays in float32.

    Raises:
        StudentError: the folder holds no student.
        CheckpointError: a file is missing, truncated or altered.
    """
    folder = Path(path)
    sidecar = read_sidecar(folder)
    if sidecar.get("kind") != STUDENT_KIND:
        found = f"kind {sidecar.get('kind')!r}" if sidecar else f"no {SIDECAR}"
        raise StudentError(
            f"{folder} holds no student ({found}); expected a folder written by student.save_pretrained, of kind "
            f"{STUDENT_KIND!r}; an adapter is loaded with distillation.families.adapters.load_adapter"
        )
    family = family_of(folder)
    if sidecar.get("family") != family.FAMILY:
        raise StudentError(
            f"{folder} holds a student of the family {sidecar.get('family')!r} in a pipeline of the family "
            f"{family.FAMILY!r}; write it again"
        )
    if (folder / MANIFEST).is_file():
        verify_directory(folder)
    denoiser, parts = family.load_student(folder, device=device, dtype=dtype, sidecar=sidecar)
    channels, frames, height, width = sidecar["latent_shape"]
    return FewStepStudent(
        denoiser,
        {int(count): grid for count, grid in sidecar["timesteps"].items()},
        sidecar["eta"],
        encode=parts.encode,
        latent_shape=(channels, frames, height, width),
        exporter=parts,
    )


def save_teacher_pipeline(
    path: str | Path,
    *,
    transformer: nn.Module,
    vae: nn.Module,
    text_encoder: nn.Module,
    tokenizer: Any,  # noqa: ANN401 - any transformers tokenizer
    scheduler: Any,  # noqa: ANN401 - any diffusers scheduler
    latent_shape: LatentShape,
    dtype: torch.dtype | None = torch.bfloat16,
    max_sequence_length: int | None = None,
    pipeline_class: str = "WanPipeline",
) -> None:
    """Write components as a stock pipeline folder that :func:`~distillation.families.load_teacher` reads.

    For text to video. An image-to-video pipeline has an image encoder too, and its images are encoded at the size of
    the videos, so it is written with diffusers' own ``save_pretrained``, which keeps all of it, and refused here.

    Args:
        path: the folder; one written by this module is replaced, whole or not at all.
        transformer: of the family, e.g. ``WanTransformer3DModel``.
        vae: e.g. ``AutoencoderKLWan``.
        text_encoder: e.g. ``UMT5EncoderModel``.
        tokenizer: its tokenizer.
        scheduler: the teacher's noise schedule is read from its configuration, e.g. the shift.
        latent_shape: (C, F, H, W) of one video; stored beside ``model_index.json``.
        dtype: of the stored weights, see :func:`save_student`; None keeps them.
        max_sequence_length: tokens per prompt the transformer was trained with; None: what the networks state.
        pipeline_class: a supported text-to-video class of diffusers, e.g. "CogVideoXPipeline".

    Raises:
        TeacherError: the class is not supported.
        MissingPartError: it is of image to video.
        FolderInUseError: the folder exists and holds something else.
    """
    if pipeline_class not in FAMILIES:
        raise TeacherError(f"{pipeline_class!r} is not supported; choose one of {', '.join(sorted(FAMILIES))}")
    check_target(Path(path))
    components = {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": vae,
        "transformer": transformer,
        "scheduler": scheduler,
    }
    parts: PipelineParts = importlib.import_module(FAMILIES[pipeline_class]).parts_of(
        components, max_sequence_length=max_sequence_length
    )
    with commit_directory(path) as folder:
        _write_pipeline(folder, pipeline_class, components, dtype)
        _write_sidecar(folder, {"kind": TEACHER_KIND}, latent_shape, parts)


def check_target(path: Path) -> None:
    """Check that a folder may be written: it is new, empty, or was written by this library.

    Raises:
        FolderInUseError: it holds something else.
    """
    checkpoint.check_target(path, SIDECAR, FolderInUseError)


def write_schedulers(folder: Path, configurations: Mapping[int, Mapping[str, Any]]) -> None:
    """Write one scheduler folder per step count, of what ``PipelineParts.configurations`` returned."""
    for count, configuration in configurations.items():
        build_scheduler(configuration).save_pretrained(folder / scheduler_folder(count))


def _write_sidecar(folder: Path, content: dict[str, Any], latent_shape: LatentShape, parts: PipelineParts) -> None:
    content = {
        **content,
        "family": parts.family,
        "latent_shape": list(latent_shape),
        "max_sequence_length": parts.encode.max_sequence_length,
    }
    (folder / SIDECAR).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_pipeline(
    folder: Path, pipeline_class: str, components: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    diffusers = import_diffusers()
    getattr(diffusers, pipeline_class)(**components).save_config(folder)
    for name, component in components.items():
        if isinstance(component, diffusers.ModelMixin):
            _write_model(component, folder / name, dtype)
        elif isinstance(component, nn.Module):
            transformers_model: Any = component
            transformers_model.save_pretrained(folder / name, state_dict=_stored(component, dtype))
        elif hasattr(component, "save_pretrained"):
            component.save_pretrained(folder / name)
    for file in [folder / MODEL_INDEX, *folder.glob("*/*config.json")]:
        content = json.loads(file.read_text(encoding="utf-8"))
        # Where a component was loaded from is nobody's business and wrong elsewhere.
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_model(model: Any, folder: Path, dtype: torch.dtype | None) -> None:  # noqa: ANN401 - a diffusers model
    if getattr(model, "peft_config", None):
        model = copy.deepcopy(model)
        model.fuse_lora()
        model.unload_lora()
    # A twin that holds the tensors to be stored: they are cast and made contiguous without touching the model in use.
    with torch.device("meta"):
        twin = type(model).from_config(model.config)
    twin.load_state_dict(_stored(model, dtype), assign=True)
    twin.save_pretrained(folder)


def _stored(model: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:  # noqa: ANN401 - a model
    """Return the weights on the CPU, contiguous, in ``dtype`` unless diffusers keeps them in float32; ties are kept."""
    seen: dict[tuple[int, torch.Size], Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        cast = dtype is not None and tensor.is_floating_point() and not kept_in_float32(model, name)
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen:
            seen[key] = tensor.detach().to("cpu", dtype if cast else tensor.dtype).contiguous()
        weights[name] = seen[key]
    return weights


def _card(parts: PipelineParts, configurations: Mapping[int, Mapping[str, Any]], shape: LatentShape) -> str:
    steps = max(configurations)
    frames, height, width = parts.codec.video_size(shape)
    return _CARD.format(
        pipeline=parts.pipeline_class,
        task=parts.task,
        inputs=parts.inputs,
        seeding=parts.seeding,
        counts=", ".join(map(str, configurations)),
        scheduler=configurations[steps]["_class_name"],
        subfolder=scheduler_folder(steps),
        steps=steps,
        length=parts.encode.max_sequence_length,
        frames=frames,
        height=height,
        width=width,
    )
