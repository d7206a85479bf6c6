"""Digests change with what they are made of and with nothing else, in this process and in the next."""

import functools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latent_rewards.digests import source_digest, value_digest


def above(threshold):
    def score(videos):
        return (videos > threshold).float().mean(dim=(1, 2, 3, 4))

    return score


def power(videos, exponent=1):
    return videos.mean(dim=(1, 2, 3, 4)) ** exponent


def other(videos, exponent=1):
    return exponent * videos.mean(dim=(1, 2, 3, 4))


class Bright:
    def __init__(self, threshold):
        self.threshold, self.lock = threshold, threading.Lock()

    def __call__(self, videos):
        return above(self.threshold)(videos)

    def score(self, videos):
        return self(videos)


def weighed(value):
    layer = nn.Linear(2, 1)
    nn.init.constant_(layer.weight, value)
    nn.init.zeros_(layer.bias)
    return layer


SAME = {
    "closure": lambda value: above(value),
    "of a function": lambda value: above(above(value)),
    "partial": lambda value: functools.partial(power, exponent=value),
    "object": Bright,
    "of an object": lambda value: above(Bright(value)),
    "method": lambda value: Bright(value).score,
    "network": weighed,
    "of a network": lambda value: above({"layers": [weighed(value)]}),
    "of a tensor": lambda value: above(torch.tensor([value, 1.0])),
    "of an array": lambda value: above(np.array([value, 1.0])),
}


@pytest.mark.parametrize("made", SAME.values(), ids=SAME)
def test_what_a_callable_holds_is_in_its_digest(made):
    assert source_digest(made(0.25)) == source_digest(made(0.25)) != source_digest(made(0.5))


def test_a_function_that_holds_nothing_is_its_source():
    assert source_digest(power).startswith("source-") and source_digest(power).count("-") == 1
    assert source_digest(power) != source_digest(other)
    assert source_digest(functools.partial(power, exponent=2)) != source_digest(functools.partial(other, exponent=2))
    nested = [functools.partial(above(made), exponent=2) for made in (power, other)]
    assert source_digest(nested[0]) != source_digest(nested[1])
    assert source_digest(len) == "0"


def test_values_differ_by_type_order_and_content():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    values = [0, 0.0, "0", False, None, [0, 1], [1, 0], (0, 1), {0: 1}, {1: 0}, {0, 1}, b"0", 1j, image]
    values += [image.rotate(180), torch.zeros(()), torch.zeros(1), torch.zeros((), dtype=torch.bfloat16), np.zeros(2)]
    assert len({value_digest(value) for value in values}) == len(values)
    assert value_digest({"a": 1, "b": 2}) == value_digest({"b": 2, "a": 1})
    assert value_digest(object()) == value_digest(object()), "an address is no content"


def test_what_holds_itself_has_a_digest():
    endless = Bright(0.5)
    endless.own = [endless]
    assert source_digest(endless) == source_digest(endless)


def test_another_process_finds_the_same_digests():
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('digested', sys.argv[1]); "
        "sys.modules['digested'] = module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "print([module.source_digest(made(0.25)) for made in module.SAME.values()])"
    )
    told = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str([source_digest(made(0.25)) for made in SAME.values()])
