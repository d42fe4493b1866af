"""Messages of federated rounds from and to our own types; both the calls and the stream of work use them."""

import math
import time
from typing import Final

from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.secagg.codec import setup_to_pb
from wearfleet_protos.v1 import federation_pb2, secagg_pb2

from wearfleet_cloud.federated.round_events import Answer, AnswerStatus
from wearfleet_cloud.service.handlers import check_metrics
from wearfleet_cloud.service.leases import DeviceClass
from wearfleet_cloud.service.run_context import Task
from wearfleet_cloud.storage.run_records import Submission

__all__ = ["class_of", "fill_task", "receipt_of", "submission_of", "wait_of"]

_LONGEST_WAIT_S: Final = 60.0
_RECEIPTS: Final = {
    AnswerStatus.ACCEPTED: federation_pb2.RECEIPT_STATUS_ACCEPTED,
    AnswerStatus.DUPLICATE: federation_pb2.RECEIPT_STATUS_DUPLICATE,
    AnswerStatus.STALE: federation_pb2.RECEIPT_STATUS_STALE,
    AnswerStatus.REJECTED: federation_pb2.RECEIPT_STATUS_REJECTED,
    AnswerStatus.DENIED: federation_pb2.RECEIPT_STATUS_REJECTED,
}
_CLASSES: Final = {
    federation_pb2.DEVICE_CLASS_GATEWAY: DeviceClass.GATEWAY,
    federation_pb2.DEVICE_CLASS_PHONE: DeviceClass.PHONE,
    federation_pb2.DEVICE_CLASS_WEARABLE: DeviceClass.WEARABLE,
}
_KINDS: Final = {
    "train": federation_pb2.TASK_KIND_TRAIN,
    "personalise": federation_pb2.TASK_KIND_PERSONALISE,
}


def wait_of(request: federation_pb2.PollTaskRequest | secagg_pb2.SecureRequest) -> float:
    """Seconds that a question may wait."""
    wait_s = request.wait_seconds if math.isfinite(request.wait_seconds) else 0.0
    return min(max(wait_s, 0.0), _LONGEST_WAIT_S)


def class_of(request: federation_pb2.PollTaskRequest) -> DeviceClass | None:
    """What a device says it is; None when it does not, or says what this version does not know."""
    return _CLASSES.get(request.device_class)


def fill_task(message: federation_pb2.FederatedTask, task: Task) -> None:
    """Write a task, but not its tensors, into a message."""
    message.run_id, message.round, message.attempt_id = task.run_id, task.round, task.attempt_id
    message.kind = _KINDS[task.kind]
    message.plan_digest, message.plan_bytes = task.plan_digest, task.plan_bytes
    message.tensors_digest, message.tensors_bytes = task.tensors_digest, task.tensors_bytes
    if task.secure is not None:
        message.kind = federation_pb2.TASK_KIND_TRAIN_SECURELY
        message.secure.CopyFrom(setup_to_pb(task.secure))
    if task.difference is not None:
        message.held_digest = task.difference.held
        message.difference_digest = task.difference.digest
        message.difference_bytes = task.difference.size_bytes
    message.without_figures = task.without_figures
    message.deadline_unix_ns = int(task.deadline * 1e9)
    message.lease_seconds = task.lease_s
    message.remaining_seconds = max(0.0, task.deadline - time.time())


def submission_of(device_id: str, request: federation_pb2.SubmitUpdateRequest) -> Submission:
    """What a device hands in.

    Raises:
        ProtocolError: a number is out of range.
    """
    if not math.isfinite(request.train_seconds) or max(request.num_examples, request.num_steps) >= 2**53:
        raise ProtocolError("num_examples, num_steps or train_seconds is out of range")
    return Submission(
        run_id=request.run_id[:64],
        round=min(request.round, 2**31 - 1),
        attempt_id=request.attempt_id[:64],
        device_id=device_id,
        update_digest=request.update_digest[:80],
        num_examples=request.num_examples,
        num_steps=request.num_steps,
        train_seconds=request.train_seconds,
        local_state_reset=request.local_state_reset,
        received_ns=time.time_ns(),
        metrics=check_metrics(request.metrics),
    )


def receipt_of(answer: Answer) -> federation_pb2.SubmitUpdateResponse:
    """The message of an answer."""
    return federation_pb2.SubmitUpdateResponse(status=_RECEIPTS[answer.status], reason=answer.reason)
