import copy
import json
import shutil

import pytest
import torch

from distillation.condition import TextCondition
from distillation.denoiser import guided
from distillation.errors import ConditionError
from distillation.families import TeacherError, load_teacher
from distillation.families.codec import CodecError
from distillation.families.wan import WanCodec, WanDenoiser, WanText
from distillation.sampler import sample_teacher
from distillation.schedule import RectifiedFlow

PROMPTS = ["a digit moves left", "two digits rest"]
SHAPE = (16, 2, 2, 2)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_text_equals_the_stock_encoding(teacher, stock):
    prompts = [*PROMPTS, "  a &amp;amp;  digit\n moves ", "", "left " * 20]
    expected = stock._get_t5_prompt_embeds(prompts, max_sequence_length=8)
    actual = teacher.encode([prompts[0], {"prompt": prompts[1], "seed": 3}, *prompts[2:]])
    assert actual.embeddings.shape == (5, 8, 32)
    torch.testing.assert_close(actual.embeddings, expected, rtol=0, atol=1e-6)
    assert bool((actual.embeddings[0, -1] == 0).all()), "padding is zero"


def test_text_is_cached_and_bounded(components, monkeypatch):
    text = WanText(components["tokenizer"], components["text_encoder"], cache_size=2)
    first = text(["a", "left", "a"])
    assert torch.equal(first.embeddings[0], first.embeddings[2])
    encoded = []
    encode = text._encode
    monkeypatch.setattr(text, "_encode", lambda texts: encoded.append(texts) or encode(texts))
    assert torch.equal(text(["left", "a"]).embeddings, first.embeddings[[1, 0]])
    assert encoded == []
    text(["right"])
    text(["a", "left"])
    assert encoded == [["right"], ["left"]], "the least recently used prompt was dropped"
    assert len(text._cache) == 2


def test_cached_embeddings_cannot_be_changed_from_outside(components):
    text = WanText(components["tokenizer"], components["text_encoder"])
    before = text(["a"]).embeddings.clone()
    text(["a"]).embeddings.zero_()
    assert torch.equal(text(["a"]).embeddings, before)


def test_text_length_is_at_most_the_tokenizers(components):
    assert WanText(components["tokenizer"], components["text_encoder"]).max_sequence_length == 8
    longer = WanText(components["tokenizer"], components["text_encoder"], max_sequence_length=11)
    assert longer(["a"]).embeddings.shape == (1, 11, 32)


@pytest.mark.parametrize("prompts", [[], "a digit", [3], [{"text": "a"}]])
def test_what_is_no_prompt_is_refused(teacher, prompts):
    with pytest.raises(ConditionError, match="prompt"):
        teacher.encode(prompts)


def test_one_step_equals_the_stock_pipeline(teacher, stock):
    """One guided Euler step of the pipeline from its own noise, and ours at the same noise level."""
    latents = noise(2, *SHAPE)
    stock.scheduler.set_timesteps(1)
    assert stock.scheduler.sigmas.tolist() == [1.0, 0.0]
    expected = run(stock, latents, num_inference_steps=1, guidance_scale=4.0)
    condition, negative = teacher.encode(PROMPTS), teacher.encode(["", ""])
    prediction = guided(teacher.denoiser, latents, torch.tensor(1.0), condition, negative, 4.0)
    torch.testing.assert_close(prediction.x0, expected, rtol=0, atol=1e-4)


def test_many_euler_steps_equal_the_stock_pipeline(teacher, stock):
    latents, steps = noise(2, *SHAPE), 12
    expected = run(stock, latents, num_inference_steps=steps, guidance_scale=4.0)
    condition, negative = teacher.encode(PROMPTS), teacher.encode(["", ""])
    stock.scheduler.set_timesteps(steps)
    sigmas = stock.scheduler.sigmas.tolist()
    x = latents
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        t = torch.tensor(teacher.denoiser.schedule.time_of(sigma), dtype=torch.float64)
        with torch.no_grad():
            x = x + (following - sigma) * guided(teacher.denoiser, x, t, condition, negative, 4.0).v
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)


def test_the_teachers_sampler_equals_a_stock_scheduler_on_its_grid(teacher, stock, monkeypatch):
    from distillation.families.grids import build_scheduler, exportable

    grid = {10: [1 - i / 10 for i in range(10)]}
    monkeypatch.setattr(stock, "scheduler", build_scheduler(exportable(grid, eta=0, shift=3.0)[10]))
    latents = noise(2, *SHAPE)
    expected = run(stock, latents, num_inference_steps=10, guidance_scale=3.0)
    condition, negative = teacher.encode(PROMPTS), teacher.encode(["", ""])
    actual = sample_teacher(teacher.denoiser, condition, latents, num_steps=10, guidance_scale=3.0, negative=negative)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def run(pipeline, latents: torch.Tensor, **settings) -> torch.Tensor:
    return pipeline(
        PROMPTS,
        latents=latents,
        height=16,
        width=16,
        num_frames=5,
        max_sequence_length=8,
        output_type="latent",
        **settings,
    ).frames


def test_time_may_differ_between_samples(teacher):
    x, t = noise(2, *SHAPE), torch.tensor([0.9, 0.2])
    condition = teacher.encode(PROMPTS)
    with torch.no_grad():
        together = teacher.denoiser(x, t, condition).x0
        for row in range(2):
            index = torch.tensor([row])
            alone = teacher.denoiser(x[index], t[row], condition.index_select(index)).x0
            torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-5)


def test_the_network_sees_1000_sigma(components):
    seen = []
    transformer = copy.deepcopy(components["transformer"])
    transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
    condition = TextCondition(torch.zeros(2, 3, 32))
    WanDenoiser(transformer, RectifiedFlow(3.0))(noise(2, *SHAPE), torch.tensor(0.75), condition)
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == [900.0, 900.0]


def test_half_precision_network_has_float32_around_it(components):
    transformer = copy.deepcopy(components["transformer"]).to(torch.bfloat16)
    prediction = WanDenoiser(transformer, RectifiedFlow())(
        noise(1, *SHAPE), torch.tensor(0.5), TextCondition(torch.zeros(1, 3, 32))
    )
    assert prediction.v.dtype == prediction.x0.dtype == torch.float32


@pytest.mark.parametrize("condition", [None, TextCondition(torch.zeros(1, 3, 32))])
def test_a_condition_of_the_latents_length_is_needed(teacher, condition):
    with pytest.raises(ConditionError, match="2 latents came with"):
        teacher.denoiser(noise(2, *SHAPE), torch.tensor(0.5), condition)


def test_decoding_equals_the_stock_pipeline(teacher, stock):
    latents = noise(3, *SHAPE)
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0}
    expected = stock(
        [*PROMPTS, "a"],
        latents=latents,
        height=16,
        width=16,
        num_frames=5,
        max_sequence_length=8,
        output_type="pt",
        **settings,
    ).frames
    final = teacher.denoiser(latents, torch.tensor(1.0), teacher.encode([*PROMPTS, "a"])).x0
    videos = teacher.codec.decode(final)
    assert videos.shape == (3, 5, 3, 16, 16) and videos.dtype == torch.float32
    assert 0 <= videos.min() and videos.max() <= 1
    torch.testing.assert_close(videos, expected, rtol=0, atol=1e-5)


def test_encoding_is_the_scaled_mode_and_chunks_do_not_matter(teacher, stock):
    videos = torch.rand(3, 5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mode = stock.vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist.mode()
    mean = torch.tensor(stock.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(stock.vae.config.latents_std).view(1, -1, 1, 1, 1)
    latents = teacher.codec.encode(videos)
    assert latents.shape == (3, *SHAPE)
    torch.testing.assert_close(latents, (mode - mean) / std, rtol=0, atol=1e-5)
    one_by_one = WanCodec(copy.deepcopy(stock.vae), chunk_size=1)
    torch.testing.assert_close(one_by_one.encode(videos), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(one_by_one.decode(latents), teacher.codec.decode(latents), rtol=0, atol=1e-5)


def test_a_failed_call_leaves_nothing_behind(teacher):
    """The VAE keeps features of earlier frames while it decodes; the next video must not see them."""
    latents = noise(1, *SHAPE)
    expected = teacher.codec.decode(latents)
    hook = teacher.codec.vae.decoder.conv_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher.codec.decode(noise(1, *SHAPE, seed=5))
    hook.remove()
    assert torch.equal(teacher.codec.decode(latents), expected)


def test_decoding_is_differentiable_in_the_latents_only(teacher):
    latents = noise(1, *SHAPE).requires_grad_()
    teacher.codec.decode(latents).mean().backward()
    assert latents.grad is not None and bool(latents.grad.abs().sum() > 0)
    assert all(weight.grad is None for weight in teacher.codec.vae.parameters())


def test_fingerprint_is_of_weights_and_scaling(stock, teacher):
    fingerprint = teacher.codec.fingerprint
    assert fingerprint.startswith("wan-vae-")
    assert WanCodec(copy.deepcopy(stock.vae)).fingerprint == fingerprint
    assert WanCodec(copy.deepcopy(stock.vae).to(torch.bfloat16)).fingerprint == fingerprint
    other = copy.deepcopy(stock.vae)
    next(other.parameters()).data.mul_(1.1)
    assert WanCodec(other).fingerprint != fingerprint
    rescaled = copy.deepcopy(stock.vae)
    rescaled.register_to_config(latents_std=[2.0] * 16)
    assert WanCodec(rescaled).fingerprint != fingerprint


@pytest.mark.parametrize("shape", [(1, 4, 3, 16, 16), (1, 5, 3, 20, 16), (1, 5, 1, 16, 16), (5, 3, 16, 16)])
def test_videos_the_vae_would_cut_are_refused(teacher, shape):
    with pytest.raises(CodecError, match=r"got \d frames|got \["):
        teacher.codec.encode(torch.rand(shape))


def test_latents_of_other_channels_are_refused(teacher):
    with pytest.raises(CodecError, match=r"\[B, 16, F, H, W\].*got \[1, 4, 2, 2, 2\]"):
        teacher.codec.decode(torch.zeros(1, 4, 2, 2, 2))
    with pytest.raises(CodecError, match="chunk_size"):
        WanCodec(teacher.codec.vae, chunk_size=0)


def test_teacher_states_what_it_is(teacher, wan_folder):
    assert teacher.latent_shape == SHAPE
    assert (teacher.family, teacher.pipeline_path) == ("wan", wan_folder)
    assert teacher.denoiser.schedule == RectifiedFlow(3.0)
    assert not any(weight.requires_grad for weight in teacher.denoiser.parameters())


def test_dtype_leaves_the_codec_in_float32(wan_folder):
    loaded = load_teacher(wan_folder, dtype=torch.bfloat16, num_frames=9, height=32, width=48)
    assert loaded.latent_shape == (16, 3, 4, 6)
    assert loaded.denoiser.transformer.dtype == torch.bfloat16
    assert loaded.exporter.encode.text_encoder.dtype == torch.bfloat16
    assert loaded.codec.vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({}, "pass num_frames=, height= and width="),
        ({"num_frames": 5}, "go together; got 5, None and None"),
        ({"num_frames": 6, "height": 16, "width": 16}, "6 frames of 16 x 16 does not fit"),
        ({"num_frames": 5, "height": 24, "width": 16}, "multiples of 16"),
    ],
)
def test_sizes_are_checked_before_loading(wan_folder, size, message, monkeypatch):
    monkeypatch.setattr("distillation.families.wan.load", None)
    with pytest.raises(TeacherError, match=message):
        load_teacher(wan_folder, **size)


def test_folders_that_are_no_teacher(tmp_path, wan_folder):
    with pytest.raises(TeacherError, match=r"has no model_index.json \(it holds nothing\).*WanPipeline"):
        load_teacher(tmp_path)
    with pytest.raises(TeacherError, match="neither a folder nor a hub id"):
        load_teacher(tmp_path / "missing")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(TeacherError, match="'FluxPipeline'; supported: WanPipeline"):
        load_teacher(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(TeacherError, match="not valid JSON"):
        load_teacher(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(TeacherError, match="transformer/config.json cannot be read"):
        load_teacher(tmp_path)
    with pytest.raises(TeacherError, match="no local folder, and the hub did not give"):
        load_teacher("no-such-owner/no-such-model")


def test_two_expert_pipelines_are_refused(tmp_path, wan_folder):
    folder = tmp_path / "two"
    shutil.copytree(wan_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.875}))
    with pytest.raises(TeacherError, match="boundary_ratio = 0.875"):
        load_teacher(folder, num_frames=5, height=16, width=16)


def test_missing_weights_are_named(tmp_path, wan_folder):
    folder = tmp_path / "incomplete"
    shutil.copytree(wan_folder, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(TeacherError, match="diffusion_pytorch_model.safetensors.*must be safetensors"):
        load_teacher(folder, num_frames=5, height=16, width=16)
