import pytest
import torch

from distillation.prompts import PromptsError
from latent_rewards.metrics import register_metric
from recipes.prompted import PromptBenchmark, split_prompts


class TwiceCodec:
    fingerprint = "twice"

    def decode(self, latents):
        return latents.mean(dim=1).sigmoid()[:, :, None].expand(-1, -1, 3, -1, -1)

    def encode(self, videos):
        raise NotImplementedError


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


def test_rows_hold_means_and_the_same_noise_for_every_row():
    @register_metric("test.brightness", version="1", override=True)
    def brightness(videos):
        return videos.mean(dim=(1, 2, 3, 4))

    seen = []

    def sample(prompts, noise):
        seen.append(noise)
        return noise[-1] * 0 + len(prompts[0])

    benchmark = PromptBenchmark(TwiceCodec(), (4, 2, 3, 3), ["a", "bbb"], ["test.brightness"], seed=0, num_shown=1)
    benchmark.add("first", sample, num_steps=2, network_evaluations=2)
    benchmark.add("second", sample, num_steps=2, network_evaluations=2)
    headers, rows = benchmark.table()
    expected = (torch.tensor(1.0).sigmoid() + torch.tensor(3.0).sigmoid()) / 2
    assert headers == ["method", "test.brightness", "evaluations", "s / video"]
    assert rows[0][1] == pytest.approx(float(expected)) and rows[0][2] == 2
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert {name: tuple(v.shape) for name, v in benchmark.videos().items()} == dict.fromkeys(
        ["first", "second"], (1, 2, 3, 3, 3)
    )
