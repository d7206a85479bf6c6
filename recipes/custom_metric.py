"""Tune a student towards a metric of your own: register it, train a proxy, optimise.

    python -m recipes.custom_metric --student runs/demo/student

The metric may be any Python: nothing is differentiated, and only a few hundred samples are decoded for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import latent_rewards as lr
from distillation.families.export import check_target, load_student
from latent_rewards.training.devices import choose_device
from recipes.moving_digits.benchmark import training_prompts


@lr.register_metric("custom.boldness", version="1", value_range=(0, 1))
def boldness(videos: Tensor) -> Tensor:
    """Share of pixels brighter than one half: ``[B, T, C, H, W]`` -> ``[B]``."""
    return (videos.amax(dim=2) > 0.5).float().mean(dim=(1, 2, 3))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/demo/student", help="folder of a student (default: %(default)s)")
    parser.add_argument("--output", default="runs/bold", help="where the tuned student goes (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=512, help="true scores before tuning (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=50, help="updates of the student (default: %(default)s)")
    parser.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: an accelerator if there is one)")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    check_target(Path(options.output))

    student = load_student(options.student, device=device)
    prompts = training_prompts(512, seed=0)
    oracle = lr.MetricOracle(student.exporter.codec, ["custom.boldness"])
    dataset = lr.collect_rewards(student, prompts, oracle, num_samples=options.queries, seed=0)
    proxy = lr.train_proxy(dataset, config=lr.ProxyConfig(device=options.device))
    print(f"proxy on unseen samples: {proxy.report['custom.boldness']}")

    config = lr.LROConfig(num_updates=options.updates, learning_rate=5e-5, device=options.device)
    result = lr.ReinforceTrainer(student, proxy, prompts, config=config, oracle=oracle, dataset=dataset).train()
    student.save_pretrained(options.output)
    print(f"student written to {options.output}")
    for point in result.true_curve:
        print(f"update {point['step']}: true {point['true']}, proxy {point['proxy']}")


if __name__ == "__main__":
    main()
