"""A student as its adapter alone: megabytes beside a teacher that is there anyway, for stock ``load_lora_weights``.

A folder holds one LoRA file per transformer as diffusers writes it, one scheduler folder per step count, and
``latent_rewards.json`` with the grids and the fingerprint of the teacher's weights, which loading checks: on other
weights an adapter is noise.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillation.errors import MissingPartError
from distillation.families import SIDECAR, Teacher, import_diffusers, read_sidecar
from distillation.families.export import StudentError, check_target, write_schedulers
from distillation.families.grids import scheduler_folder
from distillation.families.parts import PipelineParts
from distillation.fingerprints import add_weights
from distillation.roles import Role, SharedBase
from distillation.student import FewStepStudent
from latent_rewards.training.checkpoint import MANIFEST, commit_directory, verify_directory

ADAPTER_KIND = "few_step_adapter"
WEIGHTS = "pytorch_lora_weights.safetensors"
"""What diffusers calls a file of LoRA weights."""

_CARD = """---
library_name: diffusers
pipeline_tag: {task}
---
A few-step student as an adapter (LoRA) on a `{pipeline}`. Step counts: {counts}; each has its own scheduler folder.

```python
from diffusers import {pipeline}, {scheduler}

pipe = {pipeline}.from_pretrained("<the teacher's pipeline>")
{loading}
pipe.scheduler = {scheduler}.from_pretrained("<this folder>", subfolder="{subfolder}")
```

Sample with `num_inference_steps={steps}` and `guidance_scale=1.0`. {seeding}
"""


def save_adapter(student: FewStepStudent, path: str | Path) -> None:
    """Write a student's adapter, schedulers and grids; whole or not at all.

    Args:
        student: from ``start_student`` with an ``adapter_rank``, built with ``exporter=teacher.exporter``.
        path: the folder; one written by this library is replaced.

    Raises:
        MissingPartError: the student is no adapter, or lacks the parts of the pipeline.
        TimestepsError: no stock scheduler reaches a grid.
        FolderInUseError: the folder exists and holds something else.
    """
    role, parts = student.denoiser, student.exporter
    if not isinstance(role, Role):
        raise MissingPartError(
            "the student owns all its weights, there is no adapter to keep; use save_pretrained(path)"
        )
    if not isinstance(parts, PipelineParts):
        raise MissingPartError(
            f"the student was built with exporter={parts!r}; build it with exporter=teacher.exporter"
        )
    base = role.roles.teacher
    configurations = parts.configurations(base, student.grids, student.eta)
    check_target(Path(path))
    layers = _by_transformer(role)
    pipeline_class = getattr(import_diffusers(), parts.pipeline_class)
    with commit_directory(path) as folder:
        for name, weights in layers.items():
            pipeline_class.save_lora_weights(folder / name, transformer_lora_layers=weights)
        write_schedulers(folder, configurations)
        content = {
            "kind": ADAPTER_KIND,
            "family": parts.family,
            "timesteps": {str(count): list(grid) for count, grid in student.grids.items()},
            "eta": student.eta,
            "rank": role.roles.rank,
            "base": base_fingerprint(base),
            "latent_shape": list(student.latent_shape()),
        }
        (folder / SIDECAR).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (folder / "README.md").write_text(_card(parts, configurations, list(layers)), encoding="utf-8")


def load_adapter(path: str | Path, teacher: Teacher) -> FewStepStudent:
    """Return the student that :func:`save_adapter` wrote, as an adapter on ``teacher``, which gets adapters thereby.

    Args:
        path: the folder.
        teacher: the pipeline it was distilled from.

    Raises:
        StudentError: the folder holds no adapter, or one of other weights than the teacher's.
        CheckpointError: a file is missing, truncated or altered.
        DistillationConfigError: the teacher has adapters already.
    """
    from safetensors.torch import load_file

    folder = Path(path)
    sidecar = read_sidecar(folder)
    if sidecar.get("kind") != ADAPTER_KIND:
        raise StudentError(f"{folder} holds no adapter (kind {sidecar.get('kind')!r}); expected {ADAPTER_KIND!r}")
    if (folder / MANIFEST).is_file():
        verify_directory(folder)
    if (found := base_fingerprint(teacher.denoiser)) != sidecar["base"]:
        raise StudentError(
            f"{folder} is an adapter on weights {sidecar['base']}, and the teacher of {teacher.pipeline_path} has "
            f"{found}: load the pipeline it was distilled from"
        )
    stored = {
        f"{name.parent.name}{key.removeprefix('transformer').removesuffix('.weight')}": value
        for name in sorted(folder.glob(f"*/{WEIGHTS}"))
        for key, value in load_file(name).items()
    }
    targets = sorted({key.removesuffix(".lora_A").removesuffix(".lora_B") for key in stored})
    roles = SharedBase(teacher.denoiser, sidecar["rank"], targets=targets)
    adapter = roles.adapter("student")
    with torch.no_grad():
        for key, parameter in adapter.items():
            parameter.copy_(stored[key])
    channels, frames, height, width = sidecar["latent_shape"]
    return FewStepStudent(
        roles.student,
        {int(count): grid for count, grid in sidecar["timesteps"].items()},
        sidecar["eta"],
        encode=teacher.encode,
        latent_shape=(channels, frames, height, width),
        exporter=teacher.exporter,
    )


def base_fingerprint(denoiser: nn.Module) -> str:
    """Return sha256 of a denoiser's own weights, adapters left out, rounded to bfloat16."""
    own = {name: value for name, value in denoiser.state_dict().items() if ".lora_" not in name}
    digest = hashlib.sha256()
    add_weights(digest, {name.replace(".base_layer.", "."): value for name, value in own.items()})
    return digest.hexdigest()[:32]


def _by_transformer(role: Role) -> dict[str, dict[str, Tensor]]:
    """Return the adapter's weights as diffusers names them, for each transformer of the denoiser."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in role.roles.adapter(role.name).items():
        transformer, _, inner = key.partition(".")
        layers.setdefault(transformer, {})[f"{inner}.weight"] = value.detach().cpu().contiguous()
    return layers


def _card(parts: PipelineParts, configurations: Any, transformers: list[str]) -> str:  # noqa: ANN401
    steps = max(configurations)
    second = {"transformer": "", "transformer_2": ", load_into_transformer_2=True"}
    lines = [f'pipe.load_lora_weights("<this folder>/{name}"{second[name]})' for name in transformers]
    return _CARD.format(
        task=parts.task,
        pipeline=parts.pipeline_class,
        counts=", ".join(map(str, configurations)),
        scheduler=configurations[steps]["_class_name"],
        loading="\n".join(lines),
        subfolder=scheduler_folder(steps),
        steps=steps,
        seeding=parts.seeding,
    )
