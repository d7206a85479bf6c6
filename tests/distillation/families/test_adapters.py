import copy
import json

import pytest
import torch

from distillation.config import DistillationConfig
from distillation.errors import MissingPartError
from distillation.families import import_diffusers, load_teacher
from distillation.families.adapters import WEIGHTS, load_adapter
from distillation.families.export import FolderInUseError, StudentError, load_student
from distillation.families.grids import scheduler_folder
from distillation.roles import Role
from distillation.trainer import start_student
from latent_rewards.training.checkpoint import CheckpointError

TEXTS = ["a digit moves left", "two digits rest"]


def fresh(family):
    case = family.case
    return load_teacher(family.folder, num_frames=case.frames, height=case.height, width=case.width)


def adapted(family):
    """A student of a teacher of its own, away from it."""
    config = DistillationConfig(adapter_rank=2, guidance_scale=1.0)
    student = start_student(fresh(family), config, {1: [1.0], 2: [1.0, 0.5]})
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return student


def test_an_adapter_samples_the_same_in_stock_diffusers_and_loaded_again(family, tmp_path):
    student = adapted(family)
    student.save_pretrained(tmp_path / "adapter", merge_adapters=False)
    loaded = load_adapter(tmp_path / "adapter", fresh(family))
    assert isinstance(loaded.denoiser, Role)
    assert (loaded.grids, loaded.eta, loaded.latent_shape()) == (student.grids, 1.0, family.case.shape)
    diffusers = import_diffusers()
    stock = getattr(diffusers, family.case.pipeline_class).from_pretrained(family.folder)
    stock.set_progress_bar_config(disable=True)
    for file in sorted((tmp_path / "adapter").glob(f"*/{WEIGHTS}")):
        second = {"load_into_transformer_2": True} if file.parent.name == "transformer_2" else {}
        stock.load_lora_weights(file.parent, **second)
    folder = tmp_path / "adapter" / scheduler_folder(2)
    name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
    stock.scheduler = getattr(diffusers, name).from_pretrained(folder)
    torch.manual_seed(7)
    expected = family.case.run(stock, TEXTS, num_inference_steps=2, guidance_scale=1.0)
    torch.manual_seed(7)
    empty = family.case.stock_latents(torch.empty(2, *family.case.shape))
    drawn = torch.stack([family.case.stock_latents(torch.randn(empty.shape)) for _ in range(2)])
    with torch.no_grad():
        condition = loaded.encode(family.case.prompts(*TEXTS))
        sampled = loaded.sample(condition, drawn, 2)
        assert torch.equal(sampled, student.sample(condition, drawn, 2))
    torch.testing.assert_close(expected, sampled, rtol=0, atol=1e-5)


@pytest.fixture
def written(teacher, tmp_path):
    student = start_student(copy.deepcopy(teacher), DistillationConfig(adapter_rank=2))
    student.save_pretrained(tmp_path / "adapter", merge_adapters=False)
    return student, tmp_path / "adapter"


def test_an_adapter_is_small_and_says_what_it_belongs_to(written):
    student, folder = written
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 4 * sum(parameter.numel() for parameter in student.parameters()) + 40_000
    card = (folder / "README.md").read_text()
    assert "load_lora_weights" in card and "WanPipeline" in card and "num_inference_steps=4" in card


def test_on_other_weights_it_is_refused(written, teacher):
    _, folder = written
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        next(other.denoiser.parameters()).add_(1.0)
    with pytest.raises(StudentError, match="is an adapter on weights [0-9a-f]{32}, and the teacher of"):
        load_adapter(folder, other)


def test_what_is_no_adapter_is_named(written, teacher, tmp_path):
    student, folder = written
    with pytest.raises(StudentError, match="load_adapter"):
        load_student(folder)
    student.save_pretrained(tmp_path / "merged")
    with pytest.raises(StudentError, match="holds no adapter"):
        load_adapter(tmp_path / "merged", copy.deepcopy(teacher))
    with pytest.raises(MissingPartError, match="owns all its weights"):
        student.merged().save_pretrained(tmp_path / "none", merge_adapters=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FolderInUseError):
        student.save_pretrained(tmp_path / "full", merge_adapters=False)
    weights = folder / "transformer" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError):
        load_adapter(folder, copy.deepcopy(teacher))
