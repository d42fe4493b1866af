"""Secure aggregation: processor time of a member and of the service by stage, and bytes on the wire, in one round.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_secagg.py [--members 8] [--size 100000] [--lost 1] [--csv FILE]``
from the repository root. Members sign with certificates of P-256, as devices do. Times are of the processor
(``time.process_time``), so that other work on the machine does not count; median of ``--rounds`` rounds. Each sum is
compared with the plain weighted mean before a figure is printed. Bytes are those of the protobuf messages and of the
masked update, without TLS and HTTP/2.
"""

import argparse
import csv
import datetime as dt
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from secure_rounds import answer_of, names, parameters, plain_mean, updates
from wearfleet_cloud.federated.privacy.secagg_server import (
    InputMasked,
    SecureRound,
    SendNotices,
    Stage,
    StageClosed,
    advance,
    unmask,
)
from wearfleet_cloud.fleet.identity import Authority
from wearfleet_edge.secagg_client import Member, SecureClient
from wearfleet_protos.secagg.codec import fill_answer, notice_to_pb, setup_to_pb
from wearfleet_protos.secagg.identity import CertificateSigner, CertificateVerifier
from wearfleet_protos.secagg.parameters import SecureParameters, default_neighbours
from wearfleet_protos.secagg.words import encode_words
from wearfleet_protos.v1 import secagg_pb2

T = TypeVar("T")

Seconds = defaultdict[tuple[str, str], float]


def signers_of(members: tuple[str, ...]) -> tuple[dict[str, CertificateSigner], CertificateVerifier]:
    """Certificates from an authority of their own."""
    now = dt.datetime.now(dt.UTC)
    signers = {}
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder) / "ca")
        for name in members:
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
            request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
            issued = authority.issue(request.public_bytes(serialization.Encoding.DER), name, "bench", now)
            leaf = x509.load_pem_x509_certificates(issued.chain_pem)[0]
            signers[name] = CertificateSigner(key, leaf.public_bytes(serialization.Encoding.DER))
        root = x509.load_pem_x509_certificate(authority.ca_pem)
    return signers, CertificateVerifier(root, lambda: dt.datetime.now(dt.UTC))


class Bench:
    """One round; the last ``lost`` members drop out after they shared their keys."""

    def __init__(
        self,
        chosen: SecureParameters,
        signers: dict[str, CertificateSigner],
        verifier: CertificateVerifier,
        lost: int,
    ) -> None:
        self.chosen = chosen
        self.lost = chosen.members[len(chosen.members) - lost :]
        self.seconds: Seconds = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)
        self.round = SecureRound(chosen, verifier)
        self.notices: dict[str, Any] = dict.fromkeys(chosen.members)
        self.updates = updates(chosen.members, chosen.size)
        self.clients = {
            name: self.timed(
                "member", Stage.ADVERTISE, lambda name=name: self._client(name, signers, verifier)
            )
            for name in chosen.members
        }
        for _ in chosen.members:
            self.bytes["down"] += setup_to_pb(chosen).ByteSize()

    def _client(
        self, name: str, signers: dict[str, CertificateSigner], verifier: CertificateVerifier
    ) -> SecureClient:
        return SecureClient(Member(name, signers[name], verifier, 2), self.chosen, self.chosen.run_id, 1)

    def timed(self, who: str, stage: str, work: Callable[[], T]) -> T:
        begin = time.process_time()
        made = work()
        self.seconds[who, str(stage)] += time.process_time() - begin
        return made

    def play(self) -> float:
        """The largest error of the mean, in steps of the quantiser."""
        while self.round.stage != Stage.COMPLETE:
            stage = self.round.stage
            for name in sorted(self.notices):
                if not (name in self.lost and stage not in (Stage.ADVERTISE, Stage.SHARE)):
                    answer = self.timed("member", stage, lambda name=name: answer_of(self, name))
                    self._count_up(answer)
                    self.timed("service", stage, lambda answer=answer: self._happen(answer))
            if self.round.stage == stage:
                self._happen(StageClosed(stage))
        total = self.timed("service", "sum", lambda: unmask(self.round))
        expected = plain_mean(self.updates, total.members, self.chosen)
        return float(np.abs(total.mean - expected).max() * self.chosen.levels / (2 * self.chosen.clip))

    def _happen(self, event: Any) -> None:
        self.round, effects = advance(self.round, event)
        for effect in effects:
            if isinstance(effect, SendNotices):
                self.notices = dict(effect.notices)
                for notice in effect.notices.values():
                    self.bytes["down"] += notice_to_pb(notice).ByteSize()

    def _count_up(self, answer: Any) -> None:
        if isinstance(answer, InputMasked):
            self.bytes["up_masked"] += len(encode_words(answer.words))
            return
        request = secagg_pb2.SecureRequest(run_id=self.chosen.run_id, round=1, attempt_id="0" * 32)
        fill_answer(request, answer)
        self.bytes["up_keys"] += request.ByteSize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--lost", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    members = names(given.members)
    weights = min(1000, (2**32 - 1) // (given.members * 2**16))
    chosen = parameters(
        given.members, given.size, neighbours=default_neighbours(given.members), weight_levels=weights
    )
    signers, verifier = signers_of(members)
    rounds = [Bench(chosen, signers, verifier, given.lost) for _ in range(given.rounds)]
    errors = [bench.play() for bench in rounds]
    assert max(errors) < 1.0, f"the mean is off by {max(errors)} steps"
    rows = _rows(rounds, given.members)
    for row in rows:
        print(f"{row['who']:8} {row['what']:10} {row['value']:12.3f} {row['unit']}")
    print(f"largest error of a mean: {max(errors):.3f} steps of the quantiser")
    if given.csv:
        about = {
            "members": given.members, "size": given.size, "lost": given.lost, "neighbours": chosen.neighbours,
            "threshold": chosen.threshold, "machine": platform.processor() or platform.machine(),
        }  # fmt: skip
        new = not given.csv.exists()
        with given.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*about, *rows[0]])
            if new:
                writer.writeheader()
            writer.writerows({**about, **row} for row in rows)


def _rows(rounds: list[Bench], members: int) -> list[dict[str, Any]]:
    """Milliseconds a member and of the service, by stage and in all; bytes a member."""
    rows: list[dict[str, Any]] = []
    for who, share in (("member", members), ("service", 1)):
        stages = sorted({stage for key, stage in rounds[0].seconds if key == who})
        for stage in [*stages, "all"]:
            values = [
                sum(s for (key, at), s in bench.seconds.items() if key == who and stage in (at, "all"))
                for bench in rounds
            ]
            rows.append(
                {"who": who, "what": stage, "unit": "ms", "value": 1e3 * float(np.median(values)) / share}
            )
    for what, count in rounds[0].bytes.items():
        rows.append({"who": "member", "what": what, "unit": "bytes", "value": count / members})
    return rows


if __name__ == "__main__":
    main()
