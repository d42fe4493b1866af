"""How updates are coded on their way to the service: a part of every strategy."""

from dataclasses import dataclass, fields
from typing import Final

from wearfleet_protos.codecs import FLOAT32, PARAMETERS, UpdateCodec
from wearfleet_protos.errors import ConfigError, ProtocolError

__all__ = ["Compression"]

_PREFIX: Final = "codec_"


@dataclass(frozen=True, slots=True)
class Compression:
    """The codec of updates; ``wearfleet_protos.codecs`` says what each does.

    Args:
        codec: ``float32`` (as it is), ``fp16``, ``bf16``, ``int8``, ``int4``, ``topk``, ``randk``, ``sign``,
            ``powersgd``.
        codec_fraction: share of the numbers that topk and randk send.
        codec_rank: of powersgd.
        codec_warmup_rounds: rounds in which topk comes down from a quarter of the numbers.

    Raises:
        ConfigError: an unknown codec, or a parameter that is out of range or not one of this codec.

    Source: specs/federated.md section 19.
    """

    codec: str = "float32"
    codec_fraction: float = 0.01
    codec_rank: int = 2
    codec_warmup_rounds: int = 5

    def __post_init__(self) -> None:
        try:
            own = {_PREFIX + name for name in PARAMETERS[self.update_codec.name]}
        except ProtocolError as error:
            raise ConfigError(str(error)) from error
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in {"codec", *own} and value != field.default:
                raise ConfigError(f"codec {self.codec} has no {field.name}; leave it out (got {value})")

    @property
    def update_codec(self) -> UpdateCodec:
        """As the plan declares it."""
        names = PARAMETERS.get(self.codec, ())
        return UpdateCodec(self.codec, **{name: getattr(self, _PREFIX + name) for name in names})

    @property
    def addition(self) -> str:
        """As ``composition.Addition``."""
        return "" if self.update_codec == FLOAT32 else "compression"
