"""The benchmark's rows: what they show, and whose they are; with a codec that takes no time."""

import json
import math
import shutil
from functools import partial

import pytest

from latent_rewards.contracts import DataError, FingerprintMismatchError
from recipes.moving_digits import benchmark as room
from recipes.moving_digits.benchmark import REAL_CLIPS, TUNED, DigitsBenchmark
from recipes.moving_digits.evaluation import Evaluation, Reference, noise_clips

SHAPE = (3, 17, 32, 32)
HEADERS = ["method", "total", "quality", "semantic", "diversity", "Fréchet", "legibility"]
LABEL = "noise, 1 step"


class Codec:
    """Pixels as they are."""

    def __init__(self, fingerprint="pixels"):
        self.fingerprint = fingerprint

    def decode(self, latents):
        return latents.transpose(1, 2).sigmoid()

    def encode(self, videos):
        return videos.transpose(1, 2).logit(eps=1e-6)


def opened(folder, *, codec="pixels", num_prompts=2, **options):
    return DigitsBenchmark(Codec(codec), SHAPE, folder, num_prompts=num_prompts, **options)


def add(benchmark):
    return benchmark.add(LABEL, lambda prompts, noise: noise[0], num_steps=1, network_evaluations=1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "noise_clips", partial(noise_clips, count=8))
        add(opened(folder))
    return folder


@pytest.fixture
def stored(measured, tmp_path, monkeypatch):
    """A folder with one row, of which nothing needs to be measured again."""
    monkeypatch.setattr(room, "build_reference", None)
    monkeypatch.setattr(room, "generate_clips", None)
    return shutil.copytree(measured, tmp_path / "evaluation")


def told_before(folder):
    """Make of a folder what was written before it told its codec."""
    (row,) = folder.glob("*/row.json")
    facts = json.loads(row.read_text())
    del facts["codec"]
    row.write_text(json.dumps(facts))
    reference = Reference.load(folder / REAL_CLIPS)
    del reference.fingerprints["codec"]
    reference.save(folder / REAL_CLIPS)


def test_what_is_stored_is_read_and_not_measured_again(stored):
    benchmark = opened(stored)
    row = add(benchmark)
    benchmark.load_rows()
    assert list(benchmark.rows) == [LABEL] and row.evaluation.prompts == benchmark.prompts
    told_before(stored)
    older = add(opened(stored))
    assert older.evaluation.scores == row.evaluation.scores


def test_a_reference_of_other_prompts_or_of_another_codec_is_refused(stored):
    with pytest.raises(DataError, match=f"{REAL_CLIPS} is of 2 prompts, not of the 4 evaluated now; give another"):
        opened(stored, num_prompts=4)
    with pytest.raises(FingerprintMismatchError, match="measured with codec pixels, the one now is another"):
        opened(stored, codec="another")
    told_before(stored)
    assert opened(stored, codec="another").reference.prompts


@pytest.mark.parametrize("read", [add, DigitsBenchmark.load_rows])
def test_a_row_of_other_prompts_or_of_another_codec_is_refused(stored, read):
    benchmark = opened(stored)
    benchmark.codec.fingerprint = "another"
    with pytest.raises(FingerprintMismatchError, match="noise,_1_step was measured with codec pixels"):
        read(benchmark)
    benchmark = opened(stored)
    path = next(stored.glob("*/evaluation.safetensors"))
    values = Evaluation.load(path)
    values.prompts.reverse()
    values.save(path)
    with pytest.raises(DataError, match="noise,_1_step is of 2 prompts, not of the 2 evaluated now"):
        read(benchmark)
    assert not benchmark.rows


def test_the_table_shows_further_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "noise_clips", partial(noise_clips, count=8))
    further = [TUNED, "quality.blur", "digits.direction", "quality.sharpness", "quality.blur"]
    benchmark = opened(tmp_path, metrics=further)
    scores = add(benchmark).evaluation.scores
    headers, (row,) = benchmark.table()
    shown = ["quality.blur", "digits.direction", "quality.sharpness"]
    assert headers == [*HEADERS, *shown, "evaluations", "s / video", "speed-up"]
    told = dict(zip(headers, row, strict=True))
    assert told["legibility"] == 100 * scores[TUNED]
    assert told["quality.blur"] == 100 * scores["quality.blur"] > 0
    assert told["digits.direction"] == 100 * scores["digits.direction"]
    assert told["quality.sharpness"] == scores["quality.sharpness"] > 0, "it has no upper bound of 1"
    assert scores["quality.sharpness"] == pytest.approx(
        benchmark.rows[LABEL].evaluation.metrics["quality.sharpness"].mean()
    )


def test_a_row_without_a_further_metric_shows_a_dash(stored):
    benchmark = opened(stored, metrics=["quality.blur", "digits.direction"])
    add(benchmark)
    headers, (row,) = benchmark.table()
    told = dict(zip(headers, row, strict=True))
    assert math.isnan(told["quality.blur"]) and told["digits.direction"] > 0
    assert opened(stored).table()[0] == [*HEADERS, "evaluations", "s / video", "speed-up"]
