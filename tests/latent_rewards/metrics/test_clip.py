"""CLIPScore and the aesthetic predictor give what their originals gave, and refuse to start without weights."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_rewards.contracts import DataError
from latent_rewards.metrics import check_metric, create_metric, list_metrics, towers
from latent_rewards.metrics.clip import AESTHETIC_HEAD, VIT_B_32, VIT_L_14, Aesthetic, ClipScore
from latent_rewards.metrics.towers import import_open_clip, tower_config
from latent_rewards.metrics.weights import VARIABLE, file_sha256

GOLDEN = json.loads((Path(__file__).parent / "golden" / "clip_family.json").read_text())
PROMPTS = [GOLDEN["prompts"][index] for index in GOLDEN["score_prompts"]]
SMALL = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, formula_weights: Callable) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    weights = formula_weights(import_open_clip().CLIP(**SMALL).state_dict())
    for file in (VIT_B_32, VIT_L_14):
        save_file(weights, folder / file.name)
    save_file(formula_weights(nn.Linear(32, 1).state_dict()), folder / AESTHETIC_HEAD.name)
    return folder


@pytest.fixture(scope="module")
def clips(formula_frames: Callable) -> Tensor:
    return formula_frames(4, 250, 334).unflatten(0, (2, 2)) / 255


def direct(folder: Path, clips: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Image features of each frame and text features, by open_clip alone."""
    open_clip = import_open_clip()
    model = open_clip.CLIP(**SMALL).eval()
    model.load_state_dict(load_file(folder / VIT_B_32.name))
    prepare = open_clip.image_transform(224, is_train=False)
    frames = (255 * clips.flatten(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        images = model.encode_image(torch.stack([prepare(Image.fromarray(frame)) for frame in frames]), normalize=True)
        words = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts), normalize=True)
    return images.unflatten(0, clips.shape[:2]), words


def test_clipscore_equals_the_original(folder: Path, clips: Tensor) -> None:
    frames = torch.tensor(GOLDEN["scores"]["clip.score"])
    metric = create_metric("clip.score", weights=folder, model=SMALL)
    singles = metric(clips.reshape(4, 1, 3, 250, 334), [prompt for prompt in PROMPTS for _ in range(2)])
    torch.testing.assert_close(singles, frames, atol=2e-6, rtol=0)
    torch.testing.assert_close(metric(clips, PROMPTS), frames.view(2, 2).mean(dim=1), atol=2e-6, rtol=0)
    assert 0 in frames and frames.unique().numel() == 4


def test_aesthetic_equals_the_original(folder: Path, clips: Tensor) -> None:
    values = create_metric("clip.aesthetic", weights=folder, model=SMALL)(clips)
    torch.testing.assert_close(values, torch.tensor(GOLDEN["scores"]["clip.aesthetic"]), atol=1e-6, rtol=0)


def test_clipscore_equals_open_clip_itself(folder: Path, clips: Tensor) -> None:
    images, words = direct(folder, clips, ["A photo depicts " + prompt for prompt in PROMPTS])
    wanted = (2.5 * (images @ words[:, :, None]).squeeze(-1).clamp(min=0)).mean(dim=1)
    metric = create_metric("clip.score", weights=folder, model=SMALL)
    torch.testing.assert_close(metric(clips, PROMPTS), wanted, atol=2e-6, rtol=0)
    unprefixed = create_metric("clip.score", weights=folder, model=SMALL, prefix="")
    assert not torch.allclose(unprefixed(clips, PROMPTS), wanted, atol=1e-3)
    assert unprefixed.fingerprint != metric.fingerprint


def test_prompts_become_the_original_tokens(folder: Path) -> None:
    tower = create_metric("clip.score", weights=folder, model=SMALL).score.tower
    rows = tower.tokenizer(["A photo depicts " + prompt for prompt in GOLDEN["prompts"]])
    assert rows.shape[1] == 77
    assert [row[: row.argmax() + 1].tolist() for row in rows] == GOLDEN["tokens"]["clipscore"]
    assert max(map(len, GOLDEN["tokens"]["clipscore"])) == 77


@pytest.fixture
def tiny(tmp_path: Path) -> dict:
    """Options of a model for frames of 32 pixels."""
    config = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": 32, "patch_size": 16}}
    torch.manual_seed(0)
    for file in (VIT_B_32, VIT_L_14):
        save_file(import_open_clip().CLIP(**config).state_dict(), tmp_path / file.name)
    save_file(nn.Linear(32, 1).state_dict(), tmp_path / AESTHETIC_HEAD.name)
    return {"weights": tmp_path, "model": config, "frames_per_batch": 7}


@pytest.mark.parametrize("name", ["clip.score", "clip.aesthetic"])
def test_they_keep_their_promises(name: str, tiny: dict) -> None:
    metric = create_metric(name, **tiny)
    check_metric(metric)
    assert metric.differentiable and metric.deterministic and metric.licence
    assert metric.needs_prompt == (name == "clip.score")
    grey = torch.rand(1, 2, 1, 20, 20)
    assert metric(grey, ["a"]).shape == (1,)


@pytest.mark.parametrize(
    ("name", "file"), [("clip.score", VIT_B_32), ("clip.aesthetic", VIT_L_14), ("clip.aesthetic", AESTHETIC_HEAD)]
)
def test_without_weights_the_wanted_file_is_named_before_a_model_is_built(
    name: str, file: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden() -> None:
        raise AssertionError("open_clip was imported")

    assert name in list_metrics()
    monkeypatch.setattr(towers, "import_open_clip", forbidden)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    if file is AESTHETIC_HEAD:
        save_file({"any": torch.zeros(1)}, tmp_path / VIT_L_14.name)
    with pytest.raises(DataError, match=rf"{file.name} does not exist. Wanted:.*MB, MIT.*{file.source}.*{VARIABLE}"):
        create_metric(name)


def test_a_file_of_another_model_is_refused(folder: Path) -> None:
    deeper = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "layers": 3}}
    with pytest.raises(DataError, match=r"ViT-B-32-openai.safetensors does not fit CLIP: a file without visual.trans"):
        create_metric("clip.score", weights=folder, model=deeper)
    narrow = load_file(folder / VIT_L_14.name)
    for name in ("visual.proj", "text_projection"):
        narrow[name] = narrow[name][:, :16].clone()
    save_file(narrow, folder / "narrow.safetensors")
    with pytest.raises(
        DataError, match=r"linear.safetensors does not fit Linear: .*weight is \[1, 32\], not \[1, 16\]"
    ):
        create_metric("clip.aesthetic", weights=folder / "narrow.safetensors", model={**SMALL, "embed_dim": 16})
    with pytest.raises(DataError, match="has sha256"):
        create_metric("clip.score", weights=folder, model=SMALL, sha256="00000000")


def test_the_fingerprint_follows_the_weights_and_not_their_place(tiny: dict, tmp_path: Path) -> None:
    first = create_metric("clip.score", **tiny)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((tmp_path / VIT_B_32.name).read_bytes())
    assert create_metric("clip.score", **{**tiny, "weights": moved}).fingerprint == first.fingerprint
    weights = load_file(moved)
    weights["ln_final.bias"] += 1
    save_file(weights, moved)
    assert create_metric("clip.score", **{**tiny, "weights": moved}).fingerprint != first.fingerprint
    checked = create_metric("clip.score", **{**tiny, "weights": moved, "sha256": file_sha256(moved)[:12]})
    assert checked.options["sha256"]


def test_the_default_architectures_are_those_of_openais_weights() -> None:
    for made, width in ((ClipScore, 512), (Aesthetic, 768)):
        config = tower_config(inspect.signature(made).parameters["model"].default)
        assert config["quick_gelu"] is True
        assert (config["embed_dim"], config["vision_cfg"]["image_size"]) == (width, 224)
