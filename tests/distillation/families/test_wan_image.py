import json

import pytest
import torch
from PIL import Image

from distillation.errors import ConditionError, MissingPartError
from distillation.families import TeacherError, load_teacher
from distillation.families.export import save_teacher_pipeline
from distillation.families.wan_image import WanImageText, image_of

SIZE = {"num_frames": 5, "height": 16, "width": 16}
SHAPE = (16, 2, 2, 2)
ORIENTATION = 0x0112


def picture(seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (24, 20, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture(scope="module")
def folder(image_components, pipeline_folder):
    return pipeline_folder("WanImageToVideoPipeline", image_components)


@pytest.fixture(scope="module")
def animator(folder):
    return load_teacher(folder, **SIZE)


def test_the_condition_is_what_the_stock_pipeline_prepares(animator, folder, stock_pipeline):
    stock = stock_pipeline(folder, "WanImageToVideoPipeline")
    image = picture()
    pixels = stock.video_processor.preprocess(image, height=16, width=16)
    _, expected = stock.prepare_latents(pixels, 1, 16, 16, 16, 5, torch.float32, torch.device("cpu"))
    condition = animator.encode([{"prompt": "a digit", "image": image}])
    torch.testing.assert_close(condition.extra["image_latents"], expected, rtol=0, atol=1e-5)
    assert condition.extra["image_latents"][0, :4].sum(dim=(0, 2, 3)).tolist() == [16.0, 0.0]
    features = stock.encode_image(image)
    assert features.shape == (1, 5, 8)
    torch.testing.assert_close(condition.extra["image_embeds"], features, rtol=0, atol=1e-6)


def test_the_image_matters_by_both_ways(animator):
    x, t = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    one, other = (animator.encode([{"prompt": "a", "image": picture(seed)}]) for seed in (0, 1))
    with torch.no_grad():
        base = animator.denoiser(x, t, one).v
        for name in ("image_latents", "image_embeds"):
            mixed = type(one)(one.embeddings, {**one.extra, name: other.extra[name]})
            assert (animator.denoiser(x, t, mixed).v - base).abs().max() > 1e-4, name


def test_images_are_encoded_once_and_may_be_paths(animator, tmp_path, monkeypatch):
    image = picture(3)
    image.save(tmp_path / "first.png")
    text = animator.encode
    first = text([{"prompt": "a", "image": image}])
    monkeypatch.setattr(text, "_latents", None)
    again = text([{"prompt": "left", "image": str(tmp_path / "first.png")}, {"prompt": "", "image": image}])
    for name, tensor in first.extra.items():
        assert torch.equal(again.extra[name], tensor.expand(2, *tensor.shape[1:])), name


def test_no_more_images_are_kept_than_asked(image_components, animator):
    text = WanImageText(
        image_components["tokenizer"],
        image_components["text_encoder"],
        codec=animator.codec,
        latent_shape=SHAPE,
        image_cache_size=2,
    )
    for seed in range(4):
        text([{"prompt": "a", "image": picture(seed)}])
    assert len(text._images) == 2
    assert text([{"prompt": "a", "image": picture(0)}]).extra["image_latents"].shape == (1, 20, 2, 2, 2)


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("mode", ["P", "L", "RGBA", "turned"])
def test_an_image_is_read_in_rgb_and_upright(tmp_path, mode, path):
    if mode == "turned":
        stored, exif = picture(4), Image.Exif()
        exif[ORIENTATION] = 6  # the camera was held on its side: shown a quarter turn clockwise
        stored.save(tmp_path / "first.png", exif=exif)
        expected = stored.transpose(Image.Transpose.ROTATE_270)
    else:
        stored = picture(4).convert(mode)
        stored.save(tmp_path / "first.png")
        expected = stored.convert("RGB")
    image = image_of({"image": tmp_path / "first.png" if path else Image.open(tmp_path / "first.png")})
    assert (image.mode, image.size) == ("RGB", expected.size) and image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("prompt", ["a digit", {"prompt": "a digit"}, {"prompt": "a", "image": 3}])
def test_a_prompt_without_an_image_is_refused(animator, prompt):
    with pytest.raises(ConditionError, match="a PIL image or a path under 'image'"):
        animator.encode([prompt])


def test_an_image_that_cannot_be_opened_is_named(animator, tmp_path):
    with pytest.raises(ConditionError, match=r"missing.png of a prompt cannot be opened"):
        animator.encode([{"prompt": "a", "image": tmp_path / "missing.png"}])


def test_beside_image_features_a_text_has_512_tokens(image_components, animator):
    assert animator.encode.max_sequence_length == 512
    with pytest.raises(ConditionError, match="must be 512 beside image features; got 8"):
        WanImageText(
            image_components["tokenizer"],
            image_components["text_encoder"],
            codec=animator.codec,
            latent_shape=SHAPE,
            image_encoder=image_components["image_encoder"],
            max_sequence_length=8,
        )


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("model_index.json", {"expand_timesteps": True}, "has expand_timesteps, so its image replaces"),
        ("transformer/config.json", {"in_channels": 16}, "takes 16 channels; one for image to video takes 36"),
    ],
)
def test_other_ways_to_give_an_image_are_refused(folder, tmp_path, file, settings, message):
    for original in [folder / "model_index.json", *folder.glob("*/*config.json")]:
        target = tmp_path / original.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_text(original.read_text())
    changed = tmp_path / file
    changed.write_text(json.dumps({**json.loads(changed.read_text()), **settings}))
    with pytest.raises(TeacherError, match=message):
        load_teacher(tmp_path, **SIZE)


def test_a_teacher_is_not_written_from_bare_components(components, tmp_path):
    with pytest.raises(MissingPartError, match="a WanImageToVideoPipeline cannot be written from"):
        save_teacher_pipeline(
            tmp_path / "teacher", **components, latent_shape=SHAPE, pipeline_class="WanImageToVideoPipeline"
        )
    assert list(tmp_path.iterdir()) == []
