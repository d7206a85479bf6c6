"""What a proxy is given: an encoder, a backbone, a schedule, which it does not own; a tiny decoder, which it copies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from latent_rewards.proxies.noise import Schedule
    from latent_rewards.proxies.text import PromptEncoder
    from latent_rewards.proxies.trunks import TrunkKind
    from latent_rewards.proxies.trunks.backbone import VideoBackbone
    from latent_rewards.proxies.trunks.tiny_decoder import TinyDecoder

T = TypeVar("T")


@dataclass(frozen=True)
class Held(Generic[T]):
    """Keeps an object that may be a module out of the state of the module that holds it, and out of its copies."""

    value: T

    def __deepcopy__(self, memo: dict[int, Any]) -> Held[T]:
        """Return itself."""
        return self


@dataclass(frozen=True)
class Given:
    """The parts of a proxy that do not follow from its settings.

    Attributes:
        encode: embeds texts.
        backbone: frozen video transformer.
        schedule: of the noise.
        decoder: draws frames.
    """

    encode: PromptEncoder | None = None
    backbone: VideoBackbone | None = None
    schedule: Schedule | None = None
    decoder: TinyDecoder | None = None

    def read_by(self, kind: TrunkKind) -> Given:
        """Return it without the backbone or decoder that a trunk of this kind does not read."""
        return replace(
            self,
            backbone=self.backbone if kind.needs_backbone else None,
            decoder=self.decoder if kind.needs_codec else None,
        )
