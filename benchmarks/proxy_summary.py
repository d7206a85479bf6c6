"""The files of :mod:`benchmarks.proxies` as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.seeds import mean_cell, over_seeds
from latent_rewards.contracts import ConfigError

SCORES = {"spearman": "Spearman", "pairwise": "Pairs in the right order", "r2": "R²", "mae": "MAE"}
STRANGE = {"noise": "noise latents", "textures": "moving photographs", "hacked": "hacked policy"}

Result = Mapping[str, Any]
"""What one file holds: ``method``, ``seed``, ``settings`` and ``sizes``."""


def summarise(results: Sequence[Result], methods: Sequence[str], rewards: Sequence[str]) -> str:
    """Return scores over seeds, coverage for each seed, and AUROC over seeds, a column for each number of labels.

    Args:
        results: what the files hold.
        methods: in the order of rows.
        rewards: likewise.

    Raises:
        ConfigError: there is nothing, or the files are of different samples.
    """
    if not results:
        raise ConfigError("no results to summarise; run python -m benchmarks.proxies --student FOLDER first")
    known: dict[str, Any] = {}
    for result in results:
        known = {**result.get("settings", {}), **known}
    if any(known[name] != value for result in results for name, value in result.get("settings", {}).items()):
        raise ConfigError("the files were measured with different samples; remove those that are not to be compared")
    sizes = sorted({int(size) for result in results for size in result["sizes"]})
    ordered = sorted(results, key=lambda result: (methods.index(result["method"]), result["seed"]))
    lines: list[str] = []
    for score, title in SCORES.items():
        rows = dict(_score_rows(ordered, score, rewards, sizes))
        lines += _table(f"{title}, mean ± standard deviation over seeds", ("reward", "method"), sizes, rows)
    rows = dict(_coverage_rows(ordered, rewards, sizes))
    lines += _table("Coverage of the 90 % interval, % [95 % interval over prompts]", ("reward", "method"), sizes, rows)
    strange = [result for result in ordered if any("auroc" in entry for entry in result["sizes"].values())]
    rows = {
        (title,): [_over_seeds(strange, size, lambda entry, kind=kind: entry["auroc"].get(kind)) for size in sizes]
        for kind, title in STRANGE.items()
    }
    lines += _table("AUROC of the default proxy's score of strangeness", ("against",), sizes, rows if strange else {})
    return "\n".join(lines)


def _score_rows(
    results: Sequence[Result], score: str, rewards: Sequence[str], sizes: Sequence[int]
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    for name in rewards:

        def read(entry: Mapping[str, Any], key: str = score, name: str = name) -> float:
            return float(entry["rewards"][name][key])

        for method in dict.fromkeys(result["method"] for result in results):
            same = [result for result in results if result["method"] == method]
            yield (name, method), [_over_seeds(same, size, read) for size in sizes]
        if score == "spearman":
            ceiling = [_over_seeds(results, size, lambda entry, read=read: read(entry, "ceiling")) for size in sizes]
            yield (name, "(most without ties)"), ceiling


def _coverage_rows(
    results: Sequence[Result], rewards: Sequence[str], sizes: Sequence[int]
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield a row for each seed and the mean over them, which is what an interval promises: a seed is one drawing."""
    have = [
        result
        for result in results
        if any("coverage" in entry["rewards"][rewards[0]] for entry in result["sizes"].values())
    ]
    for name in rewards:

        def read(entry: Mapping[str, Any], name: str = name) -> float:
            return 100 * float(entry["rewards"][name]["coverage"]["share"])

        for method in dict.fromkeys(result["method"] for result in have):
            same = [result for result in have if result["method"] == method]
            for result in same:
                yield (name, f"{method}, seed {result['seed']}"), [_covered(result, size, name) for size in sizes]
            yield (name, f"{method}, mean"), [_over_seeds(same, size, read, digits=1) for size in sizes]


def _over_seeds(
    results: Sequence[Result], size: int, read: Callable[[Mapping[str, Any]], float | None], digits: int = 3
) -> str:
    entries = [result["sizes"].get(str(size)) for result in results]
    values = [value for entry in entries if entry is not None and (value := read(entry)) is not None]
    if not values:
        return "–"
    return mean_cell(over_seeds(values), digits=digits)


def _covered(result: Result, size: int, name: str) -> str:
    entry = result["sizes"].get(str(size))
    if entry is None:
        return "–"
    share, low, high = (100 * entry["rewards"][name]["coverage"][key] for key in ("share", "low", "high"))
    return f"{share:.1f} [{low:.1f}, {high:.1f}]"


def _table(
    title: str, names: Sequence[str], sizes: Sequence[int], rows: Mapping[tuple[str, ...], Sequence[str]]
) -> list[str]:
    header = f"| {' | '.join([*names, *(f'{size:,} labels' for size in sizes)])} |"
    body = [f"| {' | '.join([*key, *cells])} |" for key, cells in rows.items()]
    return [f"{title}:", "", header, "|---" * (len(names) + len(sizes)) + "|", *body, ""] if rows else []
