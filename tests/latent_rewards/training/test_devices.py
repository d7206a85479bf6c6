import pytest
import torch

from latent_rewards.training import devices
from latent_rewards.training.devices import DeviceError, choose_device, join_launch, moved
from latent_rewards.training.ranks import Ranks


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cuda(monkeypatch):
    """Two CUDA devices, of which the second is the current one; what is made current is written down."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1] if chosen else 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    return chosen


@pytest.mark.parametrize(("name", "index"), [("cuda:0", 0), ("cuda:1", 1), ("cuda", 1), (None, 1)])
def test_a_single_process_computes_where_it_is_told(cuda, name, index):
    assert choose_device(name) == torch.device("cuda", index)
    assert cuda == [index], "and kernels that take torch's current device run there too"


def test_the_cpu_is_the_cpu(cuda, monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert choose_device(None) == torch.device("cpu")
    assert choose_device("cuda:1") == torch.device("cuda:1"), "what is asked for by name wins"
    assert cuda == [1]


def test_mps_is_taken_by_name_only(monkeypatch):
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert choose_device("mps") == torch.device("mps")
    assert choose_device(None) == torch.device("cpu"), "fits of proxies need float64"


@pytest.mark.parametrize("name", ["cuda", None])
def test_each_process_of_a_launch_has_its_own(cuda, monkeypatch, name):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(name) == torch.device("cuda:1") and cuda == [1]


def test_a_launch_of_several_is_not_put_on_one_device(cuda, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="'cuda:1' names one device for a launch .* use 'cuda'"):
        choose_device("cuda:1")
    assert not cuda


@pytest.mark.parametrize("name", ["cuda:2", "mps", "xpu", "meta"])
def test_a_device_that_is_not_there_is_refused(cuda, name):
    with pytest.raises(DeviceError, match=f"'{name}' cannot be used: there .*'cpu'"):
        choose_device(name)
    assert not cuda


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(DeviceError, match=f"'{name}' is none; use 'cpu'"):
        choose_device(name)


def test_the_launch_is_joined_on_the_device(cuda, monkeypatch):
    joined = []
    monkeypatch.setattr(devices, "current_ranks", lambda *, cpu: joined.append(cpu) or Ranks(1, 2))
    assert join_launch("cuda") == (Ranks(1, 2), torch.device("cuda:1"))
    assert join_launch("cpu") == (Ranks(1, 2), torch.device("cpu"))
    assert joined == [False, True]


def test_what_is_moved_keeps_its_values_and_is_cast():
    x = torch.randn(2, 3)
    assert moved(x, "cpu") is x
    cast = moved(x, torch.device("cpu"), torch.float64)
    assert cast.dtype == torch.float64 and torch.equal(cast.float(), x)


def test_a_gpu_is_not_waited_for(monkeypatch):
    asked = []

    def to(tensor, device=None, **options):
        asked.append((str(device), options))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", to)
    moved(torch.zeros(2), "cuda:1")
    assert asked[:2] == ["pinned", ("cuda:1", {"non_blocking": True})]
