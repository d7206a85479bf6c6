r"""``latent-distill sample``: videos of a few-step student.

    latent-distill sample runs/distilled/student --prompt "a red digit moves left" --output out.mp4
    latent-distill sample runs/distilled/student --prompts prompts.txt --num-steps 2 --per-prompt 4 --output videos/
    latent-distill sample adapter --base Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat on a roof" --output cat.mp4

A video depends on the student, its prompt, the seed and its place in the list, and, up to the rounding of the device's
arithmetic, neither on the batch size nor on the number of processes. A folder gets `00000.mp4` and so on, each with its
prompt beside it as .txt, and the same command goes on where it was killed. Videos need PyAV
(`pip install 'latent-rewards[report]'`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillation.errors import DistillationConfigError, StepCountError
from distillation.prompts import PromptsError, read_prompts

if TYPE_CHECKING:
    import torch

    from distillation.student import FewStepStudent


@dataclass
class SampleSettings:
    """What the videos in a folder depend on: the student (its manifest's sha256), the prompts (theirs), and these."""

    student: str
    prompts: str
    num_steps: int
    seed: int
    per_prompt: int
    fps: float
    dtype: str


def add_parser(rooms: Any) -> None:  # noqa: ANN401 - argparse's sub-parsers have no public type
    """Add the command to those of ``latent-distill``."""
    command = rooms.add_parser(
        "sample",
        help="write a student's videos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("student", metavar="STUDENT", help="the folder of a stored student, or of an adapter")
    command.add_argument("--base", metavar="PIPELINE", help="of an adapter: the folder or hub id of its teacher")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt")
    source.add_argument("--prompts", metavar="FILE", help="one prompt a line")
    command.add_argument("--output", required=True, metavar="PATH", help="a file that ends in .mp4, or a folder")
    command.add_argument("--num-steps", type=int, default=4, help="sampling steps (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    command.add_argument("--per-prompt", type=int, default=1, help="videos of each prompt (default: %(default)s)")
    command.add_argument("--fps", type=float, default=16, help="frames per second (default: %(default)s)")
    command.add_argument("--batch-size", type=int, default=1, help="videos at once (default: %(default)s)")
    command.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: an accelerator if there is one)")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network (default: %(default)s)"
    )
    command.set_defaults(run=sample_command)


def sample_command(options: argparse.Namespace) -> int:
    """Sample, decode and write."""
    from distillation.places import launched
    from distillation.videos import SUFFIXES, require_av

    require_av()
    for name in ("per_prompt", "batch_size", "fps"):
        if not 0 < (value := getattr(options, name)) < math.inf:
            raise DistillationConfigError(f"--{name.replace('_', '-')} must be positive and finite; got {value}")
    prompts = [options.prompt] if options.prompts is None else read_prompts(options.prompts)
    if not all(prompt.strip() for prompt in prompts):
        raise PromptsError("the prompt is empty; write what the video should show")
    listed = [prompt for prompt in prompts for _ in range(options.per_prompt)]
    output = Path(options.output)
    if output.suffix.lower() in SUFFIXES and output.suffix.lower() != ".mp4" and not output.is_dir():
        raise DistillationConfigError(f"--output {output}: videos are written as .mp4; name such a file, or a folder")
    if single := output.suffix.lower() == ".mp4" and not output.is_dir():
        if len(listed) > 1:
            raise DistillationConfigError(f"{output} is one file, for {len(listed)} videos; give a folder as --output")
    check_student(Path(options.student), options.num_steps, options.base)
    ranks, device = launched(options.device)
    files = [output] if single else begun(output, listed, options)
    # A lone file is written anew, as a shell command does; in a folder what is there was made by the same command.
    todo = [index for index, file in enumerate(files) if single or not file.is_file()][ranks.index :: ranks.count]
    if todo:
        sample_all(listed, todo, files, options, device, with_prompts=not single)
    ranks.wait_for(lambda: all(file.is_file() for file in files))
    if ranks.index == 0:
        print(f"{len(files)} {'video' if single else 'videos'} in {output}")
    ranks.leave()
    return 0


def check_student(folder: Path, num_steps: int, base: str | None) -> None:
    """Check that a folder holds a student, or an adapter on ``base``, that claims a step count; no weights are read.

    Raises:
        StudentError: it holds none, or an adapter without ``base``, or a whole student with one.
        StepCountError: the student does not claim the count.
        TeacherError: ``base`` is no pipeline.
    """
    from distillation.families import SIDECAR, STUDENT_KIND, pipeline_folder, read_sidecar
    from distillation.families.adapters import ADAPTER_KIND
    from distillation.families.export import StudentError

    sidecar = read_sidecar(folder)
    kind = sidecar.get("kind")
    if kind not in (STUDENT_KIND, ADAPTER_KIND):
        raise StudentError(f"{folder} holds no student: it has no {SIDECAR} of the kind {STUDENT_KIND!r}")
    if kind == ADAPTER_KIND and base is None:
        raise StudentError(f"{folder} holds an adapter, which needs its teacher: name the teacher's pipeline as --base")
    if kind == STUDENT_KIND and base is not None:
        raise StudentError(f"{folder} holds a whole student, which needs no --base; leave it out")
    if base is not None:
        pipeline_folder(base)
    claimed = sorted(map(int, sidecar["timesteps"]))
    if num_steps not in claimed:
        raise StepCountError(
            f"the student in {folder} samples in {', '.join(map(str, claimed))} steps; got --num-steps {num_steps}"
        )


def begun(folder: Path, listed: Sequence[str], options: argparse.Namespace) -> list[Path]:
    """Return the files of the videos; the folder is new, or was begun by the same command.

    Raises:
        FolderInUseError: the folder holds something else.
        SettingsError: it was begun with another student, other prompts or other settings.
        StudentError: the student's folder has no manifest.
    """
    from distillation.families.export import StudentError
    from distillation.places import begin_folder
    from latent_rewards.training.checkpoint import MANIFEST, file_sha256
    from latent_rewards.training.run_folder import RunFolder

    manifest = Path(options.student) / MANIFEST
    if not manifest.is_file():
        raise StudentError(
            f"{options.student} has no {MANIFEST}, by which a folder of videos knows its student: write the student "
            "again, or give a file as --output"
        )
    settings = SampleSettings(
        student=file_sha256(manifest),
        prompts=hashlib.sha256(json.dumps(list(listed)).encode()).hexdigest(),
        num_steps=options.num_steps,
        seed=options.seed,
        per_prompt=options.per_prompt,
        fps=options.fps,
        dtype=options.dtype,
    )
    RunFolder(begin_folder(folder)).remember({"sample": settings})
    return [folder / f"{index:05d}.mp4" for index in range(len(listed))]


def load(options: argparse.Namespace, device: torch.device) -> FewStepStudent:
    """Return the student of the command line, or the adapter on its base."""
    import torch

    from distillation.families import load_teacher, pipeline_folder, read_sidecar
    from distillation.families.adapters import load_adapter
    from distillation.families.export import load_student
    from distillation.info_command import video_size

    dtype = getattr(torch, options.dtype)
    if options.base is None:
        return load_student(options.student, device=device, dtype=dtype)
    base = pipeline_folder(options.base)
    size: dict[str, Any] = video_size(base, read_sidecar(Path(options.student))["latent_shape"]) or {}
    return load_adapter(options.student, load_teacher(base, device=device, dtype=dtype, **size))


def sample_all(
    listed: Sequence[str],
    todo: Sequence[int],
    files: Sequence[Path],
    options: argparse.Namespace,
    device: torch.device,
    *,
    with_prompts: bool,
) -> None:
    """Sample, decode and write the videos ``todo``; those of one batch are in memory at once.

    ``with_prompts`` writes its prompt beside each.
    """
    import torch
    from tqdm import tqdm

    from distillation.videos import write_mp4
    from latent_rewards.training.randomness import sample_noise

    print(f"loading {options.student}", file=sys.stderr)
    student = load(options, device)
    shape, steps = student.latent_shape(), options.num_steps
    batches = [todo[start : start + options.batch_size] for start in range(0, len(todo), options.batch_size)]
    with tqdm(total=len(todo), desc="videos", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for batch in batches:
            noise = torch.stack([sample_noise(options.seed, f"sample/{k}", 0, batch, shape) for k in range(steps)])
            with torch.no_grad():
                latents = student.sample(student.encode([listed[row] for row in batch]), noise.to(device), steps)
                videos = student.exporter.codec.decode(latents)
            for row, video in zip(batch, videos, strict=True):
                if with_prompts:  # the video last: where it is, all is
                    files[row].with_suffix(".txt").write_text(listed[row] + "\n", encoding="utf-8")
                write_mp4(files[row], video, fps=options.fps)
            bar.update(len(batch))
