import torch
from torch import nn

from latent_rewards.training.precision import widened, widened_to_train


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow = nn.Linear(2, 3).to(torch.bfloat16)
        self.sixteen = nn.Parameter(torch.ones(2, dtype=torch.float16))
        self.wide = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("table", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("index", torch.ones(2, dtype=torch.int16))


def dtypes(module):
    return {name: value.dtype for name, value in module.state_dict().items()}


def test_sixteen_bits_become_float32_of_the_same_values_and_the_same_parameters():
    module = Mixed()
    parameters, before = list(module.parameters()), {k: v.clone() for k, v in module.state_dict().items()}
    assert widened(module) is module
    names = ("narrow.weight", "narrow.bias", "sixteen", "table")
    assert dtypes(module) == {"wide": torch.float64, "index": torch.int16, **dict.fromkeys(names, torch.float32)}
    assert all(torch.equal(value, before[name].to(value.dtype)) for name, value in module.state_dict().items())
    assert all(now is then for now, then in zip(module.parameters(), parameters, strict=True))
    module.narrow(torch.ones(1, 2)).sum().backward()
    assert module.narrow.weight.grad.dtype == torch.float32


def test_a_frozen_base_under_what_is_trained_stays_narrow():
    module = Mixed().requires_grad_(False)
    module.wide.requires_grad_(True)
    before = dtypes(module)
    assert dtypes(widened_to_train(module)) == before
    module.sixteen.requires_grad_(True)
    assert torch.bfloat16 not in dtypes(widened_to_train(module)).values()
