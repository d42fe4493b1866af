"""An MQTT subscriber that only counts, at QoS 1 over TLS; started by ``bench_ingest.py`` as the limit of the ingest.

Arguments: folder with the service's certificate, broker's port, messages to wait for. Prints "ready", then the seconds
from the first to the last message.
"""

from __future__ import annotations

import ssl
import sys
import threading
import time
from pathlib import Path

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from wearfleet_protos.topics import TopicKind, subscription


def main() -> None:
    folder, port, expected = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    times: list[float] = []
    count, done = 0, threading.Event()

    def arrived(*_: object) -> None:
        nonlocal count
        count += 1
        if count in {1, expected}:
            times.append(time.perf_counter())
        if count == expected:
            done.set()

    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="bare-subscriber", clean_session=True)
    client.tls_set_context(context)
    client.on_message = arrived
    client.on_subscribe = lambda *_: print("ready", flush=True)
    client.on_connect = lambda *_: client.subscribe(
        [(subscription(kind), 1) for kind in (TopicKind.WINDOW, TopicKind.PREDICTION)]
    )
    client.connect("localhost", port)
    client.loop_start()
    done.wait()
    print(times[-1] - times[0], flush=True)
    client.disconnect()


if __name__ == "__main__":
    main()
