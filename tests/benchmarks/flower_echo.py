"""Rounds of Flower 1.41 with echo clients: FedAvg, start_server and start_client, one process a client.

Without TLS as in its quick start, or with the server's certificate in ``--keys`` (clients have none: Flower's
``start_client`` cannot show one). Runs in Flower's own environment (its pins clash with ours); ``bench_round.py``
starts it and compares. Each line on the input releases ``--block`` rounds; each round prints its seconds.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from flwr.client import NumPyClient, start_client
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvg

logging.getLogger("flwr").setLevel(logging.ERROR)


class Echo(NumPyClient):
    """Returns what it was given, as a client that trains for no time would."""

    def fit(self, parameters, config):
        return parameters, 1, {}


class Timed(FedAvg):
    """FedAvg that prints how long a round took, from choosing its clients to its result."""

    def __init__(self, block: int, **settings) -> None:
        super().__init__(**settings)
        self._block, self._begin = block, 0.0

    def configure_fit(self, server_round, parameters, client_manager):
        client_manager.wait_for(self.min_available_clients)
        if server_round == 1:
            print("ready", flush=True)
        if (server_round - 1) % self._block == 0:
            sys.stdin.readline()
        self._begin = time.perf_counter()
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round, results, failures):
        if failures:
            raise RuntimeError(f"echo clients failed: {failures}")
        result = super().aggregate_fit(server_round, results, failures)
        print(time.perf_counter() - self._begin, flush=True)
        return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--client", action="store_true")
    parser.add_argument("--keys", type=Path, help="folder with ca.pem, server.pem and server.key, for TLS")
    args = parser.parse_args()
    address = f"127.0.0.1:{args.port}"
    if args.client:
        authority = args.keys and (args.keys / "ca.pem").read_bytes()
        start_client(
            server_address=address,
            client=Echo().to_client(),
            root_certificates=authority,
            insecure=authority is None,
        )
        return
    keys = ["--keys", str(args.keys)] if args.keys else []
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--client", "--port", str(args.port), *keys], stderr=subprocess.DEVNULL
        )
        for _ in range(args.clients)
    ]
    strategy = Timed(
        block=args.block,
        fraction_evaluate=0.0,
        min_fit_clients=args.clients,
        min_available_clients=args.clients,
        min_evaluate_clients=0,
        initial_parameters=ndarrays_to_parameters([np.zeros(args.parameters, np.float32)]),
    )
    try:
        start_server(
            server_address=address,
            config=ServerConfig(num_rounds=args.rounds),
            strategy=strategy,
            certificates=args.keys
            and tuple((args.keys / name).read_bytes() for name in ("ca.pem", "server.pem", "server.key")),
        )
    finally:
        for child in children:
            child.terminate()


if __name__ == "__main__":
    main()
