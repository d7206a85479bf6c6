import copy
import json
import shutil

import pytest
import torch

from distillation.condition import TextCondition
from distillation.errors import ConditionError, DistillationConfigError
from distillation.families import TeacherError, load_teacher
from distillation.families.wan import WanCodec, WanDenoiser, WanText
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


def test_the_network_sees_1000_sigma(components):
    seen = []
    transformer = copy.deepcopy(components["transformer"])
    transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
    condition = TextCondition(torch.zeros(2, 3, 32))
    WanDenoiser(transformer, RectifiedFlow(3.0))(noise(2, *SHAPE), torch.tensor(0.75), condition)
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == [900.0, 900.0]


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
    with pytest.raises(TeacherError, match="'FluxPipeline'; supported: .*WanPipeline"):
        load_teacher(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(TeacherError, match="not valid JSON"):
        load_teacher(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(TeacherError, match="transformer/config.json cannot be read"):
        load_teacher(tmp_path)
    with pytest.raises(TeacherError, match="no local folder, and the hub did not give"):
        load_teacher("no-such-owner/no-such-model")


@pytest.mark.parametrize(
    "settings", [{"boundary_ratio": 0.875}, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}]
)
def test_half_a_pair_of_experts_is_refused(tmp_path, wan_folder, settings, monkeypatch):
    monkeypatch.setattr("distillation.families.wan.read_pipeline", None)
    folder = tmp_path / "two"
    shutil.copytree(wan_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **settings}))
    with pytest.raises(TeacherError, match=r"boundary_ratio = .* and transformer_2 = .*two experts need both"):
        load_teacher(folder, num_frames=5, height=16, width=16)


def test_the_expert_is_chosen_for_each_sample_by_its_noise_level(components):
    high, low = (copy.deepcopy(components["transformer"]) for _ in range(2))
    with torch.no_grad():
        for weight in low.parameters():
            weight.mul_(1.5)
    x, times = noise(4, *SHAPE), torch.tensor([0.2, 0.9, 0.875, 0.874])
    condition = TextCondition(noise(4, 3, 32, seed=1))
    both = WanDenoiser(high, RectifiedFlow(), transformer_2=low, boundary_ratio=0.875)
    with torch.no_grad():
        actual = both(x, times, condition).v
        by_high = WanDenoiser(high, RectifiedFlow())(x, times, condition).v
        by_low = WanDenoiser(low, RectifiedFlow())(x, times, condition).v
    assert bool(((by_high - by_low).abs().flatten(1).amax(dim=1) > 1e-2).all()), "the experts differ"
    expected = torch.stack([by_low[0], by_high[1], by_high[2], by_low[3]])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_experts_and_their_boundary_go_together(components):
    with pytest.raises(DistillationConfigError, match="go together; got no transformer_2 and boundary_ratio = 0.9"):
        WanDenoiser(components["transformer"], RectifiedFlow(), boundary_ratio=0.9)


def test_every_token_may_be_told_the_time(components):
    seen = []
    transformer = copy.deepcopy(components["transformer"])
    transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
    condition = TextCondition(torch.zeros(2, 3, 32))
    WanDenoiser(transformer, RectifiedFlow(), per_token=True)(
        noise(2, 16, 3, 4, 6), torch.tensor([0.5, 0.1]), condition
    )
    assert seen[0].shape == (2, 3 * 2 * 3)
    assert seen[0].amin(dim=1).tolist() == seen[0].amax(dim=1).tolist() == [500.0, pytest.approx(100.0)]
