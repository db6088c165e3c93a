"""The counters of tools/measure_traffic.py; real steps are in tests/planning/test_traffic.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.measure_traffic import main

SCRIPT = """
import socket
from tools.measure_traffic import loopback_bytes, own_network
private = own_network()
before = loopback_bytes()
listener = socket.create_server(("127.0.0.1", 0))
sender = socket.create_connection(listener.getsockname())
receiver, _ = listener.accept()
sender.sendall(bytes(50_000))
received = 0
while received < 50_000:
    received += len(receiver.recv(65536))
print(private, loopback_bytes() - before)
"""


def test_an_own_network_carries_what_is_sent_and_nothing_else() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    private, carried = run.stdout.split()
    if private == "False":
        pytest.skip("this user may not have a network namespace")
    # Headers, the handshake and acknowledgements of one connection.
    assert 50_000 < int(carried) < 53_000


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--only", "octopus"], "--only is 'octopus', expected a part of one of"),
        (["model.heads=2", "model.decoder.heads=2"], "heads 2 is not a multiple of parallel.tensor 4"),
        (["--batch", "10"], "batch_size 10 is not a multiple of the 4 processes"),
        (["--steps", "0"], "--steps is 0, expected at least 1"),
    ],
)
def test_mistakes_get_one_sentence(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("error: ")
    assert sentence in streams.err
    assert not streams.out
