"""FastGen is driven as its trainer drives it, and stand-ins for absent packages leave no trace; with a tiny double."""

import importlib
import importlib.util
import sys

import pytest
import torch

from benchmarks import fastgen_peer
from benchmarks.fastgen_peer import DMD2, PeerError, import_fastgen, stand_ins
from benchmarks.roles import TINIEST

FILES = {
    "methods/__init__.py": """
import torch
class DMD2Model:
    def __init__(self, config):
        self.config, self.log = config, []
        self.net = config.net["_target_"]()
    def on_train_begin(self): self.log.append("begin")
    def init_optimizers(self): self.log.append("optimizers")
""",
    "networks/network.py": """
import torch
class Schedule:
    def rescale_t(self, t): return 1000 * t
    def convert_model_output(self, x_t, out, t, src_pred_type, target_pred_type):
        return out if target_pred_type == src_pred_type else x_t - t.view(-1, 1, 1, 1, 1) * out
class FastGenNetwork(torch.nn.Module):
    def __init__(self, net_pred_type, schedule_type):
        super().__init__()
        self.kinds, self.noise_scheduler = (net_pred_type, schedule_type), Schedule()
""",
    "callbacks/ema.py": """
import a_logger.of_words as words
class EMACallback:
    def __init__(self, beta, start_iter): self.beta = beta
    def on_model_init_end(self, model): words.info("made")
    def on_training_step_end(self, model, data, out, losses, iteration): model.log.append(("average", iteration))
""",
    "callbacks/grad_clip.py": """
class GradClipCallback:
    def on_optimizer_step_begin(self, model, iteration): model.log.append(("clip", iteration))
""",
    "trainer.py": """
import torch
class Trainer:
    def train_step(self, model_ddp, model, data, iteration, accumulation):
        assert model_ddp is model and self.config.trainer.grad_accum_rounds == 1 and not self.config.trainer.fsdp
        student = iteration % model.config.student_update_freq == 0
        model.log.append(("student" if student else "fake", iteration))
        self.callbacks.on_backward_begin(model, data, {}, {}, iteration=iteration, accum_iter=0)
        self.callbacks.on_optimizer_step_begin(model=model, iteration=iteration)
        return {"vsd_loss" if student else "fake_score_loss": torch.tensor(float(iteration))}, {}
""",
    "configs/opt.py": """
from omegaconf import DictConfig
BaseOptimizerConfig = DictConfig(content={"lr": 1.0, "fused": False}, flags={"allow_objects": True})
BaseSchedulerConfig = DictConfig(content={"warm_up_steps": [1000]})
""",
}


@pytest.fixture
def double(tmp_path, monkeypatch):
    """A package with FastGen's names, one of whose modules needs a package that is nowhere."""
    for name, text in FILES.items():
        path = tmp_path / "fastgen" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(fastgen_peer, "OPTIONAL", fastgen_peer.OPTIONAL | {"a_logger"})
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastgen"]:
        del sys.modules[name]


def peer(folder, **different):
    texts = TINIEST.texts(["a clip", ""]).embeddings
    settings = {"guidance_scale": 3.0, "fake_updates": 2, "checkpointed": False, "mixed_precision": "no"} | different
    return DMD2(
        folder,
        TINIEST.build,
        latent_shape=TINIEST.latents,
        condition=texts[:1],
        negative=texts[1:],
        device="cpu",
        **settings,
    )


def test_an_update_is_one_of_the_student_and_its_average_and_then_those_of_the_fake_score(double):
    dmd2 = peer(double)
    assert dmd2.update(0) == {"vsd_loss": 0.0, "fake_score_loss": 2.0}
    model = dmd2.model
    assert model.log == [
        "begin",
        "optimizers",
        ("student", 0),
        ("clip", 0),
        ("average", 0),
        ("fake", 1),
        ("clip", 1),
        ("fake", 2),
        ("clip", 2),
    ]
    assert dmd2.update(1)["vsd_loss"] == 3.0 and ("average", 3) in model.log and ("average", 4) not in model.log
    config = model.config
    assert config.guidance_scale == 3.0 and config.net_optimizer == {"lr": fastgen_peer.LEARNING_RATE, "fused": False}
    assert config.gan_loss_weight_gen == 0 and config.use_ema and config.net_scheduler["warm_up_steps"] == [0]
    assert dmd2.data["real"].shape == (1, *TINIEST.latents)
    assert not torch.equal(dmd2.data["condition"], dmd2.data["neg_condition"])


def test_precision_and_checkpointing_are_those_asked_for(double):
    plain, other = peer(double), peer(double, checkpointed=True, mixed_precision="bf16")
    assert [dmd2.model.config.precision_amp for dmd2 in (plain, other)] == [None, "bfloat16"]
    assert [dmd2.model.net.transformer.is_gradient_checkpointing for dmd2 in (plain, other)] == [False, True]


def test_its_network_is_the_transformer_itself_on_fastgens_schedule(double):
    net = peer(double).model.net
    assert net.kinds == ("flow", "rf")
    x_t, t = torch.randn(1, *TINIEST.latents, generator=torch.Generator().manual_seed(0)), torch.tensor([0.25]).double()
    text = TINIEST.texts(["a clip"]).embeddings
    with torch.no_grad():
        (flow,) = TINIEST.build()(x_t, torch.tensor([250.0]), text, return_dict=False)
        assert torch.equal(net(x_t, t, condition=text), flow)
        torch.testing.assert_close(net(x_t, t, condition=text, fwd_pred_type="x0"), x_t - 0.25 * flow.double())


def test_a_folder_without_it_and_one_that_needs_more_are_refused(double, tmp_path):
    with pytest.raises(PeerError, match="no checkout of FastGen"):
        import_fastgen(tmp_path / "nowhere")
    (double / "fastgen" / "trainer.py").write_text("import a_package_that_matters\n")
    with pytest.raises(PeerError, match="No module named 'a_package_that_matters'; install what it needs"):
        import_fastgen(double)
    assert str(double) not in sys.path


def test_stand_ins_do_nothing_and_are_gone_afterwards(monkeypatch):
    monkeypatch.setattr(fastgen_peer, "OPTIONAL", frozenset({"a_logger", "json"}))
    before = list(sys.meta_path)
    with stand_ins():
        words = importlib.import_module("a_logger.of_words")
        assert not words.logger.opt(depth=2).info("x") and not words.run
        assert not hasattr(words, "__file__") and importlib.import_module("json").dumps([1]) == "[1]"

        class Kept(words.Base):
            pass

        assert not Kept
    assert sys.meta_path == before and "a_logger" not in sys.modules and "json" in sys.modules
    assert importlib.util.find_spec("a_logger") is None
