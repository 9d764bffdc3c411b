"""Python imports this at start in a server that a test starts: an internet that lies.

Names resolve to what QIG_TEST_INTERNET says, in turn where it gives several answers; connections
to its public address and port arrive at the test's own listener, others end here; every address
that is connected to is written down. The guard under test is not touched: it sees these answers as
the system's.
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from typing import Any

import aiohttp.resolver

_SETTINGS = json.loads(os.environ["QIG_TEST_INTERNET"])
_asked: Counter[str] = Counter()
_resolve = aiohttp.resolver.ThreadedResolver.resolve
_connect = socket.socket.connect


def _note(*what: object) -> None:
    with open(_SETTINGS["log"], "a", encoding="utf-8") as log:
        log.write(json.dumps(what) + "\n")


async def resolve(
    self: Any, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
) -> list[Any]:
    """The next of the answers for a name, or the system's."""
    _note("resolve", host)
    answers = _SETTINGS["names"].get(host)
    if answers is None:
        return await _resolve(self, host, port, family)
    addresses = answers[_asked[host] % len(answers)]
    _asked[host] += 1
    if not addresses:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [
        {
            "hostname": host,
            "host": address,
            "port": port,
            "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
            "proto": 0,
            "flags": socket.AI_NUMERICHOST,
        }
        for address in addresses
    ]


def connect(self: socket.socket, address: Any) -> None:
    """Connect, to the listener instead of the public address; what else leaves is refused."""
    if self.family == socket.AF_UNIX or self.type == socket.SOCK_DGRAM:
        return _connect(self, address)
    _note("connect", *address[:2])
    if list(address[:2]) == _SETTINGS["public"]:
        address = ("127.0.0.1", address[1])
    elif address[0] not in ("127.0.0.1", "::1"):
        raise OSError(f"this test has no way to {address[0]}")
    return _connect(self, address)


aiohttp.resolver.ThreadedResolver.resolve = resolve  # type: ignore[method-assign]
socket.socket.connect = connect  # type: ignore[method-assign]
