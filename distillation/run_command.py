r"""``latent-distill run``: a many-step teacher becomes a few-step student, a stock diffusers pipeline.

    latent-distill run --config recipes/configs/distill_wan2.1_1.3b.yaml
    accelerate launch -m distillation.cli run --config recipes/configs/distill_wan2.1_1.3b.yaml
    latent-distill run --config distill.yaml --vsd-steps 100 --output-dir runs/short

The file has the sections `teacher` (path or hub id, and the size of a video), `data` (a file of prompts, or a cache
that `latent-distill encode` made), `student` (its grids; may be left out) and `distillation`. Every setting of the last
is also a flag, which wins. The output folder gets the stages' checkpoints, `student` and `summary.json`; the same
command continues a run that was killed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distillation.errors import DistillationConfigError, StepCountError
from latent_rewards.training.flags import SettingsParser, chosen_settings
from latent_rewards.training.settings import SettingsError, check_types, read_settings

if TYPE_CHECKING:
    import torch

    from distillation.config import DistillationConfig
    from distillation.families import Teacher
    from distillation.trimmed import TrimmedText
    from latent_rewards.training.ranks import Ranks
    from latent_rewards.training.run_folder import RunFolder

_TEXT_BATCH = 64


@dataclass
class TeacherSection:
    """Which pipeline is distilled, at which size.

    Attributes:
        path: folder or hub id of a diffusers video pipeline.
        num_frames: frames of a video; the three sizes are needed unless the pipeline's folder, or the cache, says.
        height: pixels.
        width: pixels.
        dtype: of the text encoder and, with ``adapter_rank``, of the frozen network under the adapters: "float32" or
            "bfloat16", which halves it. What is trained is held in float32: steps of a few millionths vanish in
            bfloat16. `mixed_precision: bf16` lets it compute in bfloat16.
        device: of everything: "cpu", "cuda", or one of several such as "cuda:1";
            None takes an accelerator if there is one.
    """

    path: str = ""
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before any work."""
        if not self.path:
            raise SettingsError("path is missing; give the folder or hub id of a diffusers video pipeline")
        if self.dtype not in ("float32", "bfloat16"):
            raise SettingsError(f"dtype must be float32 or bfloat16; got {self.dtype!r}")


@dataclass
class DataSection:
    """What is distilled on; exactly one of the two.

    Attributes:
        prompts_file: one prompt a line; they are encoded when the run begins, and CD learns on the student's samples.
        cache: a folder made by `latent-distill encode`; CD learns on its latents, if it was made of videos.
    """

    prompts_file: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        """Check that there is one source."""
        if (self.prompts_file is None) == (self.cache is None):
            raise SettingsError(
                f"give exactly one of prompts_file and cache; got prompts_file = {self.prompts_file!r}, cache = "
                f"{self.cache!r}"
            )


@dataclass
class StudentSection:
    """How the student is sampled.

    Attributes:
        timesteps: ``{step count: times in (0, 1], noise first}``; None: 1, 2 and 4 steps, uniform.
        eta: 1 re-noises with fresh noise at each step, 0 is deterministic.
        merge_adapters: with ``adapter_rank``, False exports the adapter alone.
    """

    timesteps: dict[int, list[float]] | None = None
    eta: float = 1.0
    merge_adapters: bool = True

    def __post_init__(self) -> None:
        """Check what can be checked before any work."""
        check_types(self, SettingsError)
        if self.timesteps is not None and not isinstance(self.timesteps, dict):
            raise SettingsError(f"timesteps must map step counts to times, {{2: [1.0, 0.5]}}; got {self.timesteps!r}")


@dataclass
class SourceFacts:
    """What the run's data were when it began.

    Attributes:
        data: sha256 of the prompts file, or of the cache's settings.
        cache: fingerprint of the cache's texts and videos; None without one.
    """

    data: str
    cache: str | None = None


def sections() -> dict[str, type]:
    """Return the sections of a settings file."""
    from distillation.config import DistillationConfig

    return {
        "teacher": TeacherSection,
        "data": DataSection,
        "student": StudentSection,
        "distillation": DistillationConfig,
    }


def add_parser(rooms: Any) -> None:  # noqa: ANN401 - argparse's sub-parsers have no public type
    """Add the command to those of ``latent-distill``."""
    command = SettingsParser(
        prog="latent-distill run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.settings = lambda: sections()["distillation"]
    command.add_argument(
        "--config", required=True, metavar="FILE", help="YAML with the sections teacher, data, student, distillation"
    )
    command.set_defaults(run=run_command)
    rooms.add_parser("run", help="distil a teacher into a few-step student")
    rooms.choices["run"] = command


def run_command(options: argparse.Namespace) -> int:
    """Train through the stages, export the student, write the summary."""
    from distillation.places import begin_folder, launched
    from latent_rewards.training.loop import NonFiniteError
    from latent_rewards.training.run_folder import RunFolder

    settings = settings_of(options)
    config: DistillationConfig = settings["distillation"]
    ranks, device = launched(device_of(settings))
    facts = check(settings)
    folder = RunFolder(begin_folder(str(config.output_dir)))
    folder.remember({**as_remembered(settings), "sources": as_begun(folder, facts)})
    begun = time.perf_counter()
    try:
        path = folder.cached(
            "student",
            lambda: train(settings, device, ranks),
            lambda student, path: student.save_pretrained(path, merge_adapters=settings["student"].merge_adapters),
            lambda path: path,
        )
    except NonFiniteError as error:
        print(f"latent-distill: {error}; the last checkpoint in {folder.path} is whole", file=sys.stderr)
        return 1
    if not (folder.path / "summary.json").is_file():
        folder.write("summary.json", summary(folder, settings, time.perf_counter() - begun))
    if ranks.index == 0:
        print(f"student in {path}")
    ranks.leave()
    return 0


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sections of the file with the flags in place.

    Raises:
        SettingsError: the file cannot be used.
        DistillationConfigError: a flag's value is out of range, or no output folder is named.
    """
    known = sections()
    settings = read_settings(options.config, known)
    chosen = chosen_settings(options, known["distillation"])
    settings["distillation"] = dataclasses.replace(settings["distillation"], **chosen)
    if "device" in chosen:
        settings["teacher"] = dataclasses.replace(settings["teacher"], device=chosen["device"])
    if settings["distillation"].output_dir is None:
        raise DistillationConfigError("no output folder; set output_dir in the section distillation, or --output-dir")
    return settings


def as_remembered(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the sections with what may change between two starts of a run at its default."""
    from distillation.config import FREE_SETTINGS

    default = sections()["distillation"]()
    free = {name: getattr(default, name) for name in FREE_SETTINGS}
    return {
        **settings,
        "teacher": dataclasses.replace(settings["teacher"], device=None),
        "student": StudentSection(
            {str(count): grid for count, grid in (settings["student"].timesteps or {}).items()} or None,  # type: ignore[misc]
            settings["student"].eta,
            settings["student"].merge_adapters,
        ),
        "distillation": dataclasses.replace(settings["distillation"], **free),
    }


def as_begun(folder: RunFolder, facts: SourceFacts) -> SourceFacts:
    """Return what the data are, but of a cache no more than was remembered when the folder was begun."""
    stored = folder.path / "settings" / "settings.json"
    if facts.cache is None or not stored.is_file():
        return facts
    if "cache" in json.loads(stored.read_text(encoding="utf-8")).get("sources", {}):
        return facts
    if folder.ranks.index == 0:
        print(
            f"latent-distill: {folder.path} was begun by a version that did not remember what its cache held; it goes "
            "on, and whether the cache changed meanwhile is not checked",
            file=sys.stderr,
        )
    return dataclasses.replace(facts, cache=None)


def check(settings: dict[str, Any]) -> SourceFacts:
    """Check data, grids and step counts, and return what the data are; nothing large is read.

    Raises:
        PromptsError: the prompts file cannot be used.
        CacheError: the cache is none, or not finished.
        TimestepsError: a grid cannot be sampled.
        StepCountError: a step count has no grid.
        DistillationConfigError: the adapter shall be kept of a student that has none.
    """
    from distillation.cached import parts_fingerprint, read_cache_settings
    from distillation.prompts import read_prompts
    from distillation.schedule import check_timesteps
    from distillation.student import DEFAULT_TIMESTEPS

    grids = check_timesteps(settings["student"].timesteps or DEFAULT_TIMESTEPS)
    if settings["distillation"].adapter_rank is None and not settings["student"].merge_adapters:
        raise DistillationConfigError("merge_adapters is false but there are none; set adapter_rank, or leave it out")
    for count in settings["distillation"].step_counts:
        if count not in grids:
            raise StepCountError(
                f"step_counts holds {count}, and the student samples in {', '.join(map(str, grids))} steps; remove it, "
                "or add a grid to timesteps in the section student"
            )
    data: DataSection = settings["data"]
    if data.prompts_file is not None:
        content, cache = "\n".join(read_prompts(data.prompts_file)), None
    else:
        content, cache = str(read_cache_settings(str(data.cache))), parts_fingerprint(str(data.cache))
    return SourceFacts(hashlib.sha256(content.encode()).hexdigest(), cache)


def device_of(settings: dict[str, Any]) -> str | None:
    """Return the setting that says where the run computes: the teacher's, else the distillation's."""
    name: str | None = settings["teacher"].device or settings["distillation"].device
    return name


def train(settings: dict[str, Any], device: torch.device, ranks: Ranks) -> Any:  # noqa: ANN401 - a FewStepStudent
    """Load, check that the student can be exported, and train it; returns the student."""
    import torch

    import distillation as ds
    from distillation.cached import CachedData, load_cache, text_fingerprint
    from distillation.prompts import read_prompts

    data: DataSection = settings["data"]
    cached: CachedData | None = load_cache(data.cache) if data.cache is not None else None
    shared = settings["distillation"].adapter_rank is not None
    teacher = load_teacher(settings["teacher"], cached, settings["teacher"].dtype if shared else "float32")
    section = dataclasses.replace(settings["distillation"], device=device_of(settings))
    student = ds.start_student(teacher, section, settings["student"].timesteps, settings["student"].eta)
    # Refused now, and not after days of training.
    teacher.exporter.configurations(teacher.denoiser, student.grids, student.eta)
    if cached is not None:
        spoken = {"codec": teacher.codec.fingerprint, "text": text_fingerprint(teacher.encode)}
        cached.check(**spoken, latent_shape=teacher.latent_shape, folder=str(data.cache))
        source: Any = cached.source
        encode: Callable[[Sequence[Any]], Any] = cached.encode.trimmed
    else:
        encoder = getattr(teacher.encode, "text_encoder", None)
        if isinstance(encoder, torch.nn.Module):
            encoder.to(device, getattr(torch, settings["teacher"].dtype))
        source, encode = read_prompts(str(data.prompts_file)), InParts(teacher)
    trainer = ds.DistillationTrainer(dataclasses.replace(teacher, encode=encode), student, source, section)
    put_away(teacher, export=ranks.index == 0)
    trainer.train()
    return student


def put_away(teacher: Teacher, *, export: bool) -> None:
    """Take a text encoder, whose work is done, from the device; out of memory in a process that exports nothing.

    Args:
        teacher: its ``encode`` has a ``text_encoder``, or has none.
        export: this process is the one that writes the student, with all of its pipeline.
    """
    import torch

    encoder = getattr(teacher.encode, "text_encoder", None)
    if isinstance(encoder, torch.nn.Module):
        encoder.to("cpu" if export else "meta", torch.float32)


def load_teacher(section: TeacherSection, cached: Any, dtype: str) -> Teacher:  # noqa: ANN401 - CachedData or None
    """Return the teacher on the CPU, its network in ``dtype``, at the section's size or else at that of the cache."""
    import torch

    import distillation as ds

    size = {name: getattr(section, name) for name in ("num_frames", "height", "width")}
    if cached is not None and not any(size.values()):
        size = {name: getattr(cached.settings, name) for name in size}
    print(f"loading {section.path}", file=sys.stderr)
    return ds.load_teacher(section.path, dtype=getattr(torch, dtype), **size)


class InParts:
    """A teacher's text encoder, called on a few prompts at a time; what it returns is kept on the CPU, unpadded.

    Args:
        teacher: its ``encode`` is called.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.encode = teacher.encode

    def __call__(self, prompts: Sequence[Any]) -> TrimmedText:
        """Return the condition of the prompts on the CPU.

        Raises:
            ConditionError: there is no prompt, or the encoder gave conditions that do not fit each other.
        """
        import torch
        from tqdm import tqdm

        from distillation.condition import TextCondition
        from distillation.trimmed import TrimmedText, trimmed_rows

        starts = tqdm(
            range(0, len(prompts), _TEXT_BATCH),
            desc="prompts",
            dynamic_ncols=True,
            disable=len(prompts) <= _TEXT_BATCH or not sys.stderr.isatty(),
        )
        rows, firsts = [], []
        for start in starts:
            condition = self.encode(prompts[start : start + _TEXT_BATCH]).to("cpu")
            rows += trimmed_rows(condition)
            firsts.append(condition.index_select(torch.zeros(1, dtype=torch.long)))
        return TrimmedText(rows, TextCondition.concatenate(firsts).embeddings.shape[1])


def summary(folder: RunFolder, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return what a finished run was: its settings, versions, and of each stage the updates and last losses."""
    import importlib.metadata

    stages = {}
    for name in settings["distillation"].stages:
        history = folder.history(name)
        last = history[-max(1, len(history) // 10) :]
        losses = sorted({key for entry in last for key in entry if key.endswith("_loss") or key == "x_std"})
        means = {key: sum(values) / len(values) for key in losses if (values := [e[key] for e in last if key in e])}
        stages[name] = {"updates": len(history), "means_of_the_last_tenth": means}
    versions = {name: importlib.metadata.version(name) for name in ("latent-rewards", "torch", "diffusers")}
    sections = {name: dataclasses.asdict(section) for name, section in settings.items()}
    return {
        "student": str(Path(settings["distillation"].output_dir) / "student"),
        "stages": stages,
        "seconds_since_last_start": seconds,
        "processes": folder.ranks.count,
        "versions": versions,
        "settings": sections,
    }
