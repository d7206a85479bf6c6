"""Settings of a distillation, and the check that a resumed stage still has those it was started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from distillation.errors import DistillationConfigError
from latent_rewards.training.settings import check_types

FREE_SETTINGS = frozenset(
    "output_dir log_with log_every checkpoint_every progress device gradient_checkpointing".split()
)
"""Settings that change no weights."""

_OUTSIDE = FREE_SETTINGS | {"schedule", "cd_steps"}  # the latter say only how far a stage goes
_CD_ONLY = frozenset(
    "num_timesteps curriculum solver_steps huber_c cd_weight cd_guidance_scale cd_learning_rate cd_ema_decay".split()
    + ["cd_max_time", "cd_on_samples", "cd_keep_weight"]
)
_VSD_ONLY = frozenset(
    "fake_learning_rate fake_updates time_shift adversarial_weight discriminator_weight adversarial_block".split()
    + ["r1_weight", "r1_sigma"]
)
_FREE = {
    "vsd": _OUTSIDE | _CD_ONLY | {"vsd_steps"},
    "cd": _OUTSIDE | {"cd_weight"},
    "joint": _OUTSIDE | {"vsd_steps", "cd_learning_rate", "cd_ema_decay", "cd_keep_weight"},
    "image_cd": _OUTSIDE | _VSD_ONLY | {"vsd_steps", "cd_weight", "image_steps"},
    "clip_cd": _OUTSIDE | _VSD_ONLY | {"vsd_steps", "cd_weight"},
}
_LENGTHS = {"cd": "cd_steps", "clip_cd": "cd_steps", "image_cd": "image_steps"}


@dataclass
class DistillationConfig:
    """Settings of :class:`~distillation.trainer.DistillationTrainer`.

    Attributes:
        schedule: "sequential" (VSD, then CD) or "joint" (one stage of ``vsd_steps`` updates; ``cd_steps`` is not read).
        vsd_steps: student updates by VSD; 0 leaves the stage out.
        cd_steps: student updates by CD; 0 leaves the stage out.
        batch_size: samples per update, shared by the ranks: a multiple of their number.
        step_counts: step counts the student is trained for; VSD draws one of their calls per update, all alike.
        guidance_scale: of the teacher, w in ``u + w (c - u)``; 1 is none.
        refine_guidance_scale: in place of ``guidance_scale`` where VSD trains a call that refines, which is every call
            of a chain but its first; None takes ``guidance_scale``. Content is decided at pure noise and wants a
            strong guidance, a single step most of all; where it is refined, a strong one shows as flicker.
        cd_guidance_scale: in place of both in CD, whose aim is the teacher's whole path and so what the teacher's
            samples at that guidance are worth; None takes ``refine_guidance_scale``.
        guidance_start: noise time t in [0, 1] below which the teacher is not guided; 0 guides it everywhere.
        learning_rate: of the student (AdamW; beta1 = 0 with VSD, 0.9 for CD alone).
        learning_rate_floor: share of its learning rate the student has left at the end of each stage, reached along
            half a cosine; 1 keeps it constant. The fake score's stays constant: it has to keep up.
        fake_learning_rate: of the fake score (AdamW, beta1 = 0).
        fake_updates: fake score updates per student update.
        num_timesteps: intervals of the CD grid.
        curriculum: in place of neighbours on the grid, pairs of CD whose gap shrinks as the stage goes on
            (:func:`~distillation.consistency.curriculum_pairs`).
        solver_steps: teacher steps in one interval of it, so that a coarse grid keeps an accurate path.
        ema_decay: weight of the past in the student's average, which is also the CD target; in [0, 1). At 0 the target
            is the student itself, without gradient.
        temporal_weight: weight of the frame-difference terms; 0 is none.
        feature_weight: weight of the terms that match how alike a teacher block's features of two frames are.
        feature_block: index of that block.
        correspondence_weight: weight of the terms that match the soft flow between frames, in latent pixels.
        adversarial_weight: weight of the student's loss against DMD2's discriminator, a head on VSD's fake score, so
            in stages with VSD; it needs data. 0 is none.
        discriminator_weight: weight of the discriminator's loss beside the fake score's.
        adversarial_block: index of the block whose features the head reads.
        r1_weight: weight, within the discriminator's loss, of the approximate R1 penalty on noised data
            (:func:`~distillation.adversarial.approximate_r1`), for one more call of the fake score; 0 is none. Lin et
            al. 2025 (arXiv 2501.08316) have 0.01 in this unit.
        r1_sigma: standard deviation of the perturbation it compares with, in units of the noised latents. In bf16,
            which rounds numbers near 1 to steps of 0.008, 0.01 is lost: take 0.1.
        cd_weight: weight of CD in the joint schedule.
        cd_learning_rate: of the student in the CD stage; None takes ``learning_rate``. After VSD a tenth of it is
            better: CD averages over what the student does not yet agree on, and so blurs what VSD made sharp.
        cd_ema_decay: in place of ``ema_decay`` in the CD stage; None takes ``ema_decay``.
        cd_max_time: noise time in (0, 1] above which CD asks nothing. Its target is an average wherever noise leaves
            more than one answer; on moving digits it helped after VSD only where there is one. One interval below it
            (``num_timesteps`` its inverse) is taught by the teacher alone; of several, each learns from the next.
        cd_on_samples: CD noises the student's own samples even where there are data, and so learns on what a chain
            gives its calls.
        cd_keep_weight: weight, in the CD stage, of staying at the calls above ``cd_max_time`` what the student was when
            the stage began; 0 is none. What they compute shares its weights with what CD changes.
        huber_c: width of the quadratic part of the CD loss, in latent units.
        time_shift: shift of the VSD times towards noise, on top of the schedule's own.
        adapter_rank: student, fake score and target are adapters of this rank on the frozen teacher; None gives each a
            network of its own. Adapters take larger learning rates. See :func:`~distillation.trainer.start_student`.
        gradient_checkpointing: keep the inputs of the networks' blocks only, and compute the rest again in the backward
            pass: slower, and much smaller.
        causal_first_frame: the VAE is causal, so temporal terms skip the first difference.
        max_grad_norm: gradient norm above which gradients are scaled down; 0 does not clip.
        seed: root of all randomness.
        output_dir: folder of the stages' checkpoints and histories; None keeps nothing and cannot resume.
        log_with: an accelerate tracker name, or None.
        log_every: updates between entries sent to the tracker.
        checkpoint_every: updates between checkpoints.
        progress: draw progress bars.
        mixed_precision: "no" or "bf16".
        device: "cpu", "cuda", or one of several such as "cuda:1"; None takes an accelerator if there is one.

    Raises:
        DistillationConfigError: a value is out of range.
    """

    schedule: Literal["sequential", "joint"] = "sequential"
    vsd_steps: int = 1000
    cd_steps: int = 1000
    batch_size: int = 8
    step_counts: list[int] = field(default_factory=lambda: [1, 2, 4])
    guidance_scale: float = 5.0
    refine_guidance_scale: float | None = None
    cd_guidance_scale: float | None = None
    guidance_start: float = 0.0
    learning_rate: float = 1e-5
    learning_rate_floor: float = 1.0
    fake_learning_rate: float = 1e-5
    fake_updates: int = 5
    num_timesteps: int = 50
    curriculum: bool = False
    solver_steps: int = 1
    ema_decay: float = 0.99
    temporal_weight: float = 0.0
    feature_weight: float = 0.0
    feature_block: int = 1
    correspondence_weight: float = 0.0
    adversarial_weight: float = 0.0
    discriminator_weight: float = 0.01
    adversarial_block: int = -1
    r1_weight: float = 0.0
    r1_sigma: float = 0.01
    cd_weight: float = 1.0
    cd_learning_rate: float | None = None
    cd_ema_decay: float | None = None
    cd_max_time: float = 1.0
    cd_on_samples: bool = False
    cd_keep_weight: float = 0.0
    huber_c: float = 1e-3
    time_shift: float = 1.0
    adapter_rank: int | None = None
    gradient_checkpointing: bool = False
    causal_first_frame: bool = False
    max_grad_norm: float = 1.0
    seed: int = 0
    output_dir: str | None = None
    log_with: str | None = None
    log_every: int = 10
    checkpoint_every: int = 100
    progress: bool = True
    mixed_precision: Literal["no", "bf16"] = "no"
    device: str | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self, DistillationConfigError)
        self.step_counts = list(self.step_counts)
        if self.schedule not in ("sequential", "joint"):
            raise DistillationConfigError(f"schedule must be 'sequential' or 'joint'; got {self.schedule!r}")
        if self.mixed_precision not in ("no", "bf16"):
            raise DistillationConfigError(f"mixed_precision must be no or bf16; got {self.mixed_precision!r}")
        lowest = dict.fromkeys(
            ("batch_size", "fake_updates", "num_timesteps", "solver_steps", "checkpoint_every", "log_every"), 1
        )
        if self.adapter_rank is not None:
            lowest["adapter_rank"] = 1
        weights = "temporal feature correspondence adversarial discriminator r1 cd cd_keep".split()
        lowest |= dict.fromkeys([f"{name}_weight" for name in weights], 0)
        lowest |= dict.fromkeys(("vsd_steps", "cd_steps", "max_grad_norm"), 0)
        for name, least in lowest.items():
            if not getattr(self, name) >= least:
                raise DistillationConfigError(f"{name} must be at least {least}; got {getattr(self, name)}")
        positive = ("learning_rate", "fake_learning_rate", "cd_learning_rate", "huber_c", "time_shift", "r1_sigma")
        for name in (*positive, "guidance_scale", "refine_guidance_scale", "cd_guidance_scale"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise DistillationConfigError(f"{name} must be positive; got {getattr(self, name)}")
        for name in ("learning_rate_floor", "guidance_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise DistillationConfigError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")
        for name in ("ema_decay", "cd_ema_decay"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise DistillationConfigError(f"{name} must lie in [0, 1); got {getattr(self, name)}")
        if not (0 < self.cd_max_time <= 1 and (self.curriculum or self.num_cd_intervals)):
            raise DistillationConfigError(
                f"cd_max_time must lie in (0, 1] and leave at least one of the {self.num_timesteps} intervals of "
                f"num_timesteps; got {self.cd_max_time}"
            )
        if not self.step_counts:
            raise DistillationConfigError("step_counts is empty; give at least one of the student's step counts")
        if not self.stages:
            raise DistillationConfigError(
                f"nothing to train: schedule = {self.schedule!r}, vsd_steps = {self.vsd_steps}, "
                f"cd_steps = {self.cd_steps}; joint reads vsd_steps only"
            )
        self._refuse_without_effect()

    def _refuse_without_effect(self) -> None:
        if self.adversarial_weight and not {"vsd", "joint"} & set(self.stages):
            raise DistillationConfigError(
                f"adversarial_weight = {self.adversarial_weight} has no effect: its discriminator reads VSD's fake "
                f"score, and the stages are {', '.join(self.stages)}; set it to 0, or train with VSD"
            )
        if self.cd_keep_weight and self.schedule == "joint":
            raise DistillationConfigError(
                f"cd_keep_weight = {self.cd_keep_weight} has no effect in the joint schedule, which has no student to "
                "stay at; take schedule 'sequential', or leave it 0"
            )
        if self.cd_keep_weight and self.cd_max_time == 1:
            raise DistillationConfigError(
                f"cd_keep_weight = {self.cd_keep_weight} has no effect where CD trains all times; lower cd_max_time, "
                "or leave it 0"
            )
        if self.r1_weight and not self.adversarial_weight:
            raise DistillationConfigError(
                f"r1_weight = {self.r1_weight} has no effect without a discriminator; set adversarial_weight, or leave "
                "it 0"
            )

    @property
    def num_cd_intervals(self) -> int:
        """How many of the grid's intervals CD trains, those of the least noise."""
        return int(self.cd_max_time * self.num_timesteps + 1e-9)  # 0.29 * 100 is a little less than 29

    def optimisation(self, stage: str) -> tuple[float, float]:
        """Return the student's learning rate and EMA decay in a stage."""
        rate = self.cd_learning_rate if stage == "cd" else None
        decay = self.cd_ema_decay if stage == "cd" else None
        return self.learning_rate if rate is None else rate, self.ema_decay if decay is None else decay

    def guidance(self, exit_step: int) -> float:
        """Return the teacher's guidance where VSD trains the call ``exit_step`` of a chain."""
        refined = self.refine_guidance_scale if exit_step else None
        return self.guidance_scale if refined is None else refined

    @property
    def cd_guidance(self) -> float:
        """The teacher's guidance in CD."""
        return self.guidance(exit_step=1) if self.cd_guidance_scale is None else self.cd_guidance_scale

    @property
    def guides(self) -> bool:
        """Whether the teacher is guided anywhere, so that a negative condition is needed."""
        return any(scale != 1 for scale in (self.guidance(0), self.guidance(1), self.cd_guidance))

    @property
    def stages(self) -> dict[str, int]:
        """The stages in their order, and the student updates of each."""
        if self.schedule == "joint":
            return {"joint": self.vsd_steps} if self.vsd_steps else {}
        return {name: steps for name, steps in (("vsd", self.vsd_steps), ("cd", self.cd_steps)) if steps}


class SettingsGuard:
    """A part of a stage's checkpoint that refuses to continue under settings that would have given other weights.

    Args:
        config: the settings of this run.
        stage: its name; the settings that "vsd", "cd", "joint" and the stages of decoupled CD do not depend on are left
            out (CD starts where VSD ended, so it depends on those of VSD too, if there was VSD), for others only those
            that change no weights.
        facts: what else decides the weights, by name: numbers, texts and containers of these.
    """

    def __init__(self, config: DistillationConfig, stage: str, facts: Mapping[str, Any] | None = None) -> None:
        # Where the learning rate or the gap of CD falls, the length of the stage decides how fast.
        paced = config.learning_rate_floor < 1 or (config.curriculum and stage != "vsd")
        free = _FREE.get(stage, _OUTSIDE) - ({_LENGTHS.get(stage, "vsd_steps")} if paced else set())
        if stage == "cd" and not config.vsd_steps:
            free |= _VSD_ONLY
        self.settings = {name: value for name, value in asdict(config).items() if name not in free}
        self.settings |= facts or {}
        self._defaults = {**self.settings, **asdict(type(config)())}

    def state_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return self.settings

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the stored settings; one that the checkpoint does not know yet had its default's effect.

        Facts that it does not know are not compared.

        Raises:
            DistillationConfigError: one differs; the message names it and both values.
        """
        for name, value in self.settings.items():
            was = state.get(name, self._defaults[name])
            if was != value:
                raise DistillationConfigError(
                    f"the checkpoint was trained with {name} = {was}, this run has {value}; "
                    "restore the setting or use another output_dir"
                )
