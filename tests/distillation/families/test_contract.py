"""What every family promises, asked of a tiny pipeline and of unmodified diffusers."""

import copy
import json
import shutil

import pytest
import torch

from distillation.denoiser import guided
from distillation.errors import ConditionError, TimestepsError
from distillation.families import FAMILIES, TeacherError, import_diffusers, load_teacher
from distillation.families.codec import CodecError
from distillation.families.export import load_student
from distillation.families.grids import scheduler_folder
from distillation.roles import SharedBase
from distillation.sampler import ode_step, sample_teacher
from distillation.schedule import coefficients
from distillation.student import FewStepStudent

TEXTS = ["a digit moves left", "two digits rest"]
GRIDS = {1: [1.0], 2: [1.0, 0.5], 4: [1.0, 0.75, 0.5, 0.25]}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditions(family):
    encode, case = family.teacher.encode, family.case
    return encode(case.prompts(*TEXTS)), encode(case.prompts("", ""))


def student_of(family, eta: float = 1.0, timesteps=None) -> FewStepStudent:
    """The teacher's network, moved a little: a student must not be mistaken for its teacher."""
    teacher = family.teacher
    denoiser = copy.deepcopy(teacher.denoiser).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return FewStepStudent(
        denoiser,
        timesteps,
        eta,
        encode=teacher.encode,
        latent_shape=teacher.latent_shape,
        exporter=teacher.exporter,
    )


def test_the_teacher_states_what_it_is(family):
    teacher = family.teacher
    assert teacher.latent_shape == family.case.shape
    assert teacher.pipeline_path == family.folder
    assert teacher.exporter.pipeline_class == family.case.pipeline_class
    assert teacher.exporter.family == teacher.family == teacher.codec.fingerprint.split("-vae-")[0]
    assert not any(weight.requires_grad for weight in teacher.denoiser.parameters())
    assert not teacher.denoiser.training


def test_text_equals_the_stock_encoding(family):
    texts = [*TEXTS, "  a &amp;  digit\n moves ", "", "left " * 20]
    expected, _ = family.stock.encode_prompt(
        texts, do_classifier_free_guidance=False, max_sequence_length=family.case.text_length
    )
    actual = family.teacher.encode(family.case.prompts(*texts)).embeddings
    assert actual.shape == (5, family.case.text_length, 32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_predictions_determine_one_another(family):
    x, t = noise(2, *family.case.shape), torch.tensor([0.9, 0.3])
    condition, _ = conditions(family)
    schedule = family.teacher.denoiser.schedule
    with torch.no_grad():
        prediction = family.teacher.denoiser(x, t, condition)
    alpha, sigma = coefficients(schedule, t, x)
    p, q = schedule.velocity_coefficients(alpha, sigma)
    assert prediction.x0.shape == x.shape
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(p * prediction.x0 + q * prediction.eps, prediction.v, rtol=0, atol=1e-5)


def test_pure_noise_has_an_x0(family):
    """alpha is exactly 0 at t = 1: x0 comes from the velocity alone, without a division."""
    x = noise(2, *family.case.shape)
    condition, _ = conditions(family)
    with torch.no_grad():
        prediction = family.teacher.denoiser(x, 1.0, condition)
    assert float(prediction.alpha) == 0
    assert bool(prediction.x0.isfinite().all())
    expected = -prediction.v if family.case.frames_first else x - prediction.v
    torch.testing.assert_close(prediction.x0, expected, rtol=0, atol=1e-6)


def test_the_network_is_called_as_the_stock_pipeline_calls_it(family):
    calls: list[dict] = []
    x = noise(2, *family.case.shape)
    condition, _ = conditions(family)
    for network in (family.stock.transformer, family.teacher.denoiser.transformer):
        hook = network.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
        if network is family.stock.transformer:
            family.case.run(family.stock, TEXTS, x, num_inference_steps=1, guidance_scale=1.0)
        else:
            time = family.case.times(family.stock, 1, family.teacher.denoiser.schedule)[0]
            with torch.no_grad():
                family.teacher.denoiser(x, torch.tensor(time), condition)
        hook.remove()
    theirs, ours = calls
    for name, expected in theirs.items():
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(ours[name], expected.to(ours[name].dtype), rtol=0, atol=1e-6)
        elif isinstance(expected, tuple):
            torch.testing.assert_close(tuple(ours[name]), expected, rtol=0, atol=0)
        else:
            assert ours.get(name) == expected, name


def test_everything_that_is_said_matters(family):
    """Text, time, and the place of a frame: a tiny network that ignores them would make parity worthless."""
    x, t = noise(2, *family.case.shape), torch.tensor(0.6)
    condition, negative = conditions(family)
    with torch.no_grad():
        value = family.teacher.denoiser(x, t, condition).value
        assert (family.teacher.denoiser(x, t, negative).value - value).abs().max() > 1e-3
        assert (family.teacher.denoiser(x, torch.tensor(0.3), condition).value - value).abs().max() > 1e-3
        flipped = family.teacher.denoiser(x.flip(2), t, condition).value.flip(2)
    assert (flipped - value).abs().max() > 1e-3


def test_time_may_differ_between_samples(family):
    x, t = noise(2, *family.case.shape), torch.tensor([0.95, 0.2])
    condition, _ = conditions(family)
    with torch.no_grad():
        together = family.teacher.denoiser(x, t, condition).x0
        for row in range(2):
            index = torch.tensor([row])
            alone = family.teacher.denoiser(x[index], t[row], condition.index_select(index)).x0
            torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_one_step_equals_the_stock_pipeline(family, guidance_scale):
    x = noise(2, *family.case.shape)
    expected = family.case.run(family.stock, TEXTS, x, num_inference_steps=1, guidance_scale=guidance_scale)
    condition, negative = conditions(family)
    with torch.no_grad():
        prediction = guided(family.teacher.denoiser, x, torch.tensor(1.0), condition, negative, guidance_scale)
    torch.testing.assert_close(prediction.x0, expected, rtol=0, atol=1e-5)


def test_many_steps_equal_the_stock_pipeline_on_its_own_grid(family):
    x, steps = noise(2, *family.case.shape), 10
    expected = family.case.run(family.stock, TEXTS, x, num_inference_steps=steps, guidance_scale=3.0)
    condition, negative = conditions(family)
    schedule = family.teacher.denoiser.schedule
    times = family.case.times(family.stock, steps, schedule)
    for time, following in zip(times, times[1:], strict=False):
        with torch.no_grad():
            t = torch.tensor(time, dtype=torch.float64)
            prediction = guided(family.teacher.denoiser, x, t, condition, negative, 3.0)
            x = ode_step(x, prediction, *coefficients(schedule, following, x))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_the_teachers_sampler_equals_a_stock_scheduler_on_its_grid(family, monkeypatch):
    grid = {10: [1 - i / 10 for i in range(10)]}
    scheduler = import_diffusers()
    configuration = family.teacher.exporter.configurations(family.teacher.denoiser, grid, 0.0)[10]
    settings = {name: value for name, value in configuration.items() if name != "_class_name"}
    monkeypatch.setattr(family.stock, "scheduler", getattr(scheduler, configuration["_class_name"])(**settings))
    x = noise(2, *family.case.shape)
    expected = family.case.run(family.stock, TEXTS, x, num_inference_steps=10, guidance_scale=3.0)
    condition, negative = conditions(family)
    actual = sample_teacher(family.teacher.denoiser, condition, x, num_steps=10, guidance_scale=3.0, negative=negative)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_decoding_is_the_raw_vae_of_unscaled_latents(family):
    latents, vae = noise(2, *family.case.shape), family.stock.vae
    with torch.no_grad():
        raw = vae.decode(family.case.raw(latents, vae.config)).sample
    videos = family.teacher.codec.decode(latents)
    assert videos.shape == (2, family.case.frames, 3, family.case.height, family.case.width)
    assert videos.dtype == torch.float32 and 0 <= videos.min() and videos.max() <= 1
    torch.testing.assert_close(videos, (raw / 2 + 0.5).clamp(0, 1).transpose(1, 2), rtol=0, atol=1e-5)
    frames, height, width = family.teacher.codec.video_size(family.case.shape)
    assert (frames, 3, height, width) == tuple(videos.shape[1:])


def test_encoding_is_the_scaled_mode_of_the_raw_vae(family):
    case, vae = family.case, family.stock.vae
    videos = torch.rand(2, case.frames, 3, case.height, case.width, generator=torch.Generator().manual_seed(1))
    latents = family.teacher.codec.encode(videos)
    assert latents.shape == (2, *case.shape)
    with torch.no_grad():
        mode = vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(case.raw(latents, vae.config), mode, rtol=0, atol=1e-5)
    assert family.teacher.codec.decode(latents).shape == videos.shape
    one_by_one = type(family.teacher.codec)(family.teacher.codec.vae, chunk_size=1)
    torch.testing.assert_close(one_by_one.encode(videos), latents, rtol=0, atol=1e-5)


def test_what_the_vae_would_cut_or_invent_is_refused(family):
    case, codec = family.case, family.teacher.codec
    channels, frames, height, width = case.shape
    with pytest.raises(CodecError, match=rf"\[B, {channels}, F, H, W\].*got \[1, {channels + 1}, "):
        codec.decode(torch.zeros(1, channels + 1, frames, height, width))
    for shape in [
        (1, case.frames + 1, 3, case.height, case.width),
        (1, case.frames, 3, case.height + 4, case.width),
        (1, case.frames, 1, case.height, case.width),
    ]:
        with pytest.raises(CodecError, match=r"got \d+ frames|got \["):
            codec.encode(torch.rand(shape))


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_a_saved_student_samples_the_same_in_stock_diffusers_and_loaded_again(family, eta, tmp_path):
    student = student_of(family, eta)
    student.save_pretrained(tmp_path / "student")
    loaded = load_student(tmp_path / "student")
    assert loaded.denoiser.schedule == student.denoiser.schedule
    assert (loaded.grids, loaded.eta, loaded.latent_shape()) == (student.grids, eta, family.case.shape)
    assert loaded.exporter.codec.fingerprint == family.teacher.codec.fingerprint
    diffusers = import_diffusers()
    stock = getattr(diffusers, family.case.pipeline_class).from_pretrained(tmp_path / "student")
    stock.set_progress_bar_config(disable=True)
    condition = loaded.encode(family.case.prompts(*TEXTS))
    for count in GRIDS:
        folder = tmp_path / "student" / scheduler_folder(count)
        name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
        stock.scheduler = getattr(diffusers, name).from_pretrained(folder)
        torch.manual_seed(7)
        expected = family.case.run(stock, TEXTS, num_inference_steps=count, guidance_scale=1.0)
        torch.manual_seed(7)
        empty = family.case.stock_latents(torch.empty(2, *family.case.shape))
        drawn = torch.stack([family.case.stock_latents(torch.randn(empty.shape)) for _ in range(count)])
        with torch.no_grad():
            sampled = loaded.sample(condition, drawn, count)
            assert torch.equal(sampled, student.sample(condition, drawn, count))
        torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-5)


def test_a_student_of_adapters_is_saved_with_them_merged(family, tmp_path):
    roles = SharedBase(copy.deepcopy(family.teacher.denoiser), 2)
    parts = {"latent_shape": family.teacher.latent_shape, "exporter": family.teacher.exporter}
    student = FewStepStudent(roles.student, {1: [1.0]}, encode=family.teacher.encode, **parts)
    condition, noise = student.encode(family.case.prompts(*TEXTS)), torch.randn(1, 2, *family.case.shape)
    with torch.no_grad():
        teachers = student.sample(condition, noise, 1)
        assert torch.equal(FewStepStudent(family.teacher.denoiser, {1: [1.0]}).sample(condition, noise, 1), teachers)
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        moved = student.sample(condition, noise, 1)
        student.save_pretrained(tmp_path / "student")
        stored = load_student(tmp_path / "student").sample(condition, noise, 1)
    assert float((moved - teachers).abs().max()) > 1e-3
    torch.testing.assert_close(stored, moved, rtol=0, atol=1e-5)


def test_the_card_can_be_followed(family, tmp_path):
    student_of(family).save_pretrained(tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    case = family.case
    for line in (
        f"from diffusers import {case.pipeline_class}, ",
        f"num_inference_steps=4, guidance_scale=1.0, max_sequence_length={case.text_length}",
        f"num_frames={case.frames}, height={case.height}, width={case.width}",
        'subfolder="scheduler_4_steps"',
    ):
        assert line in card


@pytest.mark.parametrize(
    ("timesteps", "eta", "message"),
    [
        ({4: [1.0, 0.9, 0.5, 0.25]}, 1.0, r"4-step grid .*\[1.0, 0.9.*cannot be exported"),
        ({4: [1.0, 0.9, 0.5, 0.25]}, 0.0, r"4-step grid .*\[1.0, 0.9.*cannot be exported"),
        (None, 0.5, "not eta = 0.5"),
    ],
)
def test_a_grid_no_stock_scheduler_has_is_named_and_nothing_is_written(family, timesteps, eta, message, tmp_path):
    with pytest.raises(TimestepsError, match=message):
        student_of(family, eta, timesteps).save_pretrained(tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


def test_copies_are_independent(family):
    student = student_of(family)
    copied = copy.deepcopy(student)
    assert copied.exporter is student.exporter
    condition, _ = conditions(family)
    stack = noise(2, 2, *family.case.shape)
    with torch.no_grad():
        before = student.sample(condition, stack, 2)
        assert torch.equal(copied.sample(condition, stack, 2), before)
        for weight in copied.parameters():
            weight.mul_(0.5)
        assert torch.equal(student.sample(condition, stack, 2), before)
        assert not torch.equal(copied.sample(condition, stack, 2), before)


def test_a_half_precision_network_has_float32_around_it(family):
    loaded = load_teacher(
        family.folder,
        dtype=torch.bfloat16,
        num_frames=family.case.frames,
        height=family.case.height,
        width=family.case.width,
    )
    assert loaded.denoiser.transformer.dtype == loaded.exporter.encode.text_encoder.dtype == torch.bfloat16
    assert loaded.codec.vae.dtype == torch.float32
    condition = loaded.encode(family.case.prompts(*TEXTS))
    with torch.no_grad():
        prediction = loaded.denoiser(noise(2, *family.case.shape), torch.tensor(0.5), condition)
    assert prediction.v.dtype == prediction.x0.dtype == torch.float32


def test_gradients_reach_the_network_and_the_latents(family):
    student = student_of(family)
    condition, _ = conditions(family)
    x = noise(2, *family.case.shape).requires_grad_()
    student.denoiser(x, torch.tensor([0.95, 0.2]), condition).x0.square().mean().backward()
    assert x.grad is not None and bool((x.grad != 0).any())
    assert all(weight.grad is not None for weight in student.denoiser.parameters() if weight.requires_grad)


@pytest.mark.parametrize("rows", [None, 1])
def test_a_condition_of_the_latents_length_is_needed(family, rows):
    condition, _ = conditions(family)
    given = None if rows is None else condition.index_select(torch.tensor([0]))
    with pytest.raises(ConditionError, match="2 latents came with"):
        family.teacher.denoiser(noise(2, *family.case.shape), torch.tensor(0.5), given)


def test_sizes_that_do_not_fit_are_refused(family):
    case = family.case
    for size in [
        (case.frames + 1, case.height, case.width),
        (case.frames, case.height + 8, case.width),
        (case.frames, case.height, case.width + 8),
    ]:
        with pytest.raises(TeacherError, match=f"a video of {size[0]} frames of {size[1]} x {size[2]} does not fit"):
            load_teacher(family.folder, num_frames=size[0], height=size[1], width=size[2])
    with pytest.raises(TeacherError, match="go together"):
        load_teacher(family.folder, num_frames=case.frames)


def edited(family, tmp_path, file: str, **settings):
    shutil.copytree(family.folder, tmp_path / "edited")
    path = tmp_path / "edited" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return {
        "path_or_hub_id": tmp_path / "edited",
        "num_frames": family.case.frames,
        "height": family.case.height,
        "width": family.case.width,
    }


def test_a_vae_of_other_channels_is_refused(family, tmp_path):
    key = "latent_channels" if "Cog" in family.case.pipeline_class else "z_dim"
    arguments = edited(family, tmp_path, "vae/config.json", **{key: 7})
    with pytest.raises(TeacherError, match=f"{family.case.shape[0]} channels, and its VAE makes 7"):
        load_teacher(**arguments)


def test_another_pipeline_class_is_refused_with_what_is_supported(family, tmp_path):
    arguments = edited(family, tmp_path, "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(TeacherError, match=f"'FluxPipeline'; supported: {', '.join(sorted(FAMILIES))}"):
        load_teacher(**arguments)


def test_missing_weights_are_named(family, tmp_path):
    arguments = edited(family, tmp_path, "model_index.json")
    (tmp_path / "edited" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"diffusion_pytorch_model.safetensors.*must be safetensors"):
        load_teacher(**arguments)
