import copy
import json

import pytest
import torch

from distillation.condition import TextCondition
from distillation.denoiser import GaussianDenoiser
from distillation.errors import ConditionError, MissingPartError
from distillation.families import TeacherError, import_diffusers, load_teacher
from distillation.families.codec import CodecError
from distillation.families.cogvideox import CogVideoXCodec, CogVideoXDenoiser, schedule_of
from distillation.families.export import StudentError, load_student, save_teacher_pipeline
from distillation.schedule import RectifiedFlow, VariancePreserving
from distillation.student import FewStepStudent

SHAPE = (4, 3, 2, 2)


@pytest.fixture(scope="module")
def folder(cogvideox_components, pipeline_folder):
    return pipeline_folder("CogVideoXPipeline", cogvideox_components)


@pytest.fixture(scope="module")
def cogvideox(folder):
    return load_teacher(folder)


@pytest.fixture
def edited(folder, tmp_path):
    """Return a copy of the configurations, with settings of one changed; there are no weights to be read."""

    def edit(file: str, **settings):
        for original in [folder / "model_index.json", *folder.glob("*/*config.json")]:
            target = tmp_path / original.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            target.write_text(original.read_text())
        changed = tmp_path / file
        changed.write_text(json.dumps({**json.loads(changed.read_text()), **settings}))
        return tmp_path

    return edit


def test_the_size_is_what_the_transformer_was_made_for(cogvideox, folder):
    assert cogvideox.latent_shape == SHAPE
    assert load_teacher(folder, num_frames=17, height=32, width=16).latent_shape == (4, 5, 4, 2)


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"snr_shift_scale": 1.0},
        {"rescale_betas_zero_snr": False},
        {"beta_schedule": "linear", "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2", "snr_shift_scale": 2.0},
    ],
)
def test_the_schedule_is_the_stored_schedulers(tmp_path, name, settings, make_cogvideox_scheduler):
    scheduler = make_cogvideox_scheduler(name, **settings)
    scheduler.save_pretrained(tmp_path / "scheduler")
    schedule, native = schedule_of(tmp_path)
    assert native == "v"
    alpha, sigma = schedule(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize(("theirs", "ours"), [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")])
def test_the_prediction_type_is_the_stored_one(tmp_path, theirs, ours, make_cogvideox_scheduler):
    make_cogvideox_scheduler(prediction_type=theirs, rescale_betas_zero_snr=False).save_pretrained(
        tmp_path / "scheduler"
    )
    assert schedule_of(tmp_path)[1] == ours


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "epsilon"}, "rescale_betas_zero_snr with prediction_type 'epsilon'.*must predict v or x0"),
        ({"prediction_type": "flow"}, "prediction_type 'flow'; supported: sample, epsilon, v_prediction"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas; supported: linear, scaled_linear, squaredcos_cap_v2"),
        ({"_class_name": "DDPMScheduler"}, "'DDPMScheduler'; supported: CogVideoXDDIMScheduler, CogVideoXDPMScheduler"),
    ],
)
def test_schedulers_that_cannot_be_used_are_refused_before_weights_are_read(edited, settings, message):
    with pytest.raises(TeacherError, match=message):
        load_teacher(edited("scheduler/scheduler_config.json", **settings))


@pytest.mark.parametrize("settings", [{"patch_size_t": 2}, {"ofs_embed_dim": 512}])
def test_later_variants_are_refused(edited, settings):
    ((name, value),) = settings.items()
    with pytest.raises(TeacherError, match=f"{name} = {value}, so it is CogVideoX 1.5"):
        load_teacher(edited("transformer/config.json", **settings))


def test_five_frames_would_become_eight(cogvideox, folder):
    """The VAE has two latent frames for five, and makes eight of them: neither direction may be taken."""
    raw = cogvideox.codec.vae
    with torch.no_grad():
        assert raw.encode(torch.zeros(1, 3, 5, 16, 16)).latent_dist.mode().shape[2] == 2
        assert raw.decode(torch.zeros(1, 4, 2, 2, 2)).sample.shape[2] == 8
    with pytest.raises(CodecError, match=r"2 n \+ 1 latent frames without inventing any; got 2"):
        cogvideox.codec.decode(torch.zeros(1, 4, 2, 2, 2))
    with pytest.raises(CodecError, match=r"8 n \+ 1 frames .*got 5 frames"):
        cogvideox.codec.encode(torch.zeros(1, 5, 3, 16, 16))
    with pytest.raises(TeacherError, match=r"5 frames of 16 x 16 does not fit .* 8 n \+ 1 frames"):
        load_teacher(folder, num_frames=5, height=16, width=16)


def test_inverted_scaling_of_images_does_not_concern_videos(cogvideox_components, cogvideox):
    vae = copy.deepcopy(cogvideox_components["vae"])
    vae.register_to_config(invert_scale_latents=True)
    codec = CogVideoXCodec(vae)
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codec.decode(latents), cogvideox.codec.decode(latents))
    videos = cogvideox.codec.decode(latents)
    assert torch.equal(codec.encode(videos), cogvideox.codec.encode(videos))


def test_fingerprint_is_of_weights_and_scaling(cogvideox_components, cogvideox):
    fingerprint = cogvideox.codec.fingerprint
    assert fingerprint.startswith("cogvideox-vae-")
    assert CogVideoXCodec(copy.deepcopy(cogvideox_components["vae"]).to(torch.bfloat16)).fingerprint == fingerprint
    rescaled = copy.deepcopy(cogvideox_components["vae"])
    rescaled.register_to_config(scaling_factor=0.7)
    assert CogVideoXCodec(rescaled).fingerprint != fingerprint


def test_the_network_sees_the_index_of_the_noise_level(cogvideox_components):
    seen = []
    transformer = copy.deepcopy(cogvideox_components["transformer"])
    transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
    denoiser = CogVideoXDenoiser(transformer, VariancePreserving())
    denoiser(torch.zeros(2, *SHAPE), torch.tensor([1.0, 0.25]), TextCondition(torch.zeros(2, 8, 32)))
    denoiser(torch.zeros(2, *SHAPE), 0.0, TextCondition(torch.zeros(2, 8, 32)))
    assert [timestep.tolist() for timestep in seen] == [[999.0, 249.0], [0.0, 0.0]]


@pytest.mark.parametrize("native", ["eps", "x0"])
def test_other_networks_are_read_as_what_they_predict(cogvideox_components, native):
    transformer, schedule = cogvideox_components["transformer"], VariancePreserving("scaled_linear")
    x, condition = torch.ones(1, *SHAPE), TextCondition(torch.zeros(1, 8, 32))
    with torch.no_grad():
        raw = CogVideoXDenoiser(transformer, schedule)(x, 0.5, condition).v
        prediction = CogVideoXDenoiser(transformer, schedule, native=native)(x, 0.5, condition)
    assert prediction.native == native and torch.equal(getattr(prediction, native), raw)


def test_texts_of_another_length_are_refused_where_positions_are_built_in(cogvideox):
    with pytest.raises(ConditionError, match="5 tokens, and this transformer takes exactly 8"):
        cogvideox.denoiser(torch.zeros(1, *SHAPE), 0.5, TextCondition(torch.zeros(1, 5, 32)))


def test_a_teacher_written_by_this_library_is_read_again(cogvideox_components, tmp_path):
    components = {name: copy.deepcopy(part) for name, part in cogvideox_components.items()}
    save_teacher_pipeline(
        tmp_path / "teacher", **components, latent_shape=(4, 5, 4, 2), pipeline_class="CogVideoXPipeline"
    )
    loaded = load_teacher(tmp_path / "teacher")
    assert loaded.latent_shape == (4, 5, 4, 2)
    assert loaded.encode.max_sequence_length == 8
    assert loaded.denoiser.schedule == VariancePreserving("scaled_linear", zero_snr=True, snr_shift=3.0)
    weights = loaded.denoiser.transformer.state_dict()["proj_out.weight"]
    assert torch.equal(
        weights, cogvideox_components["transformer"].state_dict()["proj_out.weight"].to(torch.bfloat16).float()
    )
    with pytest.raises(TeacherError, match="'FluxPipeline' is not supported; choose one of CogVideoXPipeline"):
        save_teacher_pipeline(tmp_path / "flux", **components, latent_shape=SHAPE, pipeline_class="FluxPipeline")


def test_a_generator_reaches_all_the_noise_as_the_card_says(cogvideox, tmp_path):
    student = FewStepStudent(
        cogvideox.denoiser, latent_shape=SHAPE, encode=cogvideox.encode, exporter=cogvideox.exporter
    )
    student.save_pretrained(tmp_path / "student")
    stock = import_diffusers().CogVideoXPipeline.from_pretrained(tmp_path / "student")
    expected = stock(
        ["a digit"],
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=8,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).frames
    generator = torch.Generator().manual_seed(5)
    drawn = torch.stack([torch.randn(1, 3, 4, 2, 2, generator=generator).transpose(1, 2) for _ in range(4)])
    with torch.no_grad():
        sampled = student.sample(student.encode(["a digit"]), drawn, 4)
    torch.testing.assert_close(sampled.transpose(1, 2), expected, rtol=0, atol=1e-5)
    assert "`generator=`, which draws" in (tmp_path / "student" / "README.md").read_text()


def test_what_is_no_denoiser_of_the_family_is_not_exported(cogvideox, tmp_path):
    for denoiser in (
        GaussianDenoiser(0.0, 1.0, VariancePreserving()),
        CogVideoXDenoiser(cogvideox.denoiser.transformer, RectifiedFlow()),
    ):
        student = FewStepStudent(denoiser, exporter=cogvideox.exporter, latent_shape=SHAPE)
        with pytest.raises(MissingPartError, match=f"a {type(denoiser).__name__} cannot be written"):
            student.save_pretrained(tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_contradicts_itself_is_refused(cogvideox, tmp_path):
    student = FewStepStudent(
        cogvideox.denoiser, {1: [1.0]}, latent_shape=SHAPE, encode=cogvideox.encode, exporter=cogvideox.exporter
    )
    student.save_pretrained(tmp_path / "student")
    file = tmp_path / "student" / "latent_rewards.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "family": "wan"}))
    with pytest.raises(StudentError, match="of the family 'wan' in a pipeline of the family 'cogvideox'"):
        load_student(tmp_path / "student")
