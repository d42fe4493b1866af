"""A device that trains for no time: the agent's own transport and checks, without sensors and model.

Started by ``bench_round.py``, one process a device. Asks for a task, fetches and checks what it names, uploads an
update of the same bytes, hands it in. Prints one JSON line a task: its run and round, and when its poll was answered.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from wearfleet_edge.artifacts import ArtifactStore
from wearfleet_edge.federated import PlanStore
from wearfleet_edge.identity import load_enrolment
from wearfleet_edge.state import StateDirectory
from wearfleet_edge.transport.backoff import Backoff
from wearfleet_edge.transport.cloud import ReceiptStatus, Submission, Task
from wearfleet_edge.transport.rpc import RpcCloud
from wearfleet_protos.tensors import check_finite, decode_tensors, digest_of, encode_tensors


class EchoDevice:
    """Answers every task with the tensors it got, one value changed, so that no two devices send the same bytes.

    Args:
        folder: state of an enrolled device.
        number: the value.
    """

    def __init__(self, folder: Path, number: int) -> None:
        state = StateDirectory(folder)
        enrolment = load_enrolment(state)
        self._number = number
        self._cloud = RpcCloud.of_device(state, enrolment)
        self._artifacts = ArtifactStore(
            state.artifacts, self._cloud, Backoff(0.5, 5.0, lambda: 0.5), lambda s: bool(time.sleep(s))
        )
        self._plans = PlanStore(self._artifacts, enrolment.signing_keys)

    def serve(self) -> None:
        """Work until the process is ended."""
        while True:
            task = self._cloud.poll_task(30.0, "").task
            if task is not None:
                asked = time.monotonic()
                self._answer(task)
                print(json.dumps({"run": task.run_id, "round": task.round_number, "at": asked}), flush=True)

    def _answer(self, task: Task) -> None:
        plan = self._plans.fetch(task)
        data = self._artifacts.fetch_once(task.tensors_digest, task.tensors_bytes, task.tensors)
        tensors = decode_tensors(data, plan.download_specs())
        check_finite(tensors)
        for array in tensors.values():
            array.flat[0] = self._number
        update = encode_tensors(tensors)
        receipt = self._cloud.submit(
            Submission(
                run_id=task.run_id, round_number=task.round_number, attempt_id=task.attempt_id,
                update_digest=digest_of(update), base_digest=task.tensors_digest, num_examples=1, num_steps=1,
                metrics={}, train_seconds=0.0, local_state_reset=False,
            ),
            update,
        )  # fmt: skip
        if receipt.status is not ReceiptStatus.ACCEPTED:
            sys.exit(f"the update was not accepted: {receipt}")


if __name__ == "__main__":
    EchoDevice(Path(sys.argv[1]), int(sys.argv[2])).serve()
