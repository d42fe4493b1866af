"""A device in a federated run, everything real but the network."""

import time
from random import Random

import numpy as np
from edge.simulators import Signer, SimulatedCloud
from edge.tiny_graphs import LABELS, TENSORS, make_plan, make_recording, make_release
from wearfleet_edge.artifacts import ArtifactStore
from wearfleet_edge.federated import Device, FederatedWorker
from wearfleet_edge.local_state import LocalState
from wearfleet_edge.models import ActiveModel
from wearfleet_edge.own_windows import OwnWindows
from wearfleet_edge.runtime import Evaluation
from wearfleet_edge.slots import Slots
from wearfleet_edge.state import StateDirectory
from wearfleet_edge.trainer import Limits
from wearfleet_edge.transport.backoff import Backoff
from wearfleet_edge.transport.cloud import Task
from wearfleet_edge.wearer import Wearer
from wearfleet_protos.tensors import encode_tensors


class Bench:
    """One device with everything real but the network."""

    def __init__(self, root):
        self.state = StateDirectory(root)
        self.state.create()
        self.signer = Signer()
        self.cloud = SimulatedCloud()
        self.stopping = False
        self.max_bytes = 1e9
        self.member, self.secure_only = None, False
        self.active = ActiveModel()
        data, manifest = make_release()
        slots = Slots(self.state.models, self.signer.keys)
        self.active.use(slots.install(self.signer.manifest(manifest), data), None)
        self.wearer = Wearer((make_recording(),), LABELS, 0.5)
        self.restart()

    def restart(self):
        """A new process on the same disk."""
        self.local = LocalState(self.state)
        backoff = Backoff(0.001, 0.002, Random(0).random)
        wait = lambda _seconds: self.stopping  # noqa: E731
        self.artifacts = ArtifactStore(self.state.artifacts / "plans", self.cloud, backoff, wait)
        device = Device(
            keys=self.signer.keys,
            trainer=OwnWindows(
                self.wearer.training_data, lambda: Evaluation(3, 5, np.zeros((2, 2), np.int64))
            ),
            limits=lambda s: Limits(s, 1e12, lambda: 0, time.monotonic, lambda: self.stopping),
            max_bytes=self.max_bytes,
            poll_seconds=0.0,
            wait=wait,
            member=lambda: self.member,
            secure_only=self.secure_only,
        )
        self.worker = FederatedWorker(
            cloud=self.cloud,
            artifacts=self.artifacts,
            local=self.local,
            active=self.active,
            device=device,
            backoff=backoff,
        )

    def offer(self, tiny=None, *, round_number=1, personalise=False, tensors=None, signer=None, **more):
        tiny = tiny or make_plan()
        for graph in tiny.graphs.values():
            self.cloud.add(graph)
        document = (signer or self.signer).plan(tiny.plan)
        body = encode_tensors(tensors or TENSORS)
        task = Task(
            "run-1", round_number, f"attempt-{round_number}", personalise,
            self.cloud.add(document), len(document), self.cloud.add(body), len(body), 60.0, **more,
        )  # fmt: skip
        self.cloud.tasks.append(task)
        return task

    def kept(self, plan=None):
        return self.local.local_tensors("run-1", (plan or make_plan().plan).local_specs())[0]
