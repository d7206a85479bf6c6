"""One update of NVlabs/FastGen's DMD2 (arXiv 2405.14867) on a network of ours, as :mod:`benchmarks.roles` wants it.

FastGen is imported from a checkout that its user names; nothing of it is stored here. Its model builds student,
teacher, fake score and average, and its trainer takes the steps, with its own callbacks for clipping and the average.
The discriminator is off, since no data is used. Packages that it imports and this machine lacks are replaced, while it
is imported, by stand-ins that do nothing: none of them has a part in an update.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

OPTIONAL = frozenset(
    "attr attrs av boto3 botocore einops hydra imageio loguru omegaconf pynvml wandb webdataset".split()
)
"""Packages for logging, storage, data and configuration."""

LEARNING_RATE, EMA_DECAY = 1e-5, 0.99
TIMES = {"time_dist_type": "uniform", "min_t": 0.02, "max_t": 0.98, "t_list": None}
"""Ours: :func:`distillation.vsd.sample_times`."""


class PeerError(RuntimeError):
    """FastGen is not where it was said to be, or cannot be imported."""


class DMD2:
    """FastGen's student, teacher, fake score and average of one network, and its updates.

    Args:
        folder: a checkout of FastGen.
        build: makes a ``WanTransformer3DModel`` with the same weights every time.
        latent_shape: (C, F, H, W).
        condition: text embeddings [B, L, D] of what is asked for.
        negative: likewise, of what the teacher is guided away from.
        guidance_scale: of the teacher, in FastGen's convention and ours: ``u + w (c - u)``.
        fake_updates: fake score updates per student update.
        checkpointed: keep the inputs of blocks only.
        device: torch device.
        mixed_precision: "no" or "bf16".

    Raises:
        PeerError: see :func:`import_fastgen`.
    """

    def __init__(
        self,
        folder: Path,
        build: Callable[[], nn.Module],
        *,
        latent_shape: tuple[int, ...],
        condition: Tensor,
        negative: Tensor,
        guidance_scale: float,
        fake_updates: int,
        checkpointed: bool,
        device: str,
        mixed_precision: str,
    ) -> None:
        self.fastgen, self.fake_updates = import_fastgen(folder), fake_updates
        network = wan_network(self.fastgen, build, checkpointed)
        options = {"input_shape": list(latent_shape), "guidance_scale": guidance_scale, "device": device}
        options["precision_amp"] = "bfloat16" if mixed_precision == "bf16" else None
        config = model_config(self.fastgen, network, fake_updates, options)
        self.model = self.fastgen.DMD2Model(config)
        self.model.on_train_begin()
        self.model.init_optimizers()
        self.average = self.fastgen.EMACallback(beta=EMA_DECAY, start_iter=-1)
        self.average.on_model_init_end(self.model)
        trainer = SimpleNamespace(grad_accum_rounds=1, fsdp=False, ddp=False)
        self.trainer = SimpleNamespace(
            config=SimpleNamespace(trainer=trainer), callbacks=Callbacks(self.fastgen.GradClipCallback())
        )
        real = torch.zeros(len(condition), *latent_shape, device=device)  # read for its shape, dtype and device
        self.data = {"real": real, "condition": condition.to(device), "neg_condition": negative.to(device)}

    def update(self, step: int) -> dict[str, float]:
        """Update the student once, its average once, and then the fake score; return the losses."""
        losses: dict[str, float] = {}
        first = step * (self.fake_updates + 1)
        for iteration in range(first, first + self.fake_updates + 1):
            told, _ = self.fastgen.Trainer.train_step(self.trainer, self.model, self.model, self.data, iteration, 0)
            losses |= {name: float(value) for name, value in told.items()}
            if iteration == first:
                # FastGen moves the average after every iteration; once is enough, and is what ours does.
                self.average.on_training_step_end(self.model, {}, {}, {}, iteration)
        return losses


class Callbacks:
    """What FastGen's trainer calls: the clipping of gradients, and nothing else."""

    def __init__(self, clipping: Any) -> None:  # noqa: ANN401 - FastGen's
        self._clipping = clipping

    def on_optimizer_step_begin(self, **where: Any) -> None:  # noqa: ANN401 - FastGen's
        """Clip."""
        self._clipping.on_optimizer_step_begin(**where)

    def on_backward_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - FastGen's
        """Nothing happens there."""


def wan_network(fastgen: SimpleNamespace, build: Callable[[], nn.Module], checkpointed: bool) -> type[nn.Module]:
    """Return a class of networks for FastGen around the transformers of ``build``, on FastGen's noise schedule."""
    base: Any = fastgen.FastGenNetwork

    class WanForFastGen(base):  # type: ignore[misc] # known at run time only
        def __init__(self) -> None:
            super().__init__(net_pred_type="flow", schedule_type="rf")
            self.transformer = build()
            if checkpointed:
                self.transformer.enable_gradient_checkpointing()

        def forward(
            self,
            x_t: Tensor,
            t: Tensor,
            condition: Any = None,  # noqa: ANN401 - embeddings
            fwd_pred_type: str | None = None,
            **_: Any,  # noqa: ANN401 - FastGen's other options
        ) -> Tensor:
            timestep = self.noise_scheduler.rescale_t(t).to(torch.float32)
            (flow,) = self.transformer(
                hidden_states=x_t, timestep=timestep, encoder_hidden_states=condition, return_dict=False
            )
            told: Tensor = self.noise_scheduler.convert_model_output(
                x_t, flow.to(x_t.dtype), t, src_pred_type="flow", target_pred_type=fwd_pred_type or "flow"
            )
            return told

    return WanForFastGen


def model_config(
    fastgen: SimpleNamespace, network: type[nn.Module], fake_updates: int, options: dict[str, Any]
) -> SimpleNamespace:
    """Return the settings of FastGen's model: its optimisers' own, one-step students, no discriminator, one average."""
    optimizer = {**copy.deepcopy(fastgen.opt.BaseOptimizerConfig), "lr": LEARNING_RATE}
    scheduler = {**copy.deepcopy(fastgen.opt.BaseSchedulerConfig), "warm_up_steps": [0]}
    absent = "teacher skip_layers fake_score_pred_type precision_amp_infer precision_amp_enc precision_fsdp"
    off = "grad_scaler_enabled enable_preprocessors fsdp_meta_init"
    return SimpleNamespace(
        **dict.fromkeys(absent.split()),
        **dict.fromkeys(off.split(), False),
        net={"_target_": network},
        net_optimizer=optimizer,
        net_scheduler=scheduler,
        fake_score_optimizer=optimizer,
        fake_score_scheduler=scheduler,
        sample_t_cfg=fastgen.DictConfig(TIMES),
        student_update_freq=fake_updates + 1,
        student_sample_steps=1,
        student_sample_type="sde",
        gan_loss_weight_gen=0.0,
        gan_r1_reg_weight=0.0,
        use_ema=True,
        precision="float32",
        grad_scaler_init_scale=1.0,
        grad_scaler_growth_interval=1,
        load_student_weights=True,
        pretrained_model_path="",
        pretrained_student_net_path="",
        add_teacher_to_fsdp_dict=True,
        **options,
    )


def check_folder(folder: Path) -> None:
    """Check that FastGen is in the folder.

    Raises:
        PeerError: it is not.
    """
    if not (folder / "fastgen" / "methods").is_dir():
        raise PeerError(f"{folder} is no checkout of FastGen (no fastgen/methods); clone NVlabs/FastGen and name it")


def import_fastgen(folder: Path) -> SimpleNamespace:
    """Return the classes and modules of FastGen that an update needs.

    Raises:
        PeerError: there is no FastGen in the folder, or it needs a package that is neither there nor optional.
    """
    check_folder(folder)
    with stand_ins():
        sys.path.insert(0, str(folder))
        try:
            parts = {
                name: getattr(importlib.import_module(f"fastgen.{module}"), name)
                for module, name in (
                    ("methods", "DMD2Model"),
                    ("networks.network", "FastGenNetwork"),
                    ("callbacks.ema", "EMACallback"),
                    ("callbacks.grad_clip", "GradClipCallback"),
                    ("trainer", "Trainer"),
                    ("configs.opt", "DictConfig"),
                )
            }
            return SimpleNamespace(**parts, opt=importlib.import_module("fastgen.configs.opt"))
        except ImportError as error:
            raise PeerError(f"FastGen in {folder} cannot be imported: {error}; install what it needs") from error
        finally:
            sys.path.remove(str(folder))


class Nothing:
    """Whatever is asked of it, it answers with nothing, and it is false.

    Whatever it is made of does not matter either: a class that is derived from one is another.
    """

    def __init__(self, *_: Any) -> None:  # noqa: ANN401 - anything
        """Forget it."""

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()

    def __call__(self, *_: Any, **__: Any) -> Nothing:  # noqa: ANN401 - anything
        """Do nothing."""
        return Nothing()

    def __bool__(self) -> bool:
        """Return False."""
        return False


class StandIn(ModuleType):
    """An absent package, or a module of one."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class _Finder:
    """Finds the modules of absent packages."""

    def __init__(self, absent: frozenset[str]) -> None:
        self.absent = absent

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:  # noqa: ANN401 - the protocol of imports
        """Return how to make a stand-in, for the modules of absent packages."""
        if name.partition(".")[0] not in self.absent:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> ModuleType:  # noqa: ANN401 - the protocol of imports
        """Return the stand-in."""
        return _omegaconf() if spec.name == "omegaconf" else StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A stand-in is complete when it is made."""


def _omegaconf() -> ModuleType:
    """Return configurations that are the built-in containers, which is all that FastGen's optimisers need of them."""

    class DictConfig(dict[str, Any]):
        def __init__(self, content: Any = (), flags: Any = None) -> None:  # noqa: ANN401 - OmegaConf's
            super().__init__(content)

    module = StandIn("omegaconf")
    converter = SimpleNamespace(to_container=lambda config, **_: dict(config))
    vars(module).update(DictConfig=DictConfig, ListConfig=type("ListConfig", (list,), {}), OmegaConf=converter)
    return module


@contextmanager
def stand_ins() -> Iterator[None]:
    """Inside the block the packages that are absent can be imported; after it nobody sees that they could."""
    absent = frozenset(name for name in OPTIONAL if importlib.util.find_spec(name) is None)
    finder: Any = _Finder(absent)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in absent]:
            del sys.modules[name]
