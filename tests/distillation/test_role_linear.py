"""A base's linear layer gives what peft's does, gradients included, for inputs of any number of dimensions."""

import copy

import pytest
import torch
from torch import nn

from distillation.role_linear import RoleLinear  # isort: skip - before peft, which may need torchvision mended
from peft import LoraConfig, inject_adapter_in_model


def layers(dtype):
    """Return peft's layer and ours, with the same base and the same adapter, which is not zero."""
    torch.manual_seed(0)
    base, made = nn.Sequential(nn.Linear(6, 5)).to(dtype).requires_grad_(False), []
    for own in (False, True):
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
        if own:
            config._register_custom_module({nn.Linear: RoleLinear})
        network = copy.deepcopy(base)
        inject_adapter_in_model(config, network, "student")
        made.append(network[0])
    for name in ("lora_A", "lora_B"):
        weight = torch.randn(getattr(made[0], name)["student"].weight.shape)
        for layer in made:
            getattr(layer, name)["student"].weight.data = weight.to(dtype)
    return made


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 2, 3, 6), (0, 6)])
def test_values_and_gradients_are_pefts(shape):
    theirs, ours = layers(torch.float64)
    assert type(ours) is RoleLinear and type(theirs) is not RoleLinear
    given, upstream = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 5, dtype=torch.float64)
    told = []
    for layer in (theirs, ours):
        x = given.clone().requires_grad_()
        y = layer(x)
        (y * upstream).sum().backward()
        told.append([y.detach(), x.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert len(told[1]) == 5
    for expected, got in zip(*told, strict=True):
        torch.testing.assert_close(got, expected)
    assert shape[0] == 0 or not torch.allclose(told[1][0], ours.base_layer(given))


def test_off_it_is_the_base_and_merged_it_stays_what_it_was():
    _, ours = layers(torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    adapted, plain = ours(x), ours.base_layer(x)
    ours._disable_adapters = True
    assert torch.equal(ours(x), plain)
    ours._disable_adapters = False
    ours.merge()
    torch.testing.assert_close(ours(x), adapted)


def test_a_base_in_bf16_keeps_its_precision_beside_adapters_in_float32():
    theirs, ours = layers(torch.float32)
    for layer in (theirs, ours):
        layer.base_layer.to(torch.bfloat16)
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    assert ours(x).dtype == theirs(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.05, atol=0.05)
