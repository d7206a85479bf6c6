import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import distillation as ds
from distillation import roles as roles_module
from distillation.condition import TextCondition
from distillation.errors import DistillationConfigError
from distillation.families.parts import kept_in_float32
from distillation.roles import Role, Separate, SharedBase, merged, roles_of, save_activations
from distillation.trainer import start_student
from distillation.vsd import trainable
from latent_rewards.training.checkpoint import latest_checkpoint, load_checkpoint

SHAPE = (4, 2, 4, 4)  # what tiny_wan takes
RANK = 3


@pytest.fixture
def base(tiny_wan):
    return tiny_wan()


@pytest.fixture
def inputs(randn):
    return randn(2, *SHAPE), torch.tensor([0.4, 0.9], dtype=torch.float64), TextCondition(randn(2, 3, 8, seed=1))


def shaken(role, randn):
    """The role, away from the base."""
    with torch.no_grad():
        for index, parameter in enumerate(role.parameters()):
            parameter.add_(0.1 * randn(*parameter.shape, seed=100 + index))
    return role


def test_at_first_every_role_computes_what_the_teacher_does(base, inputs):
    alone = copy.deepcopy(base)(*inputs).v
    roles = SharedBase(base, RANK)
    for network in (base, roles.student, roles.fake_score(), roles.target()):
        assert torch.equal(network(*inputs).v, alone)


def test_outside_its_call_no_role_is_seen(base, inputs, randn):
    alone = copy.deepcopy(base)(*inputs).v
    roles = SharedBase(base, RANK)
    student, fake = shaken(roles.student, randn), shaken(roles.fake_score(), randn)
    moved = student(*inputs).v
    assert not torch.allclose(moved, alone)
    assert torch.equal(base(*inputs).v, alone)
    with roles.playing("fake_score"):
        assert torch.equal(student(*inputs).v, moved)
        assert torch.equal(base(*inputs).v, fake(*inputs).v)
    with pytest.raises(RuntimeError, match="broken"), roles.playing("student"):
        raise RuntimeError("broken")
    assert torch.equal(base(*inputs).v, alone)


def test_a_call_does_not_ask_every_module_for_its_dtype(base, inputs, monkeypatch):
    student = SharedBase(base, RANK).student
    monkeypatch.setattr(type(base.transformer), "dtype", property(lambda _: pytest.fail("thousands are asked")))
    assert student(*inputs).v.dtype == torch.float64


def test_the_target_starts_where_the_student_is_and_stays(base, inputs, randn):
    roles = SharedBase(base, RANK)
    student = shaken(roles.student, randn)
    target = roles.target()
    before = target(*inputs).v
    assert torch.equal(before, student(*inputs).v)
    shaken(student, randn)
    assert torch.equal(target(*inputs).v, before)
    assert not any(parameter.requires_grad for parameter in target.parameters())


@pytest.mark.parametrize("shared", [True, False])
def test_the_reference_stays_what_the_student_was(base, inputs, randn, shared):
    roles = SharedBase(base, RANK) if shared else Separate(base, copy.deepcopy(base))
    student = shaken(roles.student if shared else roles._student, randn)
    reference, target = roles.reference(), roles.target()
    before = reference(*inputs).v
    assert torch.equal(before, student(*inputs).v)
    shaken(student, randn), shaken(target, randn)
    assert torch.equal(reference(*inputs).v, before)
    assert not torch.allclose(student(*inputs).v, before)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in trainable(roles.fake_score()).parameters())


def test_gradients_reach_the_adapter_of_the_role_alone_and_are_those_of_its_weights(base, inputs):
    whole = copy.deepcopy(base).requires_grad_(True)
    roles = SharedBase(base, RANK)
    fake = roles.fake_score()
    (whole(*inputs).v ** 2).sum().backward()
    (fake(*inputs).v ** 2).sum().backward()
    touched = {id(p) for p in base.parameters() if p.grad is not None}
    assert touched == {id(p) for p in fake.parameters()}
    # W + B A with B = 0: dL/dB = dL/dW A^T, and dL/dA = 0.
    weights, seen = dict(whole.named_parameters()), 0
    for name, down in roles.adapter("fake_score").items():
        if name.endswith("lora_A"):
            up = roles.adapter("fake_score")[name.removesuffix("A") + "B"]
            full = weights[name.removesuffix(".lora_A") + ".weight"].grad
            torch.testing.assert_close(up.grad, full @ down.detach().T, rtol=1e-10, atol=1e-12)
            assert float(down.grad.abs().max()) == 0
            seen += 1
    assert seen == len(roles.adapter("fake_score")) // 2 > 20


@pytest.mark.parametrize("others", [(), ("fake_score",), ("fake_score", "teacher"), ("teacher", "target")])
def test_a_repeated_forward_pass_plays_the_role_that_made_it(base, inputs, randn, others):
    roles = SharedBase(base, RANK)
    student = shaken(roles.student, randn)
    networks = {"fake_score": shaken(roles.fake_score(), randn), "target": roles.target(), "teacher": base}

    def gradients():
        loss = (student(*inputs).v ** 2).sum()
        for name in others:
            loss = loss + networks[name](*inputs).v.detach().sum()
        loss.backward()
        found = [parameter.grad for parameter in student.parameters()]
        student.zero_grad(set_to_none=True)
        return found

    plain = gradients()
    save_activations(roles, {"student": student})
    assert base.transformer.is_gradient_checkpointing
    for kept, repeated in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(repeated, kept, rtol=1e-10, atol=1e-12)
    # What diffusers does by itself would repeat it as the teacher: another number of saved tensors, or other gradients.
    base.transformer.enable_gradient_checkpointing()
    with pytest.raises(Exception, match="recomput|saved"):
        gradients()


def test_a_repeated_block_switches_its_own_adapters_and_no_others(base, inputs, monkeypatch):
    roles = SharedBase(base, RANK)
    save_activations(roles, {"student": roles.student})
    loss = (roles.student(*inputs).v ** 2).sum()
    switched = []
    plain = roles_module._switch
    monkeypatch.setattr(
        roles_module, "_switch", lambda layers, name: (switched.extend(map(id, layers)), plain(layers, name))
    )
    loss.backward()
    inside = {id(layer) for layer in roles_module._adapter_layers(base.transformer.blocks)}
    assert set(switched) == inside and len(switched) == 2 * len(inside)


def test_under_autocast_an_adapter_reads_what_its_layer_does(tiny_wan, inputs, randn, monkeypatch):
    roles = SharedBase(tiny_wan().float(), RANK)
    student = shaken(roles.student, randn)
    x_t, t, condition = inputs[0].float(), inputs[1].float(), TextCondition(inputs[2].embeddings.float())
    layer, seen = roles_module._adapter_layers(student.roles.teacher.transformer.blocks)[-1], []
    layer.lora_A["student"].register_forward_pre_hook(lambda _, read: seen.append(read[0].dtype))

    def predicted():
        with torch.autocast("cpu", torch.bfloat16):
            return student(x_t, t, condition).v

    ours = predicted()
    student(x_t, t, condition)
    assert seen == [torch.bfloat16, torch.float32]
    # What peft does by itself gives the same numbers.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    torch.testing.assert_close(predicted(), ours, rtol=0, atol=0)
    assert seen[-1] == torch.float32


def test_a_peft_that_switches_otherwise_is_refused(base, monkeypatch):
    from peft.tuners.tuners_utils import BaseTunerLayer

    monkeypatch.setattr(BaseTunerLayer, "disable_adapters", property(lambda layer: False))
    with pytest.raises(DistillationConfigError, match="peft keeps the switches"):
        SharedBase(base, RANK)


def test_two_roles_in_one_loss_each_get_their_own_gradient(base, inputs, randn):
    roles = SharedBase(base, RANK)
    student, fake = shaken(roles.student, randn), shaken(roles.fake_score(), randn)

    def gradients(network, role):
        (role(*inputs).v ** 2).sum().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    alone = [gradients(role, role) for role in (student, fake)]
    base.zero_grad(set_to_none=True)
    save_activations(roles, {"student": student, "fake_score": fake})
    ((student(*inputs).v ** 2).sum() + (fake(*inputs).v ** 2).sum()).backward()
    for role, expected in zip((student, fake), alone, strict=True):
        for parameter, wanted in zip(role.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12)


def test_a_merged_role_is_a_network_like_the_teachers(base, inputs, randn):
    names = [name for name, _ in base.named_parameters()]
    roles = SharedBase(base, RANK)
    student = shaken(roles.student, randn)
    plain = merged(student)
    assert [name for name, _ in plain.named_parameters()] == names
    torch.testing.assert_close(plain(*inputs).v, student(*inputs).v, rtol=1e-10, atol=1e-12)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    expected = student(*inputs).v
    with torch.no_grad():
        next(plain.parameters()).zero_()
    assert torch.equal(student(*inputs).v, expected)
    assert merged(plain) is plain


def test_what_is_freed_of_its_adapters_checkpoints_as_no_role_and_holds_no_adapter(base, inputs):
    roles = SharedBase(base, RANK)
    save_activations(roles, {"student": roles.student})
    plain = roles.merged()
    assert base.transformer.is_gradient_checkpointing and not plain.transformer.is_gradient_checkpointing
    roles.remove()
    assert not base.transformer.is_gradient_checkpointing
    for network in (plain, base):
        for module in network.modules():
            held = getattr(getattr(module, "_gradient_checkpointing_func", None), "__self__", None)
            assert not isinstance(held, SharedBase)


def test_a_merged_role_that_checkpointed_copies_no_adapters_along(base, monkeypatch):
    roles = SharedBase(base, RANK)
    save_activations(roles, {"student": roles.student})
    monkeypatch.setattr(SharedBase, "__deepcopy__", lambda *_: pytest.fail("the roles were copied"), raising=False)
    roles.merged()


def test_a_teacher_can_be_rid_of_its_adapters_and_given_others(base, inputs):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    SharedBase(base, RANK).remove()
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    alone = base(*inputs).v
    assert torch.equal(SharedBase(base, 1).student(*inputs).v, alone)


def test_a_role_is_its_adapter_alone_but_moves_and_copies_with_its_base(base, inputs, randn):
    roles = SharedBase(base, RANK)
    student = shaken(roles.student, randn)
    size = sum(parameter.numel() for parameter in base.parameters())
    assert sum(value.numel() for value in student.state_dict().values()) < size / 3
    assert set(student.state_dict()) == set(roles.target().state_dict())
    twin = copy.deepcopy(student)
    assert twin.roles is not roles
    before = student(*inputs).v
    shaken(twin, randn)
    assert torch.equal(student(*inputs).v, before)
    assert not torch.allclose(twin(*inputs).v, before)
    twin.to(torch.float32)
    assert {parameter.dtype for parameter in twin.roles.teacher.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float64}


def settings(**changes):
    base = {
        "vsd_steps": 3,
        "cd_steps": 3,
        "batch_size": 2,
        "step_counts": [1, 2],
        "guidance_scale": 2.0,
        "learning_rate": 0.01,
        "fake_learning_rate": 0.01,
        "fake_updates": 2,
        "num_timesteps": 4,
        "cd_max_time": 0.5,
        "cd_keep_weight": 1.0,
        "adapter_rank": RANK,
        "progress": False,
        "device": "cpu",
    }
    return ds.DistillationConfig(**(base | changes))


def teacher_of(base, randn):
    def encode(prompts):
        return TextCondition(torch.stack([randn(3, 8, seed=len(text)) for text in prompts]))

    return SimpleNamespace(denoiser=base, encode=encode, latent_shape=SHAPE)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_vsd_and_cd_train_adapters_and_leave_the_teacher_as_it_was(base, inputs, randn, checkpointed):
    before = copy.deepcopy(base.state_dict())
    teacher = teacher_of(base, randn)
    alone = base(*inputs).v
    config = settings(gradient_checkpointing=checkpointed)
    student = start_student(teacher, config)
    result = ds.DistillationTrainer(teacher, student, ["a", "bb"], config).train()
    assert is_as_it_was(base, before)
    assert torch.equal(base(*inputs).v, alone)
    assert list(result.history) == ["vsd", "cd"]
    own = student.merged()
    assert not isinstance(own.denoiser, Role)
    noise = randn(2, 2, *SHAPE)
    sampled = student.sample(teacher.encode(["a", "bb"]), noise, 2)
    torch.testing.assert_close(own.sample(teacher.encode(["a", "bb"]), noise, 2), sampled, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(sampled, ds.FewStepStudent(base).sample(teacher.encode(["a", "bb"]), noise, 2))


def test_an_anchor_beside_an_adapter_takes_a_role_for_its_fake_score(base, inputs, randn):
    teacher, before, (*_, condition) = teacher_of(base, randn), copy.deepcopy(base.state_dict()), inputs
    student = start_student(teacher, settings())
    with pytest.raises(DistillationConfigError, match=r"adapters that are off.*student.denoiser.roles.fake_score\(\)"):
        ds.VSDAnchor(base, copy.deepcopy(base))

    def trains(policy, fake):
        anchor, was = ds.VSDAnchor(base, fake, learning_rate=0.01), fake(*inputs).v
        anchor.loss(policy, condition, randn(2, 2, *SHAPE)).backward()
        anchor.after_step()
        assert any(parameter.grad is not None for parameter in policy.parameters())
        return is_as_it_was(base, before) and not torch.allclose(fake(*inputs).v, was)

    assert trains(student, student.denoiser.roles.fake_score())
    own = student.merged()
    student.denoiser.roles.remove()
    assert trains(own, copy.deepcopy(base))


def test_a_copy_of_a_teacher_with_adapters_is_no_student_of_its_own(base, randn):
    teacher = teacher_of(base, randn)
    start_student(teacher, settings())
    config = settings(adapter_rank=None)
    own = ds.FewStepStudent(copy.deepcopy(base), latent_shape=SHAPE)
    with pytest.raises(DistillationConfigError, match="has nothing to train"):
        ds.DistillationTrainer(teacher, own, ["a"], config).train()


def narrowed(base):
    """The base as a pipeline read in bfloat16 has it: what diffusers keeps in float32 stays so."""
    for name, parameter in base.named_parameters():
        wide = kept_in_float32(base.transformer, name)
        parameter.data = parameter.data.to(torch.float32 if wide else torch.bfloat16)
    return base


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_adapters_on_a_base_in_bf16_are_trained_and_merged_in_float32(base, randn, precision):
    teacher = teacher_of(narrowed(base), randn)
    before = copy.deepcopy(base.state_dict())
    config = settings(learning_rate=1e-6, fake_learning_rate=1e-6, ema_decay=0.0, mixed_precision=precision)
    student = start_student(teacher, config)
    first = {name: value.clone() for name, value in student.denoiser.state_dict().items()}
    ds.DistillationTrainer(teacher, student, ["a", "bb"], config).train()
    learnt = student.denoiser.state_dict()
    assert {value.dtype for value in learnt.values()} == {torch.float32}
    assert all(0 < float((learnt[name] - first[name]).abs().max()) < 1e-4 for name in learnt)
    own = student.merged().denoiser.state_dict()
    assert {value.dtype for value in own.values()} == {torch.float32}
    name = "transformer.blocks.0.attn1.to_q"
    down, up = (learnt[f"adapter.{name.replace('.', '/')}/lora_{end}"] for end in "AB")
    torch.testing.assert_close(own[f"{name}.weight"], before[f"{name}.weight"].float() + up @ down, rtol=0, atol=1e-9)
    assert is_as_it_was(base, before)


def test_a_student_of_a_teacher_in_bf16_owns_weights_in_float32(base, randn):
    teacher = teacher_of(narrowed(base), randn)
    config = settings(adapter_rank=None, learning_rate=1e-6, fake_learning_rate=1e-6, ema_decay=0.0)
    student = start_student(teacher, config)
    result = ds.DistillationTrainer(teacher, student, ["a", "bb"], config).train()
    weight = student.denoiser.transformer.blocks[0].ffn.net[2].weight
    assert weight.dtype == torch.float32 and base.transformer.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert 0 < float((weight - base.transformer.blocks[0].ffn.net[2].weight.float()).detach().abs().max()) < 1e-4
    assert result.history["vsd"][-1]["fake_grad_norm"] > 0


def is_as_it_was(base, before):
    """Whether no weight of the base has changed since the state was taken, in layers that are wrapped now too."""
    after = base.state_dict()
    return all(
        torch.equal(value, after[name] if name in after else after[_inner(name)]) for name, value in before.items()
    )


def _inner(name):
    """The name of a weight once its layer is wrapped."""
    layer, _, end = name.rpartition(".")
    return f"{layer}.base_layer.{end}"


def test_checkpointing_and_a_kill_change_no_weight_and_checkpoints_are_small(tiny_wan, randn, tmp_path):
    def run(steps=(3, 3), **changes):
        base = tiny_wan()
        teacher = teacher_of(base, randn)
        config = settings(vsd_steps=steps[0], cd_steps=steps[1], checkpoint_every=2, **changes)
        student = start_student(teacher, config)
        ds.DistillationTrainer(teacher, student, ["a", "bb"], config).train()
        return base, torch.cat([parameter.detach().flatten() for parameter in student.parameters()])

    base, straight = run()
    torch.testing.assert_close(run(gradient_checkpointing=True)[1], straight, rtol=1e-9, atol=1e-12)
    run((3, 0), output_dir=str(tmp_path))
    run((3, 2), output_dir=str(tmp_path))
    assert torch.equal(run(output_dir=str(tmp_path))[1], straight)
    _, state = load_checkpoint(latest_checkpoint(tmp_path / "vsd"))
    kept = [value for part in state["parts"].values() for value in _tensors(part)]
    size = sum(p.numel() for p in base.parameters())
    # Weights, two moments and an average of two adapters.
    assert sum(value.numel() for value in kept) < 7 * len(straight) + 1000 < 7 * size / 3


def _tensors(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


def test_a_merged_student_keeps_its_grids_and_parts(base, randn):
    student = start_student(teacher_of(base, randn), settings(), {1: [1.0], 2: [1.0, 0.4]}, eta=0.5)
    own = student.merged()
    assert (own.grids, own.eta, own.latent_shape()) == (student.grids, 0.5, SHAPE)
    assert len(own.encode(["a"])) == 1
    assert own.merged() is own


def test_mistakes_name_the_remedy(tiny_wan, base, randn):
    teacher = teacher_of(base, randn)
    with pytest.raises(DistillationConfigError, match="adapter_rank must be at least 1; got 0"):
        settings(adapter_rank=0)
    with pytest.raises(DistillationConfigError, match="at least 1, or None"):
        SharedBase(base, 0)
    with pytest.raises(DistillationConfigError, match=r"ends in one of \['nothing'\]"):
        SharedBase(base, 2, targets=["nothing"])
    with pytest.raises(DistillationConfigError, match="no linear layer to adapt; the denoiser has none"):
        SharedBase(nn.Conv2d(1, 1, 1), 2)
    own = ds.FewStepStudent(copy.deepcopy(base), latent_shape=SHAPE)
    with pytest.raises(DistillationConfigError, match="adapter_rank = 3, but the student owns"):
        ds.DistillationTrainer(teacher, own, ["a"], settings())
    student = start_student(teacher, settings())
    with pytest.raises(DistillationConfigError, match="rank 3, adapter_rank is None"):
        ds.DistillationTrainer(teacher, student, ["a"], settings(adapter_rank=None))
    with pytest.raises(DistillationConfigError, match="another network than the teacher"):
        roles_of(tiny_wan(), student.denoiser, RANK)
    with pytest.raises(DistillationConfigError, match="has adapters already"):
        start_student(teacher, settings())
    with pytest.raises(DistillationConfigError, match="share weights"):
        Separate(base, base)
    with pytest.raises(DistillationConfigError, match="the student has no diffusers network"):
        save_activations(Separate(base, nn.Linear(1, 1)), {"student": nn.Linear(1, 1)})
