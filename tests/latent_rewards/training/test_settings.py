from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest

from latent_rewards.training.settings import SettingsError, check_types, read_settings


@dataclass
class Tuning:
    learning_rate: float = 1e-3
    limit: float | None = None
    steps: list[int] = field(default_factory=lambda: [4])
    mode: Literal["a", "b"] = "a"
    enabled: bool = False

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")


def read(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    return read_settings(tmp_path / "s.yaml", {"tuning": Tuning, "other": Tuning})


def test_values_types_and_defaults(tmp_path):
    found = read(tmp_path, "tuning: {learning_rate: 1e-4, limit: 2e-1, steps: [1, 2], mode: b, enabled: true}\n")
    assert found["tuning"] == Tuning(1e-4, 0.2, [1, 2], "b", True)
    assert found["other"] == Tuning()


@dataclass
class Asked:
    answer: Literal["no", "yes"] | None = None
    enabled: bool = True
    either: Literal["no", False] = "no"
    mode: Literal["a", "b"] = "a"


@pytest.mark.parametrize(("word", "value", "text"), [("no", False, "no"), ("yes", True, "yes"), ("'no'", "no", "no")])
def test_words_that_yaml_takes_for_truth_values_are_words_where_they_are_choices(tmp_path, word, value, text):
    (tmp_path / "s.yaml").write_text(f"asked: {{answer: {word}, enabled: {word}, either: {word}, mode: {word}}}")
    found = read_settings(tmp_path / "s.yaml", {"asked": Asked})["asked"]
    assert found == Asked(answer=text, enabled=value, either=value, mode=value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tuning: {learning_rat: 1}", "did you mean 'learning_rate'"),
        ("tunning: {}", "did you mean 'tuning'"),
        ("tuning: {learning_rate: -1}", "must be positive; got -1"),
        ("tuning: [1]", "must be a mapping"),
        ("[1, 2]", "must hold sections"),
        ("tuning: {a: [}", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        read(tmp_path, text)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "s.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="s.yaml is not valid YAML: 'utf-8' codec"):
        read_settings(tmp_path / "s.yaml", {"tuning": Tuning})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match="nowhere.yaml"):
        read_settings(tmp_path / "nowhere.yaml", {"tuning": Tuning})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate must be a finite number; got '1e-3'"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number; got inf"),
        ({"learning_rate": True}, "learning_rate must be a finite number; got True"),
        ({"limit": "none"}, "limit must be a finite number or None; got 'none'"),
        ({"steps": 4}, "steps must be a list, each item a whole number; got 4"),
        ({"steps": [4.5]}, r"steps must be a list, each item a whole number; got \[4.5\]"),
        ({"enabled": 1}, "enabled must be true or false; got 1"),
        ({"mode": "c"}, "mode must be one of 'a', 'b'; got 'c'"),
    ],
)
def test_types_are_checked_and_named(wrong, message):
    values = Tuning()
    check_types(values, SettingsError)
    for name, value in wrong.items():
        setattr(values, name, value)
    with pytest.raises(SettingsError, match=message):
        check_types(values, SettingsError)


def test_numbers_of_numpy_and_whole_numbers_for_floats_fit():
    check_types(Tuning(learning_rate=np.float32(1), limit=1, steps=(np.int64(4),)), SettingsError)
