import math

import pytest
import torch

from distillation.prompts import PromptsError
from latent_rewards.metrics import create_metric, register_metric
from latent_rewards.training.ranks import Ranks
from recipes import prompted
from recipes.prompted import PromptBenchmark, split_prompts


class TwiceCodec:
    fingerprint = "twice"

    def decode(self, latents):
        return latents.mean(dim=1).sigmoid()[:, :, None].expand(-1, -1, 3, -1, -1)

    def encode(self, videos):
        raise NotImplementedError


class OtherCodec(TwiceCodec):
    fingerprint = "other"


def test_prompts_are_split_and_blank_lines_skipped(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n a dog \na cow\n")
    assert split_prompts(str(tmp_path / "p.txt"), 1) == (["a cat", "a dog"], ["a cow"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompts"),
        (b"\n \n", "no prompts"),
        (b"\xff\xfe\x00\x80", "not UTF-8"),
        (b"a\x00b\n", "NUL bytes"),
        (b"one\n", "add prompts"),
    ],
)
def test_files_that_cannot_serve_are_named(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(PromptsError, match=message):
        split_prompts(str(tmp_path / "p.txt"), 1)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PromptsError, match="nowhere.txt"):
        split_prompts(str(tmp_path / "nowhere.txt"), 1)


@pytest.fixture
def brightness():
    """Register a metric of mean brightness, as another version if asked; "x" in a prompt makes it not apply."""

    def registered(version="1"):
        @register_metric("test.brightness", version=version, needs_prompt=True, may_be_nan=True, override=True)
        def brightness(videos, *, prompts):
            values = videos.mean(dim=(1, 2, 3, 4))
            return torch.where(torch.tensor(["x" in prompt for prompt in prompts]), math.nan, values)

        return create_metric("test.brightness")

    return registered


@pytest.fixture
def evaluated(tmp_path, brightness):
    """Evaluate a sampler that gives latents of the prompt's length; returns the benchmark and the batches it drew."""

    def evaluate(prompts, *labels, num_steps=2, version="1", calls=2, codec=TwiceCodec, **options):
        drawn = []

        def sample(texts, noise):
            drawn.append((texts, noise))
            return noise[-1] * 0 + torch.tensor([float(len(text)) for text in texts]).view(-1, 1, 1, 1, 1)

        options = {"seed": 0, **options}
        benchmark = PromptBenchmark(codec(), (4, 2, 3, 3), tmp_path, prompts, [brightness(version)], **options)
        for label in labels:
            benchmark.add(label, sample, num_steps=num_steps, network_evaluations=calls)
        return benchmark, drawn

    return evaluate


def value(*lengths):
    return pytest.approx(float(torch.tensor(lengths).float().sigmoid().mean()))


def test_rows_hold_means_and_the_same_noise_for_every_row(evaluated):
    benchmark, drawn = evaluated(["a", "bbb"], "first", "second", num_shown=1)
    headers, rows = benchmark.table()
    assert headers == ["method", "test.brightness", "evaluations", "s / video"]
    assert rows[0][:3] == ["first", value(1, 3), 2]
    (_, first), (_, other), (_, again), _ = drawn
    assert torch.equal(first, again) and not torch.equal(first, other)
    clips = benchmark.videos()["second"]
    assert clips.shape == (1, 2, 3, 3, 3) and float(clips.mean()) == pytest.approx(0.731, abs=1 / 255)
    assert [*benchmark.videos()] == ["first", "second"]


def test_a_metric_is_averaged_over_the_samples_it_applies_to(evaluated):
    benchmark, _ = evaluated(["a", "x", "bbb"], "some")
    assert benchmark.table()[1][0][1] == value(1, 3)
    benchmark, _ = evaluated(["x", "xx"], "none")
    assert math.isnan(benchmark.table()[1][0][1])


def test_samples_and_values_are_those_of_single_ones_in_any_batch(evaluated):
    prompts = ["a", "bbb", "x", "cc", "ddddd"]
    single, ones = evaluated(prompts, "one by one")
    batched, drawn = evaluated(prompts, "in batches", batch_size=2)
    assert [texts for texts, _ in drawn] == [["a", "bbb"], ["x", "cc"], ["ddddd"]]
    assert torch.equal(torch.cat([n for _, n in ones], dim=1), torch.cat([n for _, n in drawn], dim=1))
    assert batched.table()[1][0][1:3] == pytest.approx(single.table()[1][0][1:3])
    assert torch.equal(batched.videos()["in batches"], single.videos()["one by one"])
    assert len(batched.videos()["in batches"]) == 4
    assert len(evaluated(prompts, "few", batch_size=2, num_shown=1)[0].videos()["few"]) == 1


def test_a_batch_leaves_some_prompts_to_each_process(evaluated, monkeypatch):
    class First(Ranks):
        def gather(self, mine):
            return [mine, mine]

        def wait(self):
            pass

    monkeypatch.setattr(prompted, "current_ranks", lambda: First(0, 2))
    _, drawn = evaluated(["a", "bb", "ccc", "d"], "row", batch_size=32)
    assert [texts for texts, _ in drawn] == [["a", "bb"]]


def test_a_kept_row_is_read_and_not_sampled(evaluated, tmp_path):
    made, drawn = evaluated(["a", "bbb"], "teacher, 4 steps", "VSD→CD→LRO (a/b)")
    read, again = evaluated(["a", "bbb"], "VSD→CD→LRO (a/b)", "teacher, 4 steps", batch_size=2)
    assert len(drawn) == 4 and again == []
    assert {folder.name for folder in tmp_path.iterdir()} == {"teacher,_4_steps", "VSD→CD→LRO_(a-b)"}
    assert read.table()[1] == made.table()[1][::-1]
    assert torch.equal(read.videos()["teacher, 4 steps"], made.videos()["teacher, 4 steps"])


@pytest.mark.parametrize(
    "other",
    [
        {"prompts": ["a", "cc"]},
        {"num_steps": 1},
        {"version": "2"},
        {"seed": 1},
        {"num_shown": 1},
        {"calls": 4},
        {"codec": OtherCodec},
    ],
    ids=str,
)
def test_a_row_of_something_else_is_made_anew(evaluated, other):
    evaluated(["a", "bbb"], "row")
    prompts = other.get("prompts", ["a", "bbb"])
    benchmark, drawn = evaluated(prompts, "row", **{key: value for key, value in other.items() if key != "prompts"})
    assert len(drawn) == 2 and len(benchmark.table()[1]) == 1
    assert benchmark.table()[1][0][1] == value(1, len(benchmark.prompts[1]))


@pytest.mark.parametrize(("file", "content"), [("manifest.json", None), ("row.json", None), ("row.json", "{")])
def test_a_row_that_is_not_whole_is_made_anew(evaluated, tmp_path, file, content):
    evaluated(["a", "bbb"], "row")
    (tmp_path / "row" / file).unlink() if content is None else (tmp_path / "row" / file).write_text(content)
    assert len(evaluated(["a", "bbb"], "row")[1]) == 2 and evaluated(["a", "bbb"], "row")[1] == []


def test_labels_that_share_a_folder_share_no_row(evaluated):
    benchmark, drawn = evaluated(["a"], "one step", "one_step")
    assert len(drawn) == 2 and [row[0] for row in benchmark.table()[1]] == ["one step", "one_step"]
