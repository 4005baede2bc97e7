"""A real S3 server on loopback, with a gate in front of it that can refuse, hold, deny, or lose answers."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import boto3
import pytest
from processes import free_port, wait_for

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test", "AWS_DEFAULT_REGION": "us-east-1"}
_ANSWERS = {
    "deny": ("403 Forbidden", "AccessDenied", "not for you"),
    "busy": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "broken": ("500 Internal Server Error", "InternalError", "We encountered an internal error."),
    "taken": ("412 Precondition Failed", "PreconditionFailed", "At least one of the pre-conditions did not hold"),
    "expired": ("400 Bad Request", "ExpiredToken", "The provided token has expired."),
}
#: What may happen to any request, and is over at the next one.
MISHAPS = ("refuse", "reset", "half", "lose", "busy", "broken", "slow")
SLOW = 1_800_000
_STEP = 1 << 16
_CONDITION = b"<Condition>If-None-Match</Condition>"


class Gate:
    """Passes requests on to ``target``, as ``rule(method and path)`` says.

    ``"pass"``; ``"refuse"``: the connection ends at once; ``"hold"``: nothing happens until :meth:`release`;
    ``"deny"``, ``"busy"``, ``"broken"``, ``"taken"`` and ``"expired"``: an answer of S3's, and the server is told
    nothing; ``"reset"``: the connection breaks while the request is sent; ``"half"``: it breaks in the middle of the
    answer; ``"lose"``: the server does it, the answer is lost; ``"bare"``: the answer does not say which condition did
    not hold, as some servers' do not; ``"slow"``: :data:`SLOW` bytes per second, there and back.

    What is signed with the key :attr:`expired` is answered as ``"expired"``.
    """

    def __init__(self, target: int) -> None:
        self.rule: Callable[[str], str] = lambda request: "pass"
        self.requests: list[str] = []
        self.expired = ""
        self._released = threading.Event()
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def release(self) -> None:
        """Let go on what is held; nothing is held from now on."""
        self._released.set()

    def close(self) -> None:
        self.release()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                more = client.recv(65536)
                if not more:
                    return
                head += more
            request = head.partition(b"\r\n")[0].decode().rpartition(" ")[0]
            self.requests.append(request)
            what = self.rule(request)
            if self.expired and f"Credential={self.expired}/".encode() in head:
                what = "expired"
            if what == "hold":
                self._released.wait()
            if what == "refuse":
                return
            if what == "reset":
                _break(client)
                return
            if what in _ANSWERS:
                _answer(client, *_ANSWERS[what], with_body=not request.startswith("HEAD"))
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                server.sendall(head)
                pause = _STEP / SLOW if what == "slow" else 0.0
                threading.Thread(target=_pump, args=(client, server, pause), daemon=True).start()
                answer = b""
                while data := server.recv(_STEP if pause else 1 << 20):
                    time.sleep(pause)
                    if what == "bare":
                        data = data.replace(_CONDITION, b" " * len(_CONDITION))
                    if what not in ("lose", "half") or data.startswith(b"HTTP/1.1 100"):
                        client.sendall(data)
                    else:
                        answer += data
            if what == "half":
                client.sendall(answer[: len(answer) - len(answer.partition(b"\r\n\r\n")[2]) // 2 - 1])
            client.shutdown(socket.SHUT_RDWR)  # closing alone waits for the thread that reads from it


def _pump(source: socket.socket, target: socket.socket, pause: float) -> None:
    with suppress(OSError):
        while data := source.recv(_STEP if pause else 1 << 20):
            time.sleep(pause)
            target.sendall(data)


def _answer(client: socket.socket, status: str, code: str, message: str, *, with_body: bool) -> None:
    client.settimeout(0.1)
    with suppress(TimeoutError):
        while client.recv(1 << 20):
            pass
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>" if with_body else ""
    client.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


def _break(client: socket.socket) -> None:
    """End the connection with what is on its way lost."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@dataclass
class Bucket:
    """A bucket of its own, reached through a gate of its own."""

    name: str
    gate: Gate
    client: object
    options: dict[str, object] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"s3://{self.name}/runs"

    def objects(self) -> list[str]:
        """Every object, as the server has it, without the gate."""
        found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return sorted(one["Key"].removeprefix("runs/") for one in found)

    def pending(self) -> list[str]:
        """The keys of uploads that were begun and not finished."""
        return [one["Key"] for one in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])]

    def flip(self, key: str, at: int) -> None:
        """Change a bit."""
        content = bytearray(self.client.get_object(Bucket=self.name, Key=f"runs/{key}")["Body"].read())
        content[at] ^= 1
        self.client.put_object(Bucket=self.name, Key=f"runs/{key}", Body=bytes(content))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[int]:
    """The port of a server that lives as long as the tests."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    try:
        wait_for(answers, timeout=240)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def s3_client(s3_server) -> Iterator[object]:
    """Past all gates. To make one takes longer than most tests talk to it."""
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{s3_server}",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=KEYS["AWS_DEFAULT_REGION"],
    )
    yield client
    client.close()


@pytest.fixture
def s3(s3_server, s3_client) -> Iterator[Bucket]:
    """An empty bucket, with the environment that leads to it."""
    gate = Gate(s3_server)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": gate.endpoint}.items():
            patch.setenv(name, value)
        bucket = Bucket(f"test-{uuid.uuid4().hex[:12]}", gate, s3_client)
        s3_client.create_bucket(Bucket=bucket.name)
        yield bucket
    gate.close()
