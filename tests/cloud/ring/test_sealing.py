"""Sealed hops: only the sites read them; what was changed, comes again or is of somebody else is refused."""

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from oracles.compiled import compiled_plan
from oracles.small_federation import arrays, model
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Arrays, Contribution
from wearfleet_cloud.federated.sealed_ring import HOP, HOPS, KEY, KEYS, MADE, SEEN, Hop, RingKey
from wearfleet_cloud.ring.sealing import Route, Sealer, is_sealed
from wearfleet_edge.trainer import start_state, upload_tensors
from wearfleet_protos.errors import AggregationError, ConfigError, IntegrityError
from wearfleet_protos.plan import Plan
from wearfleet_protos.secagg.identity import KnownKeys, KnownKeySigner
from wearfleet_protos.tensors import digest_of

STRATEGY = create_strategy("metafed", {"sealed": "on", "seats": 4, "warm_rounds": 1, "laps": 2})
NAMES = ("east", "north", "south")
RUN, DIGEST = "metafed-1", digest_of(b"plan")


def plan() -> Plan:
    return compiled_plan(STRATEGY, model("cnn"), plan_id="ring", seed=5)[0]


class Ring:
    """The service's fold, and the sites' sealers; models are drawn at random instead of trained."""

    def __init__(self) -> None:
        signers = {name: KnownKeySigner(Ed25519PrivateKey.generate()) for name in NAMES}
        known = KnownKeys({name: signer.credential for name, signer in signers.items()})
        self.sealers = {
            name: Sealer(name, signers[name], known, lambda _, i=i: bytes([i + 1]) * 32)
            for i, name in enumerate(NAMES)
        }
        network = arrays(model("cnn"))
        self.tensors: Arrays = {
            s.name: np.asarray(network.get(s.name, np.zeros(s.shape)), s.dtype)
            for s in plan().download_specs()
        }
        self.state: Arrays = {}
        self.local: dict[str, Arrays] = {}
        self.number = 0

    def before(self, name: str, number: int, tensors: Arrays | None = None) -> dict[str, np.ndarray]:
        start = start_state(plan(), dict(tensors or self.tensors), dict(self.local.get(name, {})))
        return self.sealers[name].opened(plan(), start, Route(RUN, DIGEST, number))

    def made(self, name: str, number: int) -> tuple[dict[str, np.ndarray], Arrays]:
        """A turn's result: the state after it, and the update."""
        start = start_state(plan(), dict(self.tensors), dict(self.local.get(name, {})))
        before = self.before(name, number)
        drawn = arrays(model("cnn", seed=10 * number + NAMES.index(name)))
        after = self.sealers[name].sealed(plan(), {**before, **drawn}, Route(RUN, DIGEST, number))
        return after, upload_tensors(plan(), start, after)

    def fold(self, updates: dict[str, Arrays]) -> None:
        parts = [Contribution(name, 10, lambda u=u: u, 1) for name, u in updates.items()]
        folded = STRATEGY.server(plan().tensors, self.tensors, self.state, parts)
        self.tensors, self.state = folded.tensors, folded.state

    def round(self, *names: str) -> dict[str, np.ndarray]:
        self.number += 1
        done = {name: self.made(name, self.number) for name in names}
        self.fold({name: update for name, (_, update) in done.items()})
        for name, (after, _) in done.items():
            self.local[name] = {s.name: after[s.name] for s in plan().local_specs()}
        return done[names[-1]][0]


@pytest.fixture
def ring() -> Ring:
    warm = Ring()
    warm.round(*NAMES)
    return warm


def test_every_site_opens_the_hop_and_the_service_cannot(ring: Ring) -> None:
    after = ring.round("east")
    for name in NAMES:
        opened = ring.before(name, 3)
        for tensor in ("head.weight", "head.bias"):
            np.testing.assert_array_equal(opened["teacher/" + tensor], after[tensor])
    everything = b"".join(np.asarray(array).tobytes() for array in ring.tensors.values())
    assert after["head.weight"].tobytes() not in everything
    assert not any(name.startswith(("teacher/", "sent/")) for name in ring.tensors)
    np.testing.assert_array_equal(ring.tensors["head.weight"], arrays(model("cnn"))["head.weight"])
    assert is_sealed(plan())


def test_the_ring_goes_round_and_the_last_stage_sends_one_model_to_all(ring: Ring) -> None:
    for turn in range(6):
        (name,) = STRATEGY.cohort(NAMES, 2 + turn, ring.state) or ()
        assert name == NAMES[turn % 3]
        after = ring.round(name)
    assert float(ring.tensors["stage"]) == 2.0
    for name in NAMES:  # the maker too
        np.testing.assert_array_equal(ring.before(name, 8)["teacher/head.weight"], after["head.weight"])


def _hop(ring: Ring) -> Hop:
    return Hop.from_array(np.asarray(ring.tensors[HOP], np.uint8))


def _with(ring: Ring, hop: Hop) -> Arrays:
    return {**ring.tensors, HOP: hop.to_array(ring.tensors[HOP].size)}


CHANGES = {
    "one bit of the body": (
        lambda hop: replace(hop, body=bytes([hop.body[0] ^ 1]) + hop.body[1:]),
        "signature",
    ),
    "another run": (lambda hop: replace(hop, run_id="metafed-2"), "belongs to run"),
    "another plan": (lambda hop: replace(hop, plan=digest_of(b"other")), "belongs to run"),
    "another hop": (lambda hop: replace(hop, number=7), "was announced"),
    "another round": (lambda hop: replace(hop, round_number=1), "signature"),
    "another sender": (lambda hop: replace(hop, sender="south"), "not the known one"),
    "a receiver less": (lambda hop: replace(hop, wrapped={}), "signature"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_hop_that_the_service_changed_is_refused(ring: Ring, what: str) -> None:
    ring.round("east")
    change, words = CHANGES[what]
    with pytest.raises(IntegrityError, match=words):
        ring.before("north", 3, _with(ring, change(_hop(ring))))


def test_a_hop_signed_by_its_sender_but_changed_inside_is_refused(ring: Ring) -> None:
    ring.round("east")
    from wearfleet_cloud.ring import sealing

    forged = replace(_hop(ring), body=bytes(len(_hop(ring).body)))
    signed = replace(forged, signature=ring.sealers["east"].signer.sign(sealing._message(forged)))
    with pytest.raises(IntegrityError, match="cannot be opened"):
        ring.before("north", 3, _with(ring, signed))


def test_an_older_hop_is_refused_by_whoever_has_seen_a_newer_one(ring: Ring) -> None:
    ring.round("east")
    old = dict(ring.tensors)
    ring.round("north")
    ring.round("south")
    np.testing.assert_array_equal(ring.before("east", 5)["teacher/head.bias"].shape, (4,))
    for name, seen in (("north", 2), ("south", 3)):
        assert int(ring.local[name][SEEN]) == seen
        with pytest.raises(IntegrityError, match="came again"):
            ring.before(name, 5, old)


def test_the_service_takes_no_hop_out_of_sequence_or_of_another_site_or_not_for_all(ring: Ring) -> None:
    _, update = ring.made("east", 2)
    hop = Hop.from_array(np.asarray(update[MADE], np.uint8))
    size = update[MADE].size
    for changed, words in (
        (replace(hop, number=2), "hop 1 was expected"),
        (replace(hop, sender="north"), "sent a hop of"),
        (replace(hop, wrapped={"east": hop.wrapped["east"]}), "is not for north, south"),
    ):
        with pytest.raises(AggregationError, match=words):
            ring.fold({"east": {**update, MADE: changed.to_array(size)}})
    with pytest.raises(AggregationError, match="wfh1"):
        ring.fold({"east": {**update, MADE: np.zeros(size, np.uint8)}})
    assert float(ring.tensors[HOPS]) == 0.0
    ring.fold({"east": update})
    assert float(ring.tensors[HOPS]) == 1.0


def test_a_key_that_its_site_has_not_signed_is_refused(ring: Ring) -> None:
    keys = np.asarray(ring.tensors[KEYS], np.uint8).copy()
    slot = keys[:2048]
    stolen = replace(RingKey.from_array(slot), public=bytes(range(32)))
    keys[:2048] = stolen.to_array()
    ring.tensors = {**ring.tensors, KEYS: keys}
    with pytest.raises(IntegrityError, match="signature of east"):
        ring.made("north", 2)


def test_a_client_that_cannot_seal_is_left_out_of_the_ring() -> None:
    ring = Ring()
    updates = {name: ring.made(name, 1)[1] for name in NAMES}
    updates["north"] = {**updates["north"], KEY: np.zeros_like(updates["north"][KEY])}
    ring.fold(updates)
    assert STRATEGY.cohort(NAMES, 3, ring.state) == ("south",)  # after east


def test_more_sites_than_seats_are_refused_with_what_to_do() -> None:
    few = create_strategy("metafed", {"sealed": "on", "seats": 2})
    plan, _ = compiled_plan(few, model("cnn"), plan_id="few", seed=5)
    ring = Ring()
    updates = {name: ring.made(name, 1)[1] for name in NAMES}
    size = next(s.shape[0] for s in plan.tensors if s.name == MADE)
    parts = [
        Contribution(n, 10, lambda u=u: {**u, MADE: np.zeros(size, np.uint8)}, 1) for n, u in updates.items()
    ]
    tensors = {s.name: np.zeros(s.shape, s.dtype) for s in plan.download_specs()}
    with pytest.raises(AggregationError, match="seats=3"):
        few.server(plan.tensors, tensors, {}, parts)
    with pytest.raises(ConfigError, match="seats"):
        create_strategy("metafed", {"seats": 0})
