"""Who plays teacher, student, fake score and target: networks of their own, or adapters on one frozen base.

Four networks of a video model, two of them with gradients and optimiser states, seldom fit. :class:`SharedBase` holds
the weights once: the teacher is the base itself, every other role a low-rank adapter (LoRA, Hu et al. 2022, arXiv
2106.09685) that is active while that role is called and at no other time. Outside a call the base is the teacher.

Activation checkpointing repeats a forward pass during the backward pass, when another role may be the last one called;
:meth:`SharedBase.checkpoint` repeats it as the role that made it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distillation.denoiser import Denoiser, Prediction
from distillation.errors import DistillationConfigError
from distillation.schedule import Schedule
from latent_rewards.training.activations import checkpoint_activations
from latent_rewards.training.precision import widened

RoleName = Literal["student", "fake_score", "target"]
_ROLES: tuple[RoleName, ...] = ("student", "fake_score", "target")


class Roles(Protocol):
    """The networks of a training."""

    @property
    def teacher(self) -> nn.Module:
        """The denoiser of the data, frozen."""
        ...

    def fake_score(self) -> nn.Module:
        """Return a denoiser that starts as the teacher and is trained."""
        ...

    def target(self) -> nn.Module:
        """Return a frozen denoiser that starts as the student is."""
        ...

    def reference(self) -> nn.Module:
        """Return a frozen denoiser that stays what the student is now; there is no fake score beside it."""
        ...


class Separate:
    """Every role has a network of its own, and all its weights are trained (full fine-tuning).

    Args:
        teacher: the denoiser of the data.
        student: another denoiser on the same schedule; it shares no weights with the teacher.

    Raises:
        DistillationConfigError: they share weights.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        owned = {id(parameter) for parameter in teacher.parameters()}
        if any(id(parameter) in owned for parameter in student.parameters()):
            raise DistillationConfigError(
                "teacher and student share weights; start the student from copy.deepcopy(denoiser), or share one base "
                "with adapter_rank and start_student(teacher, config)"
            )
        self.teacher, self._student = teacher, student

    def fake_score(self) -> nn.Module:
        """Return a copy of the teacher."""
        return copy.deepcopy(self.teacher)

    def target(self) -> nn.Module:
        """Return a frozen copy of the student."""
        return copy.deepcopy(self._student).requires_grad_(False).eval()

    def reference(self) -> nn.Module:
        """Return a frozen copy of the student."""
        return self.target()


class SharedBase:
    """One frozen denoiser on which student, fake score and target are adapters; the teacher is the denoiser itself.

    Args:
        denoiser: the teacher. It is frozen, and its linear layers get adapters, which are off except inside the call
            of a role; so the object still is the teacher for whoever holds it. It may be held in bfloat16: adapters are
            in float32 all the same.
        rank: of the adapters, at least 1.
        targets: ends of the names of the linear layers that are adapted; None adapts all of them.
        seed: of the adapters' first weights; at first every role computes exactly what the teacher does.

    Attributes:
        teacher: the denoiser.
        student: its first adapter as a denoiser; what a :class:`~distillation.student.FewStepStudent` is built on.

    Raises:
        DistillationConfigError: the rank is less than 1, the denoiser has adapters already, or no layer to adapt; or
            this version of peft is not known.
    """

    def __init__(self, denoiser: nn.Module, rank: int, *, targets: Sequence[str] | None = None, seed: int = 0) -> None:
        if rank < 1:
            raise DistillationConfigError(f"adapter_rank must be at least 1, or None for full fine-tuning; got {rank}")
        if _adapter_layers(denoiser):
            raise DistillationConfigError("the denoiser has adapters already; merge them, or load the teacher again")
        self.teacher, self.rank, self.seed = denoiser.requires_grad_(False), rank, seed
        self._layers = _inject(denoiser, rank, targets)
        self._inside: dict[nn.Module, list[Any]] = {}
        self._active: RoleName | None = None
        self._adapters = {name: self._parameters(name) for name in _ROLES}
        for name, adapter in self._adapters.items():
            for parameter in adapter.values():
                parameter.requires_grad_(name != "target")
        _check_switch(self._layers)
        self.student = self._begin("student")

    def fake_score(self) -> Role:
        """Return the fake score, started anew."""
        return self._begin("fake_score")

    def target(self) -> Role:
        """Return the target, with the student's adapter.

        The average of low-rank factors is not the factor of the average; it tends to it as the student settles.
        """
        return self._like_student("target")

    def reference(self) -> Role:
        """Return a role that keeps the student's adapter of now, in the place of the fake score."""
        return self._like_student("fake_score").requires_grad_(False)

    @contextmanager
    def playing(self, name: RoleName | None, block: nn.Module | None = None) -> Iterator[None]:
        """Run what follows with the adapter of a role; None is the teacher. After it the role of before is back.

        Args:
            name: of the role.
            block: the part of the denoiser that will be called, where it is known; the rest is not switched then.
        """
        layers, before = self._layers if block is None else self._layers_in(block), self._active
        _switch(layers, name)
        self._active = name
        try:
            yield
        finally:
            _switch(layers, before)
            self._active = before

    def checkpoint(self, block: nn.Module, *args: Any) -> Any:  # noqa: ANN401 - a block's inputs
        """Call ``block(*args)``, keeping its inputs only; the backward pass repeats it as the role of now.

        The repetition is not compared with the call: that takes time, and all roles have the same shapes anyway.
        """
        role = self._active

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self.playing(role, block)

        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts, determinism_check="none")

    def merged(self, name: RoleName = "student") -> nn.Module:
        """Return a copy of the denoiser with the adapter of a role added to its weights, and no adapters.

        Its weights are in float32 if the denoiser's are in 16 bits, in which most of an adapter would be lost.
        """
        # The memo: blocks that checkpoint hold this object, all of whose adapters would be copied too.
        plain = widened(copy.deepcopy(self.teacher, {id(self): self}))
        for layer in _adapter_layers(plain):
            layer.merge(adapter_names=[name])
        _unwrap(plain)
        return plain.requires_grad_(True)

    def remove(self) -> None:
        """Take the adapters off the teacher, which can then be the base of others; the roles are of no use any more."""
        _unwrap(self.teacher)

    def adapter(self, name: RoleName) -> dict[str, nn.Parameter]:
        """Return the parameters of a role's adapter; roles have the same names."""
        return self._adapters[name]

    def _parameters(self, name: RoleName) -> dict[str, nn.Parameter]:
        end = f".{name}.weight"
        named = self.teacher.named_parameters()
        return {key.removesuffix(end): value for key, value in named if key.endswith(end)}

    def _like_student(self, name: RoleName) -> Role:
        role = Role(self, name)
        role.load_state_dict(self.student.state_dict())
        return role

    def _begin(self, name: RoleName) -> Role:
        """Give a role the first weights of an adapter: A random, B zero, so that A B = 0."""
        from latent_rewards.training.randomness import sample_noise

        for index, (key, parameter) in enumerate(self.adapter(name).items()):
            with torch.no_grad():
                if "lora_B" in key:
                    parameter.zero_()
                else:
                    noise = sample_noise(self.seed, f"adapter/{name}", index, [0], parameter.shape)
                    parameter.copy_(noise[0] / parameter.shape[1] ** 0.5)
        return Role(self, name)

    def _layers_in(self, block: nn.Module) -> list[Any]:
        if block not in self._inside:
            self._inside[block] = _adapter_layers(block)
        return self._inside[block]


class Role(Denoiser):
    """A denoiser that is a shared base with one adapter; its parameters and state are those of the adapter alone.

    Args:
        roles: the base.
        name: "student", "fake_score" or "target".
    """

    def __init__(self, roles: SharedBase, name: RoleName) -> None:
        super().__init__()
        self.name = name
        # In a dict, so that the base does not become part of this module's weights.
        self._held = {"roles": roles}
        self.adapter = nn.ParameterDict({key.replace(".", "/"): value for key, value in roles.adapter(name).items()})

    @property
    def roles(self) -> SharedBase:
        """The base and its other roles."""
        return self._held["roles"]

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """The base's schedule."""
        return cast(Schedule, self.roles.teacher.schedule)

    def forward(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Prediction:  # noqa: ANN401 - any Condition
        """Predict with the role's adapter; see :class:`~distillation.denoiser.Denoiser`."""
        with self.roles.playing(self.name):
            prediction: Prediction = self.roles.teacher(x_t, t, condition)
        return prediction

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Role:
        # Moving a role moves the base, whose modules hold the very same parameters.
        self.roles.teacher._apply(fn, recurse)
        return self


def roles_of(teacher: nn.Module, student: nn.Module, adapter_rank: int | None) -> Roles:
    """Return the networks of a training whose student is a role of a shared base, or owns its weights.

    Args:
        teacher: the denoiser of the data.
        student: the student's denoiser.
        adapter_rank: what the settings say; None is full fine-tuning.

    Raises:
        DistillationConfigError: student and settings disagree, or the student shares the weights of the teacher, or
            those of another network.
    """
    if not isinstance(student, Role):
        if adapter_rank is not None:
            raise DistillationConfigError(
                f"adapter_rank = {adapter_rank}, but the student owns all its weights; make it with "
                "start_student(teacher, config), or set adapter_rank to None"
            )
        return Separate(teacher, student)
    if adapter_rank != student.roles.rank:
        raise DistillationConfigError(
            f"the student is an adapter of rank {student.roles.rank}, adapter_rank is {adapter_rank}: make them equal"
        )
    if student.roles.teacher is not teacher:
        raise DistillationConfigError(
            "the student is an adapter on another network than the teacher; make it with start_student(teacher, config)"
        )
    return student.roles


def merged(denoiser: nn.Module) -> nn.Module:
    """Return a role as a denoiser of its own, its adapter added to a copy of the base's weights; others as they are."""
    return denoiser.roles.merged(denoiser.name) if isinstance(denoiser, Role) else denoiser


def trains_nothing(module: nn.Module) -> bool:
    """Return whether all that asks for gradients are adapters that are off, as in a copy of a shared base."""
    asking = {parameter for parameter in module.parameters() if parameter.requires_grad}
    for layer in _adapter_layers(module):
        if layer.disable_adapters:
            asking -= set(layer.parameters()) - set(layer.get_base_layer().parameters())
            if not asking:
                return True
    return False


def save_activations(roles: Roles, trained: Mapping[str, nn.Module]) -> None:
    """Switch activation checkpointing on in the networks that are trained.

    Args:
        roles: whose they are.
        trained: by name.

    Raises:
        DistillationConfigError: one has no part that can do it.
    """
    shared = roles if isinstance(roles, SharedBase) else None
    for name, network in trained.items():
        base = shared.teacher if shared else network
        if checkpoint_activations(base, *([shared.checkpoint] if shared else [])) is None:
            raise DistillationConfigError(
                f"gradient_checkpointing: the {name} has no diffusers network that supports it; set it to false"
            )


def _inject(denoiser: nn.Module, rank: int, targets: Sequence[str] | None) -> list[Any]:
    """Give the linear layers one adapter per role and return them."""
    from latent_rewards.training.torchvision_guard import mend_torchvision

    mend_torchvision()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    from distillation.role_linear import RoleLinear

    linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linear if targets is None or name.endswith(tuple(targets))]
    if not chosen:
        raise DistillationConfigError(
            f"no linear layer to adapt{'' if targets is None else f' whose name ends in one of {list(targets)}'}; the "
            f"denoiser has {', '.join(linear[:8]) or 'none'}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        for name in _ROLES:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen)
            config._register_custom_module({nn.Linear: RoleLinear})
            inject_adapter_in_model(config, denoiser, name)
            cast_adapter_dtype(denoiser, name)  # at first it is the base's
    return _adapter_layers(denoiser)


def _unwrap(denoiser: nn.Module) -> None:
    """Put the layers that were wrapped back in their places, and stop checkpointing as a role."""
    modules: list[Any] = [
        module for module in denoiser.modules() if getattr(module, "is_gradient_checkpointing", False)
    ]
    for module in modules:
        module.disable_gradient_checkpointing()
    for path, layer in [(path, module) for path, module in denoiser.named_modules() if _is_adapter_layer(module)]:
        parent, _, child = path.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, layer.get_base_layer())
    del denoiser.peft_config


def _switch(layers: Sequence[Any], name: RoleName | None) -> None:
    """Switch the adapter of a role on in these layers and all others off.

    peft's own switches freeze and unfreeze every adapter too: of 300 layers 30 ms, ten times an update, or with
    activation checkpointing twice a block.
    """
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = name


def _check_switch(layers: Sequence[Any]) -> None:
    """Leave every adapter off, having seen that :func:`_switch` reaches what peft reads."""
    for name in (_ROLES[-1], None):
        _switch(layers, name)
        for layer in layers:
            if layer.disable_adapters != (name is None) or layer.active_adapters != [_ROLES[-1]]:
                raise DistillationConfigError(
                    "the installed peft keeps the switches of adapters elsewhere than versions 0.17 to 0.21; install "
                    "one of these, or set adapter_rank to None"
                )


def _is_adapter_layer(module: nn.Module) -> bool:
    return hasattr(module, "enable_adapters") and hasattr(module, "get_base_layer")


def _adapter_layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if _is_adapter_layer(layer)]
