"""The raw limit: one gRPC stream a client process, the same bytes down and up, nothing done with them.

``bench_round.py`` starts it. The server releases a round when it reads a line on its input, sends the bytes to every
client in 1 MiB messages, waits until every client has sent as many back, and prints the seconds that took.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import grpc

MESSAGE = 1024 * 1024
OPTIONS = (
    ("grpc.max_receive_message_length", 2 * MESSAGE),
    ("grpc.http2.max_frame_size", MESSAGE),
    ("grpc.so_reuseport", 0),
)
METHOD = "/raw.Echo/Stream"


class RawServer:
    """All streams of one port.

    Args:
        clients: streams that make a round.
        size: bytes each way and client.
    """

    def __init__(self, clients: int, size: int) -> None:
        self._clients, self._size = clients, size
        data = bytes(size)
        self._messages = [data[at : at + MESSAGE] for at in range(0, size, MESSAGE)]
        self._streams: list[asyncio.Queue[bool]] = []
        self._done: asyncio.Queue[bool] = asyncio.Queue()
        self.complete = asyncio.Event()

    async def stream(self, requests: object, context: grpc.aio.ServicerContext) -> None:
        """One client: wait for the round, send, receive."""
        await context.read()
        go: asyncio.Queue[bool] = asyncio.Queue()
        self._streams.append(go)
        if len(self._streams) == self._clients:
            self.complete.set()
        while await go.get():
            for message in self._messages:
                await context.write(message)
            left = self._size
            while left:
                left -= len(await context.read())
            self._done.put_nowait(True)

    async def round(self) -> float:
        """Seconds until everybody has everything."""
        await self.complete.wait()
        began = time.perf_counter()
        for go in self._streams:
            go.put_nowait(True)
        for _ in self._streams:
            await self._done.get()
        return time.perf_counter() - began


async def serve(clients: int, size: int, credentials: grpc.ServerCredentials) -> None:
    """Two ports, without and with mutual TLS; a line on the input names which of them does a round."""
    servers = {"plain": RawServer(clients, size), "tls": RawServer(clients, size)}
    ports, listening = {}, []
    for name, raw in servers.items():
        server = grpc.aio.server(options=OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(raw.stream)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("raw.Echo", {"Stream": handler}),)
        )
        ports[name] = (
            server.add_insecure_port("127.0.0.1:0")
            if name == "plain"
            else server.add_secure_port("127.0.0.1:0", credentials)
        )
        await server.start()
        listening.append(server)  # a server that nobody holds stops
    print(json.dumps(ports), flush=True)
    for raw in servers.values():
        await raw.complete.wait()
    print("ready", flush=True)
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        print(await servers[line].round(), flush=True)


async def echo(channel: grpc.aio.Channel, size: int) -> None:
    """Receive everything, send as much back, again and again."""
    data = bytes(size)
    messages = [data[at : at + MESSAGE] for at in range(0, size, MESSAGE)]
    call = channel.stream_stream(METHOD)()
    await call.write(b"here")
    while True:
        left = size
        while left:
            left -= len(await call.read())
        for message in messages:
            await call.write(message)


async def client(size: int, plain: str, tls: str, credentials: grpc.ChannelCredentials) -> None:
    """One process: a stream to each port."""
    await asyncio.gather(
        echo(grpc.aio.insecure_channel(plain, options=OPTIONS), size),
        echo(grpc.aio.secure_channel(tls, credentials, options=OPTIONS), size),
    )


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """Mutual TLS with the files of our service."""
    key, certificate, authority = (
        (folder / name).read_bytes() for name in ("server.key", "server.pem", "ca.pem")
    )
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)


def device_credentials(folder: Path) -> grpc.ChannelCredentials:
    """Mutual TLS with the identity of one of our devices."""
    files = ("authority.pem", "device.key", "device.pem")
    return grpc.ssl_channel_credentials(*((folder / name).read_bytes() for name in files))


if __name__ == "__main__":
    _, role, size, *rest = sys.argv
    if role == "serve":
        asyncio.run(serve(int(rest[0]), int(size), server_credentials(Path(rest[1]))))
    else:
        asyncio.run(client(int(size), rest[0], rest[1], device_credentials(Path(rest[2]))))
