"""Two processes of one launch end with the policy, proxy and curves of one process."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, warnings
from pathlib import Path
from runpy import run_path
import torch
from latent_rewards.dataset import RewardDataset
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer
from latent_rewards.proxies import ProxyConfig, train_proxy
from latent_rewards.rewards import WeightedSum
from latent_rewards.training.ranks import current_ranks

PROMPTS = ["a", "b", "c", "d"]

class Oracle:
    def __init__(self):
        self.asked = 0

    def __call__(self, latents, prompts):
        self.asked += len(latents)
        return {"quality": -0.5 * (latents.flatten(1) - 1).square().sum(1)}

def strange(name):
    return name.startswith(("distance", "ood_score"))

def tuned(toys, trainer, normalize=None, apart=False, **settings):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    latents = torch.randn(64, 2, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dataset = RewardDataset.from_tensors(latents, PROMPTS * 16, Oracle()(latents, PROMPTS * 16))
    proxy = train_proxy(dataset, config=ProxyConfig(trunk="conv3d", width=8, ensemble_size=2, num_updates=8,
                                                    progress=False, device="cpu"))
    policy, oracle, holdout = toys["LinearPolicy"](dim=2, gain=0.5), Oracle(), Oracle()
    if apart:
        for parameter in (*policy.parameters(), *proxy.parameters()):
            parameter.data += current_ranks().index
    policy.latent_shape = lambda condition: (2, 2, 2, 2)
    config = LROConfig(num_updates=5, learning_rate=0.05, prompts_per_update=4, num_generations=2, step_counts=[1, 2],
                       refresh_every=2, refresh_queries=9, refresh_steps=3, holdout_every=2, holdout_samples=5,
                       micro_batch=4, device="cpu", progress=False, **settings)
    trainer = {"gradient": DifferentiableRewardTrainer, "reinforce": ReinforceTrainer}[trainer]
    reward = WeightedSum({"quality": 1.0}, normalize) if normalize else None
    result = trainer(policy, proxy, PROMPTS, config, reward, oracle=oracle, dataset=dataset, holdout=holdout).train()
    curves = [list(entry["true"].values()) + list(entry["mae"].values()) for entry in result.true_curve]
    return {
        "policy": [parameter.tolist() for parameter in policy.parameters()],
        "proxy": [value.double().tolist() for name, value in proxy.state_dict().items() if not strange(name)],
        "strange": [value.double().tolist() for name, value in proxy.state_dict().items() if strange(name)],
        "true": curves,
        "holdout": [entry["score"] for entry in result.holdout_curve],
        "asked": [oracle.asked, holdout.asked],
        "queries": result.num_queries,
        "betas": [entry.get("beta", 0.0) for entry in result.history],
    }

if __name__ == "__main__":
    toys, cases = run_path(sys.argv[1]), json.loads(sys.argv[3])
    told = {name: tuned(toys, trainer, **settings) for name, (trainer, settings) in cases.items()}
    Path(sys.argv[2], f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    current_ranks().leave()
"""

CASES = {
    "gradient": ("gradient", {}),
    "reinforce": ("reinforce", {"num_draws": 4}),
    "adaptive": (
        "gradient",
        {"kl": "return", "kl_target": 0.01, "kl_gate": "uncertain", "sync_ref_model": True, "ref_model_sync_steps": 2},
    ),
    "zscore": ("gradient", {"normalize": "zscore"}),
    "rank": ("gradient", {"normalize": "rank", "estimator": "hybrid"}),
    "batch": ("gradient", {"scale_rewards": "batch"}),
    "apart": ("gradient", {"apart": True, "beta": 0.1}),
    "chosen": ("gradient", {"acquisition": "uncertain", "acquisition_pool": 2}),
}
TOYS = Path(__file__).with_name("conftest.py")


@pytest.fixture(scope="module")
def launched(launch, tmp_path_factory):
    root = tmp_path_factory.mktemp("lro_ranks")
    (root / "script.py").write_text(SCRIPT)
    done = launch(root / "script.py", TOYS, root, json.dumps(CASES))
    assert done.returncode == 0, done.stderr
    alone = runpy.run_path(str(root / "script.py"))["tuned"]
    return alone, [json.loads((root / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_where_one_ends_and_each_asks_half(launched, name):
    trainer, settings = CASES[name]
    alone, ranks = launched
    whole, parts = alone(runpy.run_path(str(TOYS)), trainer, **settings), [rank[name] for rank in ranks]
    # Whitening few samples enlarges what rounding does to their features.
    tolerances = {"strange": 1e-3} | dict.fromkeys(("policy", "proxy", "true", "holdout", "queries", "betas"), 1e-5)
    for key, relative in tolerances.items():
        assert parts[0][key] == parts[1][key]
        for mine, theirs in zip(flat(parts[0][key]), flat(whole[key]), strict=True):
            assert mine == pytest.approx(theirs, rel=relative, abs=0.1 * relative, nan_ok=True)
    assert len(set(whole["betas"])) == (5 if name == "adaptive" else 1)
    assert whole["asked"] == [18, 20]
    assert [sum(asked) for asked in zip(*(part["asked"] for part in parts), strict=True)] == [18, 20]
    assert min(min(part["asked"]) for part in parts) >= 8


def flat(value):
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]
