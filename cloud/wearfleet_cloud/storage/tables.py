"""The tables. Times are nanoseconds since 1970 UTC in 64 bits; digests are ``sha256:<hex>``."""

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

__all__ = [
    "METADATA",
    "artifacts",
    "audit",
    "device_health",
    "devices",
    "enrolment_codes",
    "models",
    "predictions",
    "privacy_spends",
    "releases",
    "revision",
    "rounds",
    "runs",
    "streams",
    "submissions",
    "windows",
]

METADATA: Final = MetaData()

_SERIAL: Final = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only INTEGER keys

revision: Final = Table(
    "revision",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False),
)
"""One row; its value grows when a command changes what a running service must notice."""

devices: Final = Table(
    "devices",
    METADATA,
    Column("device_id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("revoked_ns", BigInteger),
    Column("enrolled_ns", BigInteger, nullable=False),
    Column("certificate_serial", String(64), nullable=False),
    Column("certificate_expires_ns", BigInteger, nullable=False),
    Column("agent_version", String(64), nullable=False),
    Column("last_seen_ns", BigInteger, nullable=False),
    Column("manifest_digest", String(80), nullable=False, default=""),
    Column("model_version", Integer, nullable=False, default=0),
    Column("personalised", Boolean, nullable=False, default=False),
    Column("refusal", String(500), nullable=False, default=""),
    Column("quarantined_ns", BigInteger),
    Column("quarantine_reason", String(500), nullable=False, default=""),
)

enrolment_codes: Final = Table(
    "enrolment_codes",
    METADATA,
    Column("code_hash", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("expires_ns", BigInteger, nullable=False),
    Column("device_id", String(64), ForeignKey("devices.device_id")),
    Column("key_hash", String(64)),
)
"""The code itself is never stored. ``key_hash`` lets the same device repeat a call whose answer was lost."""

artifacts: Final = Table(
    "artifacts",
    METADATA,
    Column("digest", String(80), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("media_type", String(120), nullable=False),
    Column("created_ns", BigInteger, nullable=False),
)

models: Final = Table(
    "models",
    METADATA,
    Column("model_id", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("manifest_digest", String(80), ForeignKey("artifacts.digest"), nullable=False),
    Column("model_digest", String(80), ForeignKey("artifacts.digest"), nullable=False),
    Column("published_ns", BigInteger, nullable=False),
)

releases: Final = Table(
    "releases",
    METADATA,
    Column("release_id", _SERIAL, primary_key=True, autoincrement=True),
    Column("model_id", String(64), nullable=False),
    Column("version", Integer, nullable=False),
    Column("released_ns", BigInteger, nullable=False),
    ForeignKeyConstraint(["model_id", "version"], ["models.model_id", "models.version"]),
)
"""The newest row is what every device should run."""

runs: Final = Table(
    "runs",
    METADATA,
    Column("run_id", String(64), primary_key=True),
    Column("strategy", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("plan_digest", String(80), ForeignKey("artifacts.digest"), nullable=False),
    Column("tensors_digest", String(80), ForeignKey("artifacts.digest"), nullable=False),
    Column("settings", JSON, nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("finished_ns", BigInteger),
    Column("reason", String(500), nullable=False, default=""),
)
"""``tensors_digest`` is the newest global version; ``state`` is running, done or stopped."""

rounds: Final = Table(
    "rounds",
    METADATA,
    Column("run_id", String(64), ForeignKey("runs.run_id"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("base_digest", String(80), ForeignKey("artifacts.digest"), nullable=False),
    Column("result_digest", String(80), ForeignKey("artifacts.digest")),
    Column("opened_ns", BigInteger, nullable=False),
    Column("closed_ns", BigInteger),
    Column("bytes_down", BigInteger, nullable=False, default=0),
    Column("bytes_up", BigInteger, nullable=False, default=0),
    Column("snapshot", JSON, nullable=False),
)
"""``snapshot`` is the state machine's own value, as ``federated/round.py`` writes it."""

submissions: Final = Table(
    "submissions",
    METADATA,
    Column("run_id", String(64), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("attempt_id", String(64), primary_key=True),
    Column("device_id", String(64), ForeignKey("devices.device_id"), nullable=False),
    Column("update_digest", String(80), nullable=False),
    Column("num_examples", BigInteger, nullable=False),
    Column("num_steps", BigInteger, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("train_seconds", Float, nullable=False),
    Column("local_state_reset", Boolean, nullable=False),
    Column("received_ns", BigInteger, nullable=False),
    ForeignKeyConstraint(["run_id", "round"], ["rounds.run_id", "rounds.round"]),
)
"""The primary key makes a repeated submission a duplicate, never a second vote."""

privacy_spends: Final = Table(
    "privacy_spends",
    METADATA,
    Column("run_id", String(64), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("device_id", String(64), ForeignKey("devices.device_id"), primary_key=True),
    Column("noise_multiplier", Float, nullable=False),
    Column("sampling_rate", Float, nullable=False),
    Column("count", Integer, nullable=False),
    Column("unit", String(16), nullable=False, server_default="client"),
    Column("entered_ns", BigInteger, nullable=False),
    ForeignKeyConstraint(["run_id", "round"], ["rounds.run_id", "rounds.round"]),
)
"""The ledger of privacy; the primary key makes a second entry for the same part in a round impossible."""

streams: Final = Table(
    "streams",
    METADATA,
    Column("stream_id", _SERIAL, primary_key=True, autoincrement=True),
    Column("device_id", String(64), ForeignKey("devices.device_id"), nullable=False),
    Column("boot_id", String(32), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("received", BigInteger, nullable=False, default=0),
    Column("duplicated", BigInteger, nullable=False, default=0),
    Column("highest_sequence", BigInteger, nullable=False, default=-1),
    UniqueConstraint("device_id", "boot_id", "kind"),
)
"""One start of one agent and one kind of message: what came, what came again, the highest number seen."""

windows: Final = Table(
    "windows",
    METADATA,
    Column("stream_id", _SERIAL, ForeignKey("streams.stream_id"), primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("received_ns", BigInteger, nullable=False, index=True),
    Column("sample_index", BigInteger, nullable=False),
    Column("wall_time_ns", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
)
"""``payload`` is the checked protobuf message as it came."""

predictions: Final = Table(
    "predictions",
    METADATA,
    Column("stream_id", _SERIAL, ForeignKey("streams.stream_id"), primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("received_ns", BigInteger, nullable=False, index=True),
    Column("sample_index", BigInteger, nullable=False),
    Column("wall_time_ns", BigInteger, nullable=False),
    Column("model_digest", String(80), nullable=False),
    Column("model_version", Integer, nullable=False),
    Column("personalised", Boolean, nullable=False),
    Column("label", Integer, nullable=False),
    Column("annotated_label", Integer),
    Column("confidence", Float, nullable=False),
    Column("ood_score", Float, nullable=False),
    Column("out_of_distribution", Boolean, nullable=False),
    Column("inference_ns", BigInteger, nullable=False),
    Column("probabilities", LargeBinary, nullable=False),
)
"""``probabilities`` are little-endian float32."""

device_health: Final = Table(
    "device_health",
    METADATA,
    Column("device_id", String(64), ForeignKey("devices.device_id"), primary_key=True),
    Column("received_ns", BigInteger, nullable=False),
    Column("boot_id", String(32), nullable=False),
    Column("online", Boolean, nullable=False),
    Column("uptime_s", Float, nullable=False, default=0.0),
    Column("rss_bytes", BigInteger, nullable=False, default=0),
    Column("outbox_depth", BigInteger, nullable=False, default=0),
    Column("outbox_lost", BigInteger, nullable=False, default=0),
    Column("windows_total", BigInteger, nullable=False, default=0),
    Column("inference_us_p50", Float, nullable=False, default=0.0),
    Column("inference_us_p99", Float, nullable=False, default=0.0),
)
"""The newest health report and status of a device."""

audit: Final = Table(
    "audit",
    METADATA,
    Column("entry", BigInteger, primary_key=True, autoincrement=False),
    Column("at_ns", BigInteger, nullable=False),
    Column("action", String(40), nullable=False),
    Column("subject", String(200), nullable=False),
    Column("detail", String(500), nullable=False),
    Column("hash", String(64), nullable=False),
)
"""Append-only; ``hash`` covers the entry and the hash before it."""
