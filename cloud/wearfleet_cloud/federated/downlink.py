"""How global tensors are sent to the devices: a part of every strategy."""

from dataclasses import dataclass, fields
from typing import Final

from wearfleet_protos.codecs import FLOAT32, PARAMETERS, UpdateCodec
from wearfleet_protos.errors import ConfigError, ProtocolError

__all__ = ["Downlink"]

_PREFIX: Final = "downlink_"


@dataclass(frozen=True, slots=True)
class Downlink:
    """What goes down in each round; ``wearfleet_protos.codecs`` says what each codec does.

    Args:
        downlink: ``whole`` tensors; their exact ``difference`` to what the device holds; or the codec of a lossy one:
            ``fp16``, ``bf16``, ``int8``, ``int4``, ``topk``, ``randk``, ``sign``.
        downlink_fraction: share of the numbers that topk and randk send.
        downlink_warmup_rounds: rounds in which topk comes down from a quarter of the numbers.

    Raises:
        ConfigError: an unknown codec, or a parameter that is out of range or not one of this codec.

    Source: specs/federated.md section 19 (down-link).
    """

    downlink: str = "whole"
    downlink_fraction: float = 0.01
    downlink_warmup_rounds: int = 5

    def __post_init__(self) -> None:
        if self.downlink == FLOAT32.name:
            raise ConfigError("downlink has no float32: take whole tensors, or their exact difference")
        if self.downlink == "powersgd":
            raise ConfigError(
                "downlink has no powersgd: products of matrices do not have the same bits on every machine; take int8, "
                "topk or sign"
            )
        try:
            own = {_PREFIX + name for name in PARAMETERS[(self.codec or FLOAT32).name]}
        except ProtocolError as error:
            raise ConfigError(f"{error}; or whole, or difference") from error
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in {"downlink", *own} and value != field.default:
                raise ConfigError(f"downlink {self.downlink} has no {field.name}; leave it out (got {value})")

    @property
    def codec(self) -> UpdateCodec | None:
        """As the plan declares it: None for whole tensors, float32 for exact differences."""
        if self.downlink == "whole":
            return None
        if self.downlink == "difference":
            return FLOAT32
        names = PARAMETERS.get(self.downlink, ())
        return UpdateCodec(self.downlink, **{name: getattr(self, _PREFIX + name) for name in names})

    @property
    def addition(self) -> str:
        """As ``composition.Addition``."""
        return "" if self.downlink == "whole" else "downlink"
