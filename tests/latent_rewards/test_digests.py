"""Digests change with what they are made of and with nothing else, in this process and in the next."""

import functools
import importlib
import linecache
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latent_rewards import digests
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


PACKAGE = {
    "__init__.py": "",
    "helpers.py": (
        "SCALE = 2\n\ndef scaled(x):\n    return SCALE * x\n\nclass Base:\n    def scale(self, x):\n        return x\n"
    ),
    "metric.py": (
        "import torch\nfrom . import helpers\nfrom .helpers import Base\n\nlimit, LIMIT = 1, 1\n\n"
        "def cut(x):\n    return min(x, LIMIT)\n\n"
        "def score(videos):\n    return [cut(helpers.scaled(x)) for x in videos]\n\n"
        "class Score(Base):\n    def __call__(self, videos):\n        return self.score(videos)\n\n"
        "    @staticmethod\n    def score(videos):\n        return score(videos)\n\n"
        "def unused(x):\n    return score(x)\n"
    ),
}


@pytest.fixture
def digests_of(tmp_path, monkeypatch):
    """Return a function of edits that imports the package anew, edited, and digests its function, class and method."""
    monkeypatch.syspath_prepend(tmp_path)

    def digests(file="metric.py", old="", new=""):
        linecache.clearcache()
        for name in [name for name in sys.modules if name.partition(".")[0] == "edited"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        for name, text in PACKAGE.items():
            path = tmp_path / "edited" / name
            path.parent.mkdir(exist_ok=True)
            assert name != file or old in text
            path.write_text(text.replace(old, new) if name == file and old else text)
        for cached in tmp_path.rglob("*.pyc"):
            cached.unlink()
        module = importlib.import_module("edited.metric")
        return source_digest(module.score), source_digest(module.Score), source_digest(module.Score().scale)

    return digests


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (("metric.py", "min(x, LIMIT)", "max(x, LIMIT)"), (True, True, True)),
        (("metric.py", "LIMIT = 1, 1", "LIMIT = 1, 2"), (True, True, True)),
        (("metric.py", "limit, LIMIT = 1", "limit, LIMIT = 2"), (False, False, False)),
        (("metric.py", "def unused(x):", "def unused(x, y=1):"), (False, False, False)),
        (("helpers.py", "SCALE * x", "SCALE + x"), (True, True, True)),
        (("helpers.py", "SCALE = 2", "SCALE = 3"), (True, True, True)),
        (("helpers.py", "        return x", "        return -x"), (False, True, True)),
    ],
)
def test_what_a_metric_uses_of_its_package_is_in_its_digest(digests_of, edit, changed):
    before = digests_of()
    assert digests_of() == before
    assert tuple(one != other for one, other in zip(digests_of(*edit), before, strict=True)) == changed


def test_a_large_package_is_read_in_part_and_what_names_itself_in_a_circle_ends(digests_of, tmp_path, monkeypatch):
    digests_of()
    calls = (
        "".join(f"def f{i}(x):\n    return f{i + 1}(x)\n\n" for i in range(1500)) + "def f1500(x):\n    return f0(x)\n"
    )
    (tmp_path / "edited" / "long.py").write_text(calls)
    read = []
    monkeypatch.setattr(digests.inspect, "getsource", lambda target: read.append(target) or target.__name__)
    source_digest(importlib.import_module("edited.long").f0)
    assert [function.__name__ for function in read] == [f"f{i}" for i in range(digests._MOST_SOURCES)]


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
