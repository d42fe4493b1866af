"""Starting and stopping a federated run from outside: the service notices through the database."""

import secrets
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray
from wearfleet_protos.errors import ConfigError, IntegrityError
from wearfleet_protos.plan import PLAN_MEDIA_TYPE, Plan
from wearfleet_protos.tensors import (
    Digest,
    TensorGroup,
    TensorRole,
    TensorSpec,
    check_finite,
    check_tensors,
    digest_of,
    encode_tensors,
)

from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.cohort import policies_of
from wearfleet_cloud.federated.privacy.central import check_plan
from wearfleet_cloud.fleet.registry import ONNX_MEDIA_TYPE
from wearfleet_cloud.fleet.signing import SigningKeys
from wearfleet_cloud.service.run_context import RunSettings
from wearfleet_cloud.storage.audit import append_audit
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_cloud.storage.catalog import insert_artifact
from wearfleet_cloud.storage.database import Database
from wearfleet_cloud.storage.run_records import RunRow, insert_run

__all__ = ["TENSORS_MEDIA_TYPE", "start_run", "tensors_of_model"]

TENSORS_MEDIA_TYPE = "application/vnd.safetensors"


def tensors_of_model(model: bytes, specs: tuple[TensorSpec, ...]) -> dict[str, NDArray[np.generic]]:
    """The start values of a run: the initialisers of an exported model.

    Args:
        model: ONNX bytes whose initialisers carry the names of the model's tensors.
        specs: ``Plan.download_specs()``.

    Raises:
        IntegrityError: a tensor of the model other than a counter is not in the graph.
        ShapeError: one has another shape or type.
    """
    found = {
        entry.name: onnx.numpy_helper.to_array(entry)
        for entry in onnx.load_model_from_string(model).graph.initializer
    }
    tensors: dict[str, NDArray[np.generic]] = {}
    for spec in specs:
        if spec.name in found:
            tensors[spec.name] = found[spec.name].reshape(spec.shape)
        elif spec.role == TensorRole.COUNTER or spec.group == TensorGroup.ANCHOR:
            # training counts batches, the exported model does not; a strategy's own tensors begin at 0
            tensors[spec.name] = np.zeros(spec.shape, spec.dtype)
        else:
            raise IntegrityError(
                f"the model's graph has no initialiser {spec.name!r}; export it with wearfleet"
            )
    check_tensors(tensors, specs)
    return tensors


def start_run(
    database: Database,
    blobs: Blobs,
    keys: SigningKeys,
    *,
    plan: Plan,
    graphs: Mapping[Digest, bytes],
    tensors: Mapping[str, NDArray[np.generic]],
    settings: RunSettings,
    now_ns: int,
) -> str:
    """Store and sign everything a run needs, and start it.

    Args:
        database: of the service.
        blobs: of the service.
        keys: sign the plan.
        plan: the client side.
        graphs: bytes of every graph that the plan names.
        tensors: start values of ``plan.download_specs()``.
        settings: rounds and policies; their options belong to the plan's strategy.
        now_ns: present time.

    Returns:
        The run's id.

    Raises:
        IntegrityError: a graph is missing or is not what the plan says.
        ShapeError: the start values do not fit the plan, or are not finite.
        ConfigError: the strategy does not know an option, its privacy cannot protect what the plan uploads, it has
            buffers instead of the cohort that was chosen, cohorts are too small or large for secure aggregation, or
            the plan was built with another codec of updates or downloads than the options say.
    """
    strategy = create_strategy(plan.strategy, settings.options)
    _check_codec(strategy, plan)
    check_plan(strategy, plan)
    cohort, policy = policies_of(strategy.buffering, settings.cohort, settings.policy)
    cohort, policy = strategy.secure.policies(cohort, policy)
    settings = replace(settings, cohort=cohort, policy=policy)
    _check_graphs(plan, graphs)
    check_tensors(tensors, plan.download_specs())
    check_finite(tensors)
    document, start = keys.sign(plan.to_bytes(), PLAN_MEDIA_TYPE), encode_tensors(tensors)
    stored = [(blobs.put(data), len(data), ONNX_MEDIA_TYPE) for data in graphs.values()]
    plan_digest, start_digest = blobs.put(document), blobs.put(start)
    stored += [(plan_digest, len(document), PLAN_MEDIA_TYPE), (start_digest, len(start), TENSORS_MEDIA_TYPE)]
    run_id = f"{plan.strategy}-{secrets.token_hex(4)}"
    row = RunRow(run_id, plan.strategy, "running", plan_digest, start_digest, settings.to_dict(), now_ns)
    with database.write() as connection:
        for digest, size, media_type in stored:
            insert_artifact(connection, digest, size, media_type, now_ns)
        insert_run(connection, row)
        append_audit(connection, now_ns, "federation.start", run_id, f"plan {plan_digest}")
    return run_id


def _check_codec(strategy: Strategy, plan: Plan) -> None:
    """What the options may be combined with was checked with their codecs, so they must be the plan's."""
    pairs = {
        "codec": (strategy.compression.update_codec, plan.upload.codec),
        "downlink": (strategy.downlink.codec, plan.downlink),
    }
    for option, (chosen, built) in pairs.items():
        if chosen != built:
            said, has = (codec.to_json() if codec else "whole" for codec in (chosen, built))
            raise ConfigError(
                f"the options say {option} {said}, the plan was built with {has}; give the same --set {option}=... "
                "here and where the plan was built"
            )


def _check_graphs(plan: Plan, graphs: Mapping[Digest, bytes]) -> None:
    for phase in plan.phases:
        data = graphs.get(phase.graph)
        if data is None or digest_of(data) != phase.graph or len(data) != phase.graph_bytes:
            raise IntegrityError(
                f"phase {phase.name}: graph {phase.graph} is missing or was changed; build the plan again"
            )
