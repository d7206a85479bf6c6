import pytest
import torch
from accelerate.utils import LoggerType

from latent_rewards.training import acceleration
from latent_rewards.training.acceleration import TrackerError, make_accelerator

CPU = torch.device("cpu")


@pytest.mark.parametrize(("tracker", "package"), [("wandb", "wandb"), ("comet_ml", "comet-ml")])
def test_a_tracker_that_is_not_installed_is_named_with_its_package(monkeypatch, tracker, package):
    monkeypatch.setattr(acceleration, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(TrackerError, match=f"log_with='{tracker}' .* not installed: pip install {package},"):
        make_accelerator(CPU, alone=True, log_with=tracker)


@pytest.mark.parametrize("tracker", ["tensorboard", "all", None])
def test_a_tracker_that_is_installed_is_not(monkeypatch, tmp_path, tracker):
    monkeypatch.setattr(acceleration, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    assert make_accelerator(CPU, alone=True, log_with=tracker, project_dir=str(tmp_path)).device == CPU
