"""HPS v2.1 and PickScore give what their originals gave, and refuse to start without weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_rewards.contracts import DataError
from latent_rewards.metrics import check_metric, create_metric, list_metrics, towers
from latent_rewards.metrics.preference import HPS_V2_1, PICKSCORE_V1, rename_from_transformers
from latent_rewards.metrics.towers import import_open_clip
from latent_rewards.metrics.weights import VARIABLE

GOLDEN = json.loads((Path(__file__).parent / "golden" / "clip_family.json").read_text())
PROMPTS = [GOLDEN["prompts"][index] for index in GOLDEN["score_prompts"]]
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def transformers_model(image_size: int = 224, patch_size: int = 32) -> torch.nn.Module:
    """The same architecture as SMALL in transformers."""
    import_open_clip()
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared = {**sizes, "hidden_act": "gelu", "projection_dim": 32}
    config = CLIPConfig(
        projection_dim=32,
        text_config=shared,
        vision_config={**shared, "image_size": image_size, "patch_size": patch_size},
    )
    # The original's text ends at the highest token, which is what transformers does for this number.
    config.text_config.eos_token_id = 2
    return CLIPModel(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, formula_weights: Callable) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_file(formula_weights(import_open_clip().CLIP(**SMALL).state_dict()), folder / HPS_V2_1.name)
    published = formula_weights(transformers_model().state_dict())
    # Files of transformers' older versions hold these counters.
    published["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    published["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    save_file(published, folder / PICKSCORE_V1.name)
    return folder


@pytest.fixture(scope="module")
def clips(formula_frames: Callable) -> Tensor:
    return formula_frames(4, 250, 334).unflatten(0, (2, 2)) / 255


@pytest.mark.parametrize(
    ("name", "options", "golden"),
    [
        ("preference.hps", {}, "preference.hps"),
        ("preference.hps", {"antialias": False}, "preference.hps plain"),
        ("preference.pickscore", {}, "preference.pickscore"),
    ],
)
def test_scores_equal_the_originals(folder: Path, clips: Tensor, name: str, options: dict, golden: str) -> None:
    frames = torch.tensor(GOLDEN["scores"][golden])
    metric = create_metric(name, weights=folder, model=SMALL, **options)
    singles = metric(clips.reshape(4, 1, 3, 250, 334), [prompt for prompt in PROMPTS for _ in range(2)])
    torch.testing.assert_close(singles, frames, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(metric(clips, PROMPTS), frames.view(2, 2).mean(dim=1), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", ["preference.hps", "preference.pickscore"])
def test_prompts_become_the_original_tokens(folder: Path, name: str) -> None:
    tower = create_metric(name, weights=folder, model=SMALL).score.tower
    rows = tower.tokenizer(GOLDEN["prompts"])
    assert rows.shape[1] == 77
    wanted = GOLDEN["tokens"][name.removeprefix("preference.")]
    assert [row[: row.argmax() + 1].tolist() for row in rows] == wanted
    assert max(map(len, wanted)) == 77


def test_hps_equals_open_clip_itself(folder: Path, clips: Tensor) -> None:
    open_clip = import_open_clip()
    from torchvision.transforms.functional import center_crop, normalize, resize

    model = open_clip.CLIP(**SMALL).eval()
    model.load_state_dict(load_file(folder / HPS_V2_1.name))
    frames = resize(clips.flatten(0, 1), 224, open_clip.transform.InterpolationMode.BICUBIC, antialias=True)
    frames = normalize(center_crop(frames, 224), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    with torch.no_grad():
        images, texts, _ = model(frames, open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
    wanted = (images.unflatten(0, (2, 2)) @ texts[:, :, None]).flatten(1).mean(dim=1)
    values = create_metric("preference.hps", weights=folder, model=SMALL)(clips, PROMPTS)
    torch.testing.assert_close(values, wanted, atol=2e-6, rtol=0)


def test_pickscore_equals_transformers_itself(folder: Path, clips: Tensor) -> None:
    open_clip = import_open_clip()
    model = transformers_model()
    model.load_state_dict(load_file(folder / PICKSCORE_V1.name), strict=False)
    prepare = open_clip.image_transform(224, is_train=False)
    # Resized to 224 x 298, an even margin, on which torchvision and transformers agree.
    clips = clips[..., :333]
    frames = (255 * clips.flatten(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = torch.stack([prepare(Image.fromarray(frame)) for frame in frames])
    plain = ["a red ball", "a storm over the sea"]
    with torch.no_grad():
        logits = model(open_clip.get_tokenizer("ViT-H-14")(plain), pixels).logits_per_text
    wanted = torch.stack([logits[0, :2].mean(), logits[1, 2:].mean()])
    values = create_metric("preference.pickscore", weights=folder, model=SMALL)(clips, plain)
    torch.testing.assert_close(values, wanted, atol=1e-5, rtol=1e-6)


def test_renaming_loses_and_invents_nothing() -> None:
    named = transformers_model().state_dict()
    wanted = import_open_clip().CLIP(**SMALL).state_dict()
    renamed = rename_from_transformers(named)
    assert {name: value.shape for name, value in renamed.items()} == {name: v.shape for name, v in wanted.items()}
    left = {**named, "surprise": torch.zeros(1)}
    lost = "text_model.encoder.layers.1.self_attn.q_proj.bias"
    del left[lost]
    partly = rename_from_transformers(left)
    assert "surprise" in partly and "transformer.resblocks.1.attn.in_proj_bias" not in partly
    assert "transformer.resblocks.1.attn.k_proj.bias" in partly


@pytest.fixture
def tiny(tmp_path: Path) -> dict:
    """Options of a model for frames of 32 pixels."""
    torch.manual_seed(0)
    config = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": 32, "patch_size": 16}}
    save_file(import_open_clip().CLIP(**config).state_dict(), tmp_path / HPS_V2_1.name)
    save_file(transformers_model(32, 16).state_dict(), tmp_path / PICKSCORE_V1.name)
    return {"weights": tmp_path, "model": config, "frames_per_batch": 7}


@pytest.mark.parametrize("name", ["preference.hps", "preference.pickscore"])
def test_they_keep_their_promises(name: str, tiny: dict) -> None:
    metric = create_metric(name, **tiny)
    check_metric(metric)
    assert metric.differentiable and metric.deterministic and metric.needs_prompt and metric.licence
    grey = torch.rand(1, 2, 1, 20, 20)
    assert metric(grey, ["a"]).shape == (1,)


@pytest.mark.parametrize(("name", "file"), [("preference.hps", HPS_V2_1), ("preference.pickscore", PICKSCORE_V1)])
def test_without_weights_the_wanted_file_is_named_before_a_model_is_built(
    name: str, file: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden() -> None:
        raise AssertionError("open_clip was imported")

    assert name in list_metrics()
    monkeypatch.setattr(towers, "import_open_clip", forbidden)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match=rf"{file.name} does not exist. Wanted:.*MB, {file.licence}\).*{file.source}"):
        create_metric(name)


def test_a_file_of_another_layout_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"PickScore_v1.safetensors does not fit CLIP: a file without visual.trans"):
        deeper = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "layers": 3}}
        create_metric("preference.pickscore", weights=folder, model=deeper)
    with pytest.raises(DataError, match=r"does not fit CLIP: a file without .*; with text_model"):
        create_metric("preference.hps", weights=folder / PICKSCORE_V1.name, model=SMALL)
