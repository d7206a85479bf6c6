import json

import pytest
import torch

from latent_rewards.contracts import ConfigError, DataError
from recipes.moving_digits import judge as room
from recipes.moving_digits.judge import ATTRIBUTES, WEIGHTS_DIR, Judge, degrade, train_judge
from recipes.moving_digits.world import COLOURS, DIRECTIONS, SPEEDS, draw_specs, labels, render


@pytest.fixture(scope="module")
def shipped() -> Judge:
    return Judge.load()


def test_the_shipped_judge_reads_held_out_scans(shipped: Judge) -> None:
    for heldout in (False, True):
        specs = draw_specs(200, seed=77, heldout=heldout)
        accuracy = shipped.accuracy(render(specs, seed=77, split="heldout"), labels(specs))
        assert all(value >= 97 for value in accuracy.values()), accuracy


def test_the_shipped_record_promises_97_percent_and_fits() -> None:
    record = json.loads((WEIGHTS_DIR / "judge.json").read_text())
    for kind in ("heldin_combinations", "heldin_combinations_degraded", "heldout_combinations"):
        assert set(record["heldout_accuracy"][kind]) == set(ATTRIBUTES)
        assert min(record["heldout_accuracy"][kind].values()) >= 97
    assert record["command"] and record["settings"]["seed"] == 0
    assert (WEIGHTS_DIR / "judge.safetensors").stat().st_size < 1.5e6


def test_it_has_a_head_per_attribute_in_the_world_s_order(shipped: Judge) -> None:
    assert ATTRIBUTES == {"digit": 10, "colour": len(COLOURS), "direction": len(DIRECTIONS), "speed": len(SPEEDS)}
    logits = shipped(torch.rand(2, 17, 3, 32, 32))
    assert {name: tuple(x.shape) for name, x in logits.items()} == {n: (2, k) for n, k in ATTRIBUTES.items()}
    assert list(labels(draw_specs(2, seed=0))) == list(ATTRIBUTES)


def test_features_do_not_depend_on_the_batch_and_classify(shipped: Judge) -> None:
    clips = render(draw_specs(5, seed=3), seed=3)
    features, predicted = shipped.read(clips, batch_size=2)
    assert features.shape == (5, shipped.feature_dim)
    assert torch.allclose(features, shipped.read(clips)[0], atol=1e-4)
    logits = shipped(clips)
    assert all(torch.equal(predicted[name], logits[name].argmax(dim=1)) for name in ATTRIBUTES)


def test_reading_leaves_the_mode_and_takes_no_gradient() -> None:
    judge = Judge(8, 4).train()
    before = judge.state_dict()["frames.0.1.running_mean"].clone()
    features, _ = judge.read(torch.rand(3, 17, 3, 32, 32))
    assert judge.training and not features.requires_grad
    assert torch.equal(judge.state_dict()["frames.0.1.running_mean"], before)


def test_clips_of_another_shape_are_refused(shipped: Judge) -> None:
    with pytest.raises(DataError, match=r"\(1, 16, 3, 32, 32\)"):
        shipped(torch.zeros(1, 16, 3, 32, 32))
    with pytest.raises(DataError, match="17"):
        shipped(torch.zeros(17, 3, 32, 32))


def test_accuracy_is_in_percent(shipped: Judge) -> None:
    specs = draw_specs(4, seed=11)
    clips, wanted = render(specs, seed=11), labels(specs)
    predicted = shipped.read(clips)[1]
    wrong = {name: predicted[name].clone() for name in wanted}
    wrong["digit"][0] = (wrong["digit"][0] + 1) % 10
    assert shipped.accuracy(clips, wrong) == {"digit": 75, "colour": 100, "direction": 100, "speed": 100}


def test_degradation_is_mild_and_a_function_of_its_source() -> None:
    clips = render(draw_specs(6, seed=5), seed=5)
    changed = degrade(clips, torch.Generator().manual_seed(1))
    assert changed.shape == clips.shape and changed.min() >= 0 and changed.max() <= 1
    assert torch.equal(changed, degrade(clips, torch.Generator().manual_seed(1)))
    error = (changed - clips).flatten(1).square().mean(dim=1).sqrt()
    assert error.max() < 0.08 and error.min() > 0
    # A constant clip shows that blur keeps brightness: away from the border only noise is left.
    grey = degrade(torch.full((2, 3, 3, 16, 16), 0.5), torch.Generator().manual_seed(2))[..., 2:-2, 2:-2]
    assert abs(grey.mean().item() - 0.5) < 4.5 * 0.05 / grey.numel() ** 0.5


def test_training_sees_held_in_clips_of_training_scans_only(monkeypatch) -> None:
    seen: list[tuple[str, bool]] = []

    def watched(specs, *, seed, split="train", start_index=0):
        seen.extend((split, spec.is_heldout) for spec in specs)
        return render(specs, seed=seed, split=split, start_index=start_index)

    monkeypatch.setattr(room, "render", watched)
    train_judge(0, num_steps=10, batch_size=30, width=4, feature_dim=4, progress=False)
    assert len(seen) == 300 and set(seen) == {("train", False)}


def test_training_learns() -> None:
    judge = train_judge(3, num_steps=40, batch_size=12, learning_rate=2e-2, width=8, feature_dim=16, progress=False)
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    specs = draw_specs(100, seed=9)
    # One in six by chance.
    assert judge.accuracy(render(specs, seed=9), labels(specs))["colour"] > 50


def test_training_is_a_function_of_its_seed() -> None:
    small = {"num_steps": 10, "batch_size": 4, "width": 4, "feature_dim": 4, "progress": False}
    state = torch.random.get_rng_state()
    first = train_judge(3, **small).fingerprint
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    assert train_judge(3, **small).fingerprint == first
    assert train_judge(4, **small).fingerprint != first
    with pytest.raises(ConfigError, match="num_steps"):
        train_judge(0, **{**small, "num_steps": 9})


def test_files_come_back_and_are_checked(tmp_path) -> None:
    judge = Judge(8, 6)
    judge.save(tmp_path, {"note": "x"})
    read = Judge.load(tmp_path)
    assert read.fingerprint == judge.fingerprint and (read.width, read.feature_dim) == (8, 6)
    assert json.loads((tmp_path / "judge.json").read_text())["note"] == "x"
    settings = json.loads((tmp_path / "judge.json").read_text())
    (tmp_path / "judge.json").write_text(json.dumps({**settings, "fingerprint": "0" * 16}))
    with pytest.raises(ConfigError, match="0000"):
        Judge.load(tmp_path)
    with pytest.raises(ConfigError, match=r"python -m recipes\.moving_digits\.judge"):
        Judge.load(tmp_path / "nowhere")


def test_the_command_trains_and_stores(tmp_path, capsys) -> None:
    room.main(["--num-steps", "10", "--batch-size", "4", "--num-clips", "6", "--output-dir", str(tmp_path)])
    assert "digit" in capsys.readouterr().out
    record = json.loads((tmp_path / "judge.json").read_text())
    assert record["settings"] == {
        "seed": 0,
        "num_steps": 10,
        "batch_size": 4,
        "learning_rate": 4e-3,
        "num_clips": 6,
    }
    assert Judge.load(tmp_path).fingerprint == record["fingerprint"]
