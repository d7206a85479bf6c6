"""What a proxy is given and does not own: an encoder, a backbone, a schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Held(Generic[T]):
    """Keeps an object that may be a module out of the state of the module that holds it, and out of its copies."""

    value: T

    def __deepcopy__(self, memo: dict[int, Any]) -> Held[T]:
        """Return itself."""
        return self
