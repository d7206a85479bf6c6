import argparse
import dataclasses
from typing import Literal

import pytest

from latent_rewards.training.flags import add_settings, attribute_docs, chosen_settings, yaml_value


def test_fields_of_other_types_are_yaml():
    @dataclasses.dataclass
    class Settings:
        """Of a test.

        Attributes:
            sizes: several,
                on two lines: 50 % of them odd.
            many: an optional list.
            counts: a list, of one where one number is given.
        """

        sizes: tuple[int, ...] = (1,)
        many: list[str] | None = None
        counts: list[int] = dataclasses.field(default_factory=list)

    parser = argparse.ArgumentParser()
    add_settings(parser, Settings)
    assert attribute_docs(Settings) == {
        "sizes": "several, on two lines: 50 % of them odd.",
        "many": "an optional list.",
        "counts": "a list, of one where one number is given.",
    }
    options = parser.parse_args(["--sizes", "[1, 2]", "--many", "None", "--counts", "4"])
    assert chosen_settings(options, Settings) == {"sizes": [1, 2], "many": None, "counts": [4]}
    assert chosen_settings(parser.parse_args(["--counts", "[4, 2]"]), Settings) == {"counts": [4, 2]}
    assert "50 % of them odd" in " ".join(parser.format_help().split())


def test_choices_among_texts_are_texts():
    @dataclasses.dataclass
    class Settings:
        """Of a test."""

        answer: Literal["no", "yes"] = "yes"
        perhaps: Literal["no", "1"] | None = "1"
        several: Literal[1, "no"] = 1

    parser = argparse.ArgumentParser()
    add_settings(parser, Settings)
    found = {}
    for text in ("no", "yes", "1", "none"):
        options = parser.parse_args(["--answer", text, "--perhaps", text, "--several", text])
        found[text] = list(chosen_settings(options, Settings).values())
    assert found["no"] == ["no", "no", False] and found["yes"] == ["yes", "yes", True]
    assert found["1"] == ["1", "1", 1] and found["none"] == ["none", None, "none"]


def test_numbers_with_an_exponent_are_numbers_and_what_is_no_yaml_is_refused():
    assert yaml_value("[1e-3, 2E+3, -.5e1, e5]") == [1e-3, 2e3, -5.0, "e5"] and yaml_value("no") is False
    with pytest.raises(argparse.ArgumentTypeError, match=r"'\[4' is not valid YAML"):
        yaml_value("[4")
