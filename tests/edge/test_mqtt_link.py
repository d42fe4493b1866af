"""The outbox over a real broker: nothing lost and nothing out of order through outages, restarts and refusals."""

import os
import threading
import time
from collections import Counter
from random import Random

import paho.mqtt.client as paho
import pytest
from edge.simulators import Authority, Mosquitto, wait_until
from paho.mqtt.enums import CallbackAPIVersion
from ports import free_port
from wearfleet_edge.identity import Broker, Enrolment, make_key, make_signing_request, save_enrolment
from wearfleet_edge.outbox import Outbox
from wearfleet_edge.pipeline import HeaderFactory
from wearfleet_edge.state import StateDirectory
from wearfleet_edge.transport.backoff import Backoff
from wearfleet_edge.transport.mqtt import MAX_IN_FLIGHT, MqttLink, Session, device_tls
from wearfleet_protos.codec import decode_health, decode_status, encode
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.messages import ClockQuality, Health
from wearfleet_protos.topics import TopicKind

pytestmark = pytest.mark.broker

DEVICE = "anna-1f3a"


class Subscriber:
    """Collects what a cloud would see; a persistent session, so an outage of the broker is the only gap."""

    def __init__(self, port):
        self.health = []
        self.status = []
        self.retained = []
        self._lock = threading.Lock()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id="cloud", clean_session=False)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe("wearfleet/v1/#", qos=1)
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert wait_until(self._client.is_connected)
        time.sleep(0.1)

    def _on_message(self, _client, _userdata, message):
        with self._lock:
            if message.topic.endswith("/status"):
                self.status.append(decode_status(message.payload))
                self.retained.append(message.retain)
            else:
                assert message.topic == f"wearfleet/v1/home/{DEVICE}/tele/health"
                self.health.append(decode_health(message.payload))

    def sequences(self):
        with self._lock:
            return [h.header.sequence for h in self.health]

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()


class Bench:
    def __init__(self, folder, extra=""):
        self.folder = folder
        self.broker = Mosquitto(folder, free_port(), extra)
        self.headers = HeaderFactory(
            DEVICE, "0000000000000001", ClockQuality.SYNCHRONISED, time.time_ns, lambda: os.urandom(16).hex()
        )
        self.outbox = Outbox(
            folder / "outbox",
            boot=self.headers.boot_id,
            clock_ns=time.time_ns,
            max_messages=10**6,
            max_bytes=1 << 30,
        )

    def link(self, broker=None, tls=None):
        session = Session(
            "home", DEVICE, broker or Broker("127.0.0.1", self.broker.port, tls=False), tls, "1.0"
        )
        return MqttLink(session, self.outbox, self.headers, Backoff(0.05, 0.3, Random(0).random))

    def send(self, count=1):
        def make(sequence):
            header = self.headers.make(sequence, self.headers.trace_id())
            return encode(Health(header, 0.0, 0, 0, 0, 0, 0.0, 0.0, "", 0))

        for _ in range(count):
            self.outbox.append([(TopicKind.HEALTH, make)])


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.broker.stop()


def test_messages_arrive_in_order_each_once_and_the_outbox_empties(bench):
    bench.broker.start()
    cloud = Subscriber(bench.broker.port)
    bench.send(200)
    link = bench.link()
    link.start()
    bench.send(300)
    assert bench.outbox.wait_below(1, 30)
    assert wait_until(lambda: len(cloud.sequences()) == 500)
    assert cloud.sequences() == list(range(500))
    assert link.connected
    assert link.protocol == "5"
    link.stop()
    cloud.close()


def test_birth_and_clean_stop_are_retained_and_carry_the_boot_id(bench):
    bench.broker.start()
    cloud = Subscriber(bench.broker.port)
    link = bench.link()
    link.start()
    assert wait_until(lambda: len(cloud.status) == 1)
    link.stop()
    assert wait_until(lambda: len(cloud.status) == 2)
    cloud.close()
    late = Subscriber(bench.broker.port)
    assert wait_until(lambda: late.retained == [True])
    assert [(s.online, s.reason) for s in cloud.status] == [(True, "birth"), (False, "stop")]
    assert late.status[0].reason == "stop"
    assert {s.header.boot_id for s in cloud.status} == {"0000000000000001"}
    late.close()


def test_a_device_that_vanishes_leaves_its_last_will_with_the_same_boot_id(bench):
    bench.broker.start()
    cloud = Subscriber(bench.broker.port)
    link = bench.link()
    connection_sockets = []
    link.start()
    assert wait_until(lambda: len(cloud.status) == 1)
    for thread in threading.enumerate():
        client = getattr(getattr(thread, "_target", None), "__self__", None)
        if isinstance(client, paho.Client) and client is not cloud._client:
            connection_sockets.append(client.socket())
    connection_sockets[0].shutdown(2)  # no DISCONNECT packet: as if the power went
    assert wait_until(lambda: [s.reason for s in cloud.status[:3]] == ["birth", "will", "birth"])
    birth, will, again = cloud.status[:3]
    assert birth.header.boot_id == will.header.boot_id == again.header.boot_id
    assert birth.header.sequence < will.header.sequence < again.header.sequence
    link.stop()
    cloud.close()


def test_an_outage_of_the_broker_loses_nothing(tmp_path):
    bench = Bench(tmp_path, f"persistence true\npersistence_location {tmp_path}/")
    bench.broker.start()
    cloud = Subscriber(bench.broker.port)
    link = bench.link()
    link.start()
    bench.send(50)
    assert wait_until(lambda: len(cloud.sequences()) >= 50)
    bench.broker.stop()
    bench.send(100)
    assert wait_until(lambda: not link.connected)
    assert link.last_error
    bench.broker.start()
    assert wait_until(lambda: set(cloud.sequences()) == set(range(150)))
    assert bench.outbox.wait_below(1, 30)
    assert max(Counter(cloud.sequences()).values()) <= 2  # sent again only when its acknowledgement was lost
    assert bench.outbox.lost() == 0
    link.stop()
    cloud.close()
    bench.broker.stop()


def test_no_broker_is_said_and_messages_wait(bench):
    link = bench.link()
    link.start()
    bench.send(3)
    assert wait_until(lambda: "cannot connect" in link.last_error)
    assert bench.outbox.depth == 3
    link.stop()


@pytest.mark.slow
def test_at_most_twenty_messages_are_under_way(bench):
    """A listener that says yes to the connection and then never acknowledges anything."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))
    received = bytearray()

    def serve():
        peer, _ = listener.accept()
        peer.recv(4096)
        peer.sendall(bytes([0x20, 3, 0, 0, 0]))  # MQTT 5 CONNACK, success
        peer.settimeout(1.0)
        try:
            while data := peer.recv(65536):
                received.extend(data)
        except TimeoutError:
            pass
        peer.close()

    thread = threading.Thread(target=serve)
    thread.start()
    bench.send(100)
    link = bench.link(Broker("127.0.0.1", listener.getsockname()[1], tls=False))
    link.start()
    thread.join(10)
    assert received.count(b"tele/health") == MAX_IN_FLIGHT - 1  # the birth message is under way too
    assert bench.outbox.depth == 100
    listener.close()
    link.stop()


# the MQTT library leaves the socket of a failed handshake to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_mutual_tls_connects_and_a_broker_of_another_authority_is_refused(tmp_path):
    authority, other = Authority(), Authority("another authority")
    key, chain = authority.server_identity()
    for name, data in (("ca.pem", authority.pem), ("server.key", key), ("server.pem", chain)):
        (tmp_path / name).write_bytes(data)
    bench = Bench(
        tmp_path,
        f"cafile {tmp_path}/ca.pem\ncertfile {tmp_path}/server.pem\nkeyfile {tmp_path}/server.key\n"
        "require_certificate true\nuse_identity_as_username true",
    )
    bench.broker.start()
    state = StateDirectory(tmp_path / "device")
    state.create()
    make_key(state)
    broker = Broker("localhost", bench.broker.port, tls=True)
    chain = authority.issue_for_request(make_signing_request(state, "device"), DEVICE)
    save_enrolment(
        state,
        Enrolment("home", DEVICE, "localhost:1", broker, {}),
        chain_pem=chain,
        authority_der=authority.der,
    )
    link = bench.link(broker, lambda: device_tls(state.authority, state.certificate, state.key))
    link.start()
    bench.send(3)
    assert bench.outbox.wait_below(1, 30)
    link.stop()
    state.authority.write_bytes(other.pem)
    foreign = bench.link(broker, lambda: device_tls(state.authority, state.certificate, state.key))
    foreign.start()
    assert wait_until(lambda: "not trusted" in foreign.last_error)
    foreign.stop()
    state.key.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="enrol again"):
        device_tls(state.authority, state.certificate, state.key)
    bench.broker.stop()


@pytest.mark.slow
def test_a_broker_that_only_speaks_version_3_is_served_too(bench):
    """amqtt knows MQTT 3.1.1 only."""
    import asyncio

    amqtt_broker = pytest.importorskip("amqtt.broker")
    port, ready, done = free_port(), threading.Event(), threading.Event()

    async def serve():
        config = {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
        broker = amqtt_broker.Broker(config)
        await broker.start()
        ready.set()
        await asyncio.to_thread(done.wait)
        await broker.shutdown()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    link = bench.link(Broker("127.0.0.1", port, tls=False))
    link.start()
    bench.send(30)
    assert bench.outbox.wait_below(1, 30)
    assert link.protocol == "3.1.1"
    link.stop()
    done.set()
    thread.join(10)
