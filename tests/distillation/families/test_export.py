import copy
import json

import pytest
import torch

from distillation.denoiser import GaussianDenoiser
from distillation.errors import MissingPartError
from distillation.families import TeacherError, import_diffusers, load_teacher
from distillation.families.export import (
    FolderInUseError,
    StudentError,
    load_student,
    save_student,
    save_teacher_pipeline,
)
from distillation.families.grids import scheduler_folder
from distillation.families.wan import WanDenoiser
from distillation.schedule import RectifiedFlow
from distillation.student import FewStepStudent
from latent_rewards.training.checkpoint import CheckpointError, verify_directory

PROMPTS = ["a digit moves left", "two digits rest"]
SHAPE = (16, 2, 2, 2)


def make_student(teacher, *, shift: float = 1.0, timesteps=None, eta: float = 1.0, seed: int = 1) -> FewStepStudent:
    transformer = copy.deepcopy(teacher.denoiser.transformer).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return FewStepStudent(
        WanDenoiser(transformer, RectifiedFlow(shift)),
        timesteps,
        eta,
        encode=teacher.encode,
        latent_shape=teacher.latent_shape,
        exporter=teacher.exporter,
    )


def stock_latents(folder, num_steps: int, seed: int, scheduler: str = "FlowMatchLCMScheduler") -> torch.Tensor:
    """Sample as a user of diffusers would: stock pipeline, stock scheduler, one global seed."""
    diffusers = import_diffusers()
    pipeline = diffusers.WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, scheduler).from_pretrained(folder, subfolder=scheduler_folder(num_steps))
    torch.manual_seed(seed)
    return pipeline(
        PROMPTS,
        num_inference_steps=num_steps,
        guidance_scale=1,
        max_sequence_length=8,
        height=16,
        width=16,
        num_frames=5,
        output_type="latent",
    ).frames


def drawn_noise(num_steps: int, seed: int) -> torch.Tensor:
    """Return what the pipeline draws from the global generator: the latents, then one tensor per step but the last."""
    torch.manual_seed(seed)
    return torch.stack([torch.randn(2, *SHAPE) for _ in range(num_steps)])


@pytest.fixture(scope="module")
def saved(teacher, tmp_path_factory):
    student = make_student(teacher)
    folder = tmp_path_factory.mktemp("saved") / "student"
    student.save_pretrained(folder)
    return student, folder


def test_the_default_scheduler_is_that_of_the_largest_count(saved):
    _, folder = saved
    default = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert default == json.loads((folder / "scheduler_4_steps" / "scheduler_config.json").read_text())
    assert default["_class_name"] == "FlowMatchLCMScheduler"
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", "FlowMatchLCMScheduler"]


def test_what_is_loaded_is_what_was_saved(saved):
    student, folder = saved
    verify_directory(folder)
    loaded = FewStepStudent.from_pretrained(folder)
    assert loaded.grids == student.grids and loaded.eta == student.eta
    assert loaded.latent_shape() == SHAPE
    assert loaded.denoiser.schedule == student.denoiser.schedule
    assert loaded.exporter.codec.fingerprint == student.exporter.codec.fingerprint
    noise = drawn_noise(4, seed=1)
    with torch.no_grad():
        expected = student.sample(student.encode(PROMPTS), noise, 4)
        assert torch.equal(loaded.sample(loaded.encode(PROMPTS), noise, 4), expected)


def test_a_loaded_student_can_be_saved_again_and_names_no_folder(saved, tmp_path):
    student, folder = saved
    load_student(folder).save_pretrained(tmp_path / "again")
    for file in (tmp_path / "again").rglob("*"):
        if file.suffix in (".json", ".md") and file.name != "manifest.json":
            assert str(folder.parent) not in file.read_text() and str(tmp_path) not in file.read_text(), file
    noise = drawn_noise(1, seed=1)
    again = load_student(tmp_path / "again")
    with torch.no_grad():
        expected = student.sample(student.encode(PROMPTS), noise, 1)
        assert torch.equal(again.sample(again.encode(PROMPTS), noise, 1), expected)


def test_saving_changes_no_weight_and_no_layout(saved, tmp_path):
    student, _ = saved
    vae = student.exporter.codec.vae
    before = [(weight.clone(), weight.stride()) for weight in vae.parameters()]
    save_student(student, tmp_path / "student", dtype=torch.bfloat16)
    for weight, (value, stride) in zip(vae.parameters(), before, strict=True):
        assert weight.dtype == value.dtype and weight.stride() == stride and torch.equal(weight, value)
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}


def test_stored_in_bfloat16_except_what_diffusers_keeps(saved, tmp_path):
    from safetensors.torch import load_file

    student, _ = saved
    folder = tmp_path / "student"
    save_student(student, folder, dtype=torch.bfloat16)
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["proj_out.weight"].dtype == torch.bfloat16
    assert weights["scale_shift_table"].dtype == torch.float32
    encoder = load_file(folder / "text_encoder" / "model.safetensors")
    assert {weight.dtype for name, weight in encoder.items() if ".wo." not in name} == {torch.bfloat16}
    loaded = load_student(folder)
    assert loaded.denoiser.transformer.dtype == loaded.exporter.encode.text_encoder.dtype == torch.float32
    assert loaded.exporter.codec.fingerprint == student.exporter.codec.fingerprint
    with torch.no_grad():
        expected = loaded.sample(loaded.encode(PROMPTS), drawn_noise(2, seed=5), 2)
    torch.testing.assert_close(stock_latents(folder, 2, seed=5), expected, rtol=0, atol=1e-5)


def test_adapters_are_merged(teacher, tmp_path):
    from peft import LoraConfig

    student = make_student(teacher)
    transformer = student.denoiser.transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "student")
    transformer.set_adapter("student")
    noise = drawn_noise(2, seed=2)
    with torch.no_grad():
        expected = student.sample(student.encode(PROMPTS), noise, 2)
        student.save_pretrained(tmp_path / "student")
        assert torch.equal(student.sample(student.encode(PROMPTS), noise, 2), expected), "saving altered the student"
        transformer.disable_adapters()
        assert (student.sample(student.encode(PROMPTS), noise, 2) - expected).abs().max() > 1e-3
        loaded = load_student(tmp_path / "student")
        merged = loaded.sample(loaded.encode(PROMPTS), noise, 2)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    assert not getattr(loaded.denoiser.transformer, "peft_config", None)


def test_students_without_a_pipeline(teacher, tmp_path):
    bare = FewStepStudent(teacher.denoiser, latent_shape=SHAPE)
    with pytest.raises(MissingPartError, match="exporter=teacher.exporter"):
        bare.save_pretrained(tmp_path / "student")
    gaussian = FewStepStudent(GaussianDenoiser(0.0, 1.0, RectifiedFlow()), exporter=teacher.exporter)
    with pytest.raises(MissingPartError, match="a GaussianDenoiser cannot be written"):
        gaussian.save_pretrained(tmp_path / "student")


def test_only_an_earlier_export_is_replaced(teacher, components, tmp_path):
    student = make_student(teacher, timesteps={1: [1.0]})
    student.save_pretrained(tmp_path / "student")
    save_student(make_student(teacher, seed=2, timesteps={2: [1.0, 0.5]}), tmp_path / "student")
    assert load_student(tmp_path / "student").step_counts == (2,)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FolderInUseError, match="mine exists and was not written by this library"):
        student.save_pretrained(tmp_path / "mine")
    with pytest.raises(FolderInUseError, match="give a new folder"):
        save_teacher_pipeline(tmp_path / "mine", **components, latent_shape=SHAPE)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_folders_that_hold_no_student(saved, wan_folder, tmp_path):
    _, folder = saved
    with pytest.raises(StudentError, match="no latent_rewards.json"):
        load_student(wan_folder)
    with pytest.raises(TeacherError, match="holds a few-step student"):
        load_teacher(folder)


def test_an_altered_file_is_found(teacher, tmp_path):
    student = make_student(teacher)
    student.save_pretrained(tmp_path / "student")
    file = tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="transformer/diffusion_pytorch_model.safetensors differs"):
        load_student(tmp_path / "student")


def test_a_shipped_teacher_states_its_size(components, tmp_path):
    parts = {name: copy.deepcopy(part) for name, part in components.items()}
    save_teacher_pipeline(tmp_path / "teacher", **parts, latent_shape=(16, 3, 2, 4), max_sequence_length=6)
    loaded = load_teacher(tmp_path / "teacher")
    assert loaded.latent_shape == (16, 3, 2, 4)
    assert loaded.denoiser.schedule == RectifiedFlow(3.0)
    assert loaded.encode(["a"]).embeddings.shape == (1, 6, 32)
    weights = loaded.denoiser.transformer.state_dict()["proj_out.weight"]
    original = components["transformer"].state_dict()["proj_out.weight"]
    assert torch.equal(weights, original.to(torch.bfloat16).float())
    assert load_teacher(tmp_path / "teacher", num_frames=5, height=16, width=16).latent_shape == SHAPE
    stock = import_diffusers().WanPipeline.from_pretrained(tmp_path / "teacher")
    assert stock.scheduler.config.shift == 3.0
