"""Whether a proxy is used where it was trained: in the same latent space, on the same metrics."""

from __future__ import annotations

from collections.abc import Mapping

from latent_rewards.contracts import FingerprintMismatchError


def check_latent_space(mine: str | None, theirs: str | None) -> None:
    """Raise unless the proxy's latent space is ``theirs``; an unknown one is not judged.

    Raises:
        FingerprintMismatchError: the two differ; the message names both.
    """
    if None not in (mine, theirs) and mine != theirs:
        raise FingerprintMismatchError(
            f"the proxy was trained in latent space {mine!r} and is used with {theirs!r}; train a proxy on latents of "
            "that codec"
        )


def check_metrics(mine: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Raise unless the metrics ``{reward name: fingerprint}`` that both know are the same.

    Raises:
        FingerprintMismatchError: one differs; the message names both.
    """
    for name, fingerprint in mine.items():
        if theirs.get(name, fingerprint) != fingerprint:
            raise FingerprintMismatchError(
                f"reward {name!r}: the proxy was trained on metric {fingerprint!r} and is used with {theirs[name]!r}; "
                "collect and train with one of the two"
            )
