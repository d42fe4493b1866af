"""Canonical JSON: one byte string for one document, so that it can be hashed and signed."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, Final, TypeVar, cast

from wearfleet_protos.errors import ProtocolError

__all__ = ["MAX_DOCUMENT_BYTES", "canonical_json", "parse_json", "take"]

MAX_DOCUMENT_BYTES: Final = 4 * 1024 * 1024
"""Largest manifest or plan document that is parsed, in bytes."""

T = TypeVar("T")


def canonical_json(value: object) -> bytes:
    """UTF-8 JSON with sorted keys, no spaces, shortest float form; NaN and infinity are refused.

    Raises:
        ProtocolError: a value has no JSON form.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"document has a value without canonical form: {error}") from error
    return text.encode()


def parse_json(data: bytes, what: str, max_bytes: int = MAX_DOCUMENT_BYTES) -> dict[str, Any]:
    """Parse a canonical document; a document that is not in canonical form is refused.

    Raises:
        ProtocolError: too large, not JSON, not an object, or not canonical.
    """
    if len(data) > max_bytes:
        raise ProtocolError(f"{what} has {len(data)} bytes, at most {max_bytes} are accepted")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} must be a JSON object, got {type(value).__name__}")
    if canonical_json(value) != data:
        raise ProtocolError(f"{what} is not in canonical form; it was changed after it was written")
    return cast("dict[str, Any]", value)


def take(value: object, cls: type[T], what: str) -> dict[str, Any]:
    """Check that ``value`` is an object with exactly the fields of dataclass ``cls``.

    Raises:
        ProtocolError: says which field is missing or unknown.
    """
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} must be an object, got {type(value).__name__}")
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    missing, unknown = sorted(names - value.keys()), sorted(value.keys() - names)
    if missing or unknown:
        raise ProtocolError(f"{what}: missing {missing}, unknown {unknown}")
    return value
