"""Scored latents: what a reward proxy is trained on.

A dataset holds latents, the prompts they were made from, and one column per reward, together with the fingerprints of
the latent space and of the metrics. Latents lie in safetensors shards (so bfloat16 works) that are read on demand;
prompts and rewards lie in one parquet table, which Hugging Face `datasets` opens too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from latent_rewards.contracts import DataError, FingerprintMismatchError, Prompt, check_latents, prompt_text
from latent_rewards.shards import FileShard, MemoryShard, Shard
from latent_rewards.training.checkpoint import (
    MANIFEST,
    CheckpointError,
    check_target,
    commit_directory,
    file_sha256,
    verify_directory,
)

FORMAT = "latent-rewards/dataset/1"
DESCRIPTION = "dataset.json"
TABLE = "samples.parquet"
COMPLETE = "complete"
"""Folder inside a finished collection that lists its parts."""

_SHARD_BYTES = 2**28


class RewardDataset:
    """Latents ``[N, C, F, H, W]``, their prompts and rewards; make one with :meth:`from_tensors` or :meth:`load`.

    Attributes:
        prompts: N texts.
        rewards: ``{reward name: float32 [N]}``; NaN where a metric does not apply to a sample.
        latent_space: the fingerprint of the codec the latents belong to, or None if unknown.
        metric_fingerprints: ``{reward name: fingerprint}``; empty if unknown.
        failures: ``{sample index: error}`` of samples that could not be scored and are therefore absent.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        rows: Tensor,
        prompts: Sequence[str],
        rewards: Mapping[str, Tensor],
        *,
        latent_space: str | None,
        metric_fingerprints: Mapping[str, str],
        failures: Mapping[int, str],
    ) -> None:
        self._shards = list(shards)
        self._rows = rows
        self.prompts = list(prompts)
        self.rewards = dict(rewards)
        self.latent_space = latent_space
        self.metric_fingerprints = dict(metric_fingerprints)
        self.failures = dict(failures)

    @classmethod
    def from_tensors(
        cls,
        latents: Tensor,
        prompts: Sequence[Prompt],
        rewards: Mapping[str, Tensor],
        *,
        latent_space: str | None = None,
        metric_fingerprints: Mapping[str, str] | None = None,
        failures: Mapping[int, str] | None = None,
    ) -> RewardDataset:
        """Check the tensors and return a dataset that holds them in memory.

        Args:
            latents: ``[N, C, F, H, W]``, any floating dtype.
            prompts: N texts, or mappings of which the text is kept.
            rewards: ``{name: [N]}``; NaN means "does not apply".
            latent_space: fingerprint of the codec, or None.
            metric_fingerprints: ``{reward name: fingerprint}``.
            failures: ``{sample index: error}``, see the class.

        Raises:
            DataError: a shape, dtype, length or value is wrong; the message names it.
        """
        check_latents(latents)
        texts = [prompt_text(prompt) for prompt in prompts]
        if len(texts) != len(latents):
            raise DataError(f"{len(texts)} prompts for {len(latents)} latents; give one prompt per sample")
        columns = {name: check_reward(name, values, len(latents)) for name, values in rewards.items()}
        if "prompt" in columns:
            raise DataError("a reward cannot be named 'prompt', as the table has a column of that name; rename it")
        if not columns:
            raise DataError("rewards is empty; give at least one {name: [N]} column")
        fingerprints = dict(metric_fingerprints or {})
        unknown = sorted(set(fingerprints) - set(columns))
        if unknown:
            raise DataError(f"metric_fingerprints names {unknown}, which rewards does not have ({sorted(columns)})")
        return cls(
            [MemoryShard(latents.detach())],
            torch.arange(len(latents)),
            texts,
            columns,
            latent_space=latent_space,
            metric_fingerprints=fingerprints,
            failures=failures or {},
        )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._rows)

    def __repr__(self) -> str:
        return f"RewardDataset({len(self)} latents {self.latent_shape}, rewards {', '.join(self.reward_names)})"

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The names of the reward columns, in order."""
        return tuple(self.rewards)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """``(C, F, H, W)`` of one sample."""
        return self._shards[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the latents."""
        return self._shards[0].dtype

    def latents(self, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return latents ``[M, C, F, H, W]``, read on demand, at ``indices`` (see :meth:`select`; None is all)."""
        rows = self._rows if indices is None else self._rows[self._positions(indices)]
        ends = torch.tensor([shard.count for shard in self._shards]).cumsum(0)
        owners = torch.searchsorted(ends, rows, right=True)
        device = getattr(getattr(self._shards[0], "latents", None), "device", torch.device("cpu"))
        gathered = torch.empty(len(rows), *self.latent_shape, dtype=self.dtype, device=device)
        for owner in owners.unique().tolist():
            here = owners == owner
            start = ends[owner] - self._shards[owner].count
            gathered[here.to(device)] = self._shards[owner].read(rows[here] - start).to(device)
        return gathered

    def select(self, indices: Tensor | Sequence[int]) -> RewardDataset:
        """Return a view of some samples; no latents are copied.

        Args:
            indices: integers ``[M]``, repeats allowed, or a mask, bool ``[N]``.

        Raises:
            DataError: they are neither.
        """
        chosen = self._positions(indices)
        return RewardDataset(
            self._shards,
            self._rows[chosen],
            [self.prompts[i] for i in chosen.tolist()],
            {name: values[chosen] for name, values in self.rewards.items()},
            latent_space=self.latent_space,
            metric_fingerprints=self.metric_fingerprints,
            failures=self.failures,
        )

    def _positions(self, indices: Tensor | Sequence[int]) -> Tensor:
        given = torch.as_tensor(indices).cpu()
        if given.dtype == torch.bool and given.shape == (len(self),):
            return given.nonzero()[:, 0]
        if given.ndim != 1 or given.dtype == torch.bool or (given.is_floating_point() and len(given)):
            got = f"{given.dtype} {list(given.shape)}"
            raise DataError(f"choose samples by integers [M] or a mask, bool [{len(self)}]; got {got}")
        return given.long()

    def concatenate(self, other: RewardDataset) -> RewardDataset:
        """Return this dataset followed by ``other``; no latents are copied.

        Raises:
            FingerprintMismatchError: latent spaces or metric fingerprints differ.
            DataError: reward names, latent shapes or dtypes differ.
        """
        return join([self, other])

    def _check_joinable(self, other: RewardDataset) -> None:
        check_same_fingerprint("latent space", self.latent_space, other.latent_space)
        if set(self.reward_names) != set(other.reward_names):
            raise DataError(f"cannot join rewards {self.reward_names} with {other.reward_names}; the names must agree")
        for name in self.reward_names:
            mine, theirs = self.metric_fingerprints.get(name), other.metric_fingerprints.get(name)
            check_same_fingerprint(f"metric of reward {name!r}", mine, theirs)
        if (self.latent_shape, self.dtype) != (other.latent_shape, other.dtype):
            raise DataError(
                f"cannot join latents {self.latent_shape} {self.dtype} with {other.latent_shape} {other.dtype}"
            )

    def save(self, path: str | Path) -> None:
        """Commit the dataset to the folder ``path``: all of it or nothing; a dataset that is there is replaced.

        Where this dataset reads its latents from there, it reads the new files afterwards; others that do must be
        loaded again.

        Raises:
            FolderInUseError: the folder holds something else.
        """
        import pyarrow as pa
        from pyarrow import parquet

        check_target(path, DESCRIPTION)
        row_bytes = max(1, self.dtype.itemsize * int(torch.tensor(self.latent_shape).prod()))
        shard_rows = max(1, _SHARD_BYTES // row_bytes)
        with commit_directory(path) as folder:
            shards: list[str] = []
            for start in range(0, len(self), shard_rows):
                shards.append(f"latents-{len(shards):05d}.safetensors")
                rows = torch.arange(start, min(start + shard_rows, len(self)))
                save_file({"latents": self.latents(rows).cpu().contiguous()}, folder / shards[-1])
            columns = {name: pa.array(values.numpy(), from_pandas=False) for name, values in self.rewards.items()}
            parquet.write_table(
                pa.table([pa.array(self.prompts, pa.string()), *columns.values()], names=["prompt", *columns]),
                folder / TABLE,
            )
            description = {
                "format": FORMAT,
                "latent_space": self.latent_space,
                "metric_fingerprints": self.metric_fingerprints,
                "shards": shards,
                "failures": [[index, error] for index, error in self.failures.items()],
            }
            (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))
        if Path(path).resolve() in {
            shard.path.parent.resolve() for shard in self._shards if isinstance(shard, FileShard)
        }:
            self._shards = [FileShard(Path(path) / name) for name in shards]
            self._rows = torch.arange(len(self))

    @classmethod
    def load(cls, path: str | Path) -> RewardDataset:
        """Open a saved dataset, or the folder of a finished collection; every file is verified first.

        Raises:
            CheckpointError: nothing there, a collection that is unfinished, or a file that is missing or altered.
        """
        folder = Path(path)
        if (folder / COMPLETE).is_dir():
            verify_directory(folder / COMPLETE)
            content = json.loads((folder / COMPLETE / "parts.json").read_text())
            joined = join([_load_part(folder, entry) for entry in content["parts"]])
            joined.failures = {int(index): error for index, error in content["failures"]}
            return joined
        if not (folder / DESCRIPTION).is_file():
            raise CheckpointError(
                f"{folder} holds no {DESCRIPTION} and no finished collection; if a collection was interrupted, run "
                "collect_rewards again with the same settings to finish it"
            )
        verify_directory(folder)
        return cls._open(folder)

    @classmethod
    def _open(cls, folder: Path) -> RewardDataset:
        from pyarrow import parquet

        description = json.loads((folder / DESCRIPTION).read_text())
        if description.get("format") != FORMAT:
            raise CheckpointError(f"{folder} has format {description.get('format')!r}; this version reads {FORMAT!r}")
        table = parquet.read_table(folder / TABLE)
        names = table.column_names[1:]
        shards = [FileShard(folder / name) for name in description["shards"]]
        if table.num_rows != sum(shard.count for shard in shards):
            raise CheckpointError(
                f"{folder} has {table.num_rows} rows in {TABLE} and {sum(shard.count for shard in shards)} latents; "
                "write it again"
            )
        return cls(
            shards,
            torch.arange(table.num_rows),
            table.column(0).to_pylist(),
            {name: torch.tensor(table.column(i + 1).to_numpy(), dtype=torch.float32) for i, name in enumerate(names)},
            latent_space=description["latent_space"],
            metric_fingerprints=description["metric_fingerprints"],
            failures={int(index): error for index, error in description["failures"]},
        )


def join(parts: Sequence[RewardDataset]) -> RewardDataset:
    """Return the concatenation of one or more datasets; see :meth:`RewardDataset.concatenate`."""
    first = parts[0]
    for part in parts[1:]:
        first._check_joinable(part)
    starts = accumulate((sum(shard.count for shard in part._shards) for part in parts), initial=0)
    return RewardDataset(
        [shard for part in parts for shard in part._shards],
        torch.cat([part._rows + start for part, start in zip(parts, starts, strict=False)]),
        [prompt for part in parts for prompt in part.prompts],
        {name: torch.cat([part.rewards[name] for part in parts]) for name in first.rewards},
        latent_space=first.latent_space,
        metric_fingerprints=first.metric_fingerprints,
        failures={index: error for part in parts for index, error in part.failures.items()},
    )


def write_complete(root: Path, parts: Sequence[Path], failures: Mapping[int, str]) -> None:
    """Commit the list of a finished collection's parts, each with its rows and the sha256 of its manifest."""
    from pyarrow import parquet

    entries = [
        {
            "name": part.name,
            "rows": parquet.read_metadata(part / TABLE).num_rows,
            "sha256": file_sha256(part / MANIFEST),
        }
        for part in parts
    ]
    with commit_directory(root / COMPLETE) as folder:
        content = {"parts": entries, "failures": list(failures.items())}
        (folder / "parts.json").write_text(json.dumps(content, indent=1))


def _load_part(root: Path, entry: str | Mapping[str, Any]) -> RewardDataset:
    if isinstance(entry, str):  # as collections were listed before rows and hashes were
        return RewardDataset.load(root / entry)
    folder = root / entry["name"]
    part = RewardDataset.load(folder)
    if len(part) != entry["rows"] or file_sha256(folder / MANIFEST) != entry["sha256"]:
        raise CheckpointError(
            f"{folder} is not the part that the collection finished with ({len(part)} rows, {entry['rows']} then); "
            "restore it, or collect again"
        )
    return part


def check_reward(name: str, values: Tensor, count: int) -> Tensor:
    """Return one reward column as float32 ``[count]`` on the CPU.

    Raises:
        DataError: the shape is wrong or a value is infinite (NaN is allowed).
    """
    column = torch.as_tensor(values).detach().to("cpu", torch.float32)
    if column.shape != (count,):
        raise DataError(f"reward {name!r} has shape {tuple(column.shape)}; expected [{count}], one per sample")
    if bool(torch.isinf(column).any()):
        raise DataError(
            f"reward {name!r} is infinite for sample {int(torch.isinf(column).nonzero()[0])}; use NaN where a metric "
            "does not apply, and drop or bound the rest"
        )
    return column


def check_same_fingerprint(kind: str, mine: str | None, theirs: str | None) -> None:
    """Raise FingerprintMismatchError, naming both, unless the two fingerprints are equal."""
    if mine != theirs:
        raise FingerprintMismatchError(f"{kind} differs: {mine!r} here, {theirs!r} there; do not mix the two")
