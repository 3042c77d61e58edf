"""The way out: an HTTP CONNECT relay that knows a few hosts and refuses every other.

Set as HTTPS_PROXY and HTTP_PROXY, it proves by `refused` that nobody but Azure was ever asked for. `cut`
takes the network away, from all hosts or some.
"""

from __future__ import annotations

import contextlib
import fnmatch
import select
import socket
import socketserver
import threading
from collections import Counter
from urllib.parse import urlsplit


class Relay(socketserver.ThreadingTCPServer):
    """Maps host patterns to loopback ports; notes whom it let through and whom it refused."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128  # many connect at once, and wait while the cores are busy

    def __init__(self, ports: dict[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.ports = ports
        self.live: dict[socket.socket, str] = {}  # connections and the hosts they go to
        self.reached: set[str] = set()
        self.refused: set[str] = set()
        self.down: set[str] = set()  # patterns of hosts that the network has lost
        self.denied: Counter[str] = (
            Counter()
        )  # host: how often the cut network kept somebody from it
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def port_of(self, host: str) -> int | None:
        """Return where a host is served, None for one that nobody may reach."""
        port = next((p for name, p in self.ports.items() if fnmatch.fnmatch(host, name)), None)
        (self.reached if port else self.refused).add(host)
        return port

    def cut(self, hosts: str = "*") -> None:
        """Lose the network: what is open breaks off, what is new is refused."""
        self.down.add(hosts)
        for connection, host in list(self.live.items()):
            if fnmatch.fnmatch(host, hosts):
                with contextlib.suppress(OSError):  # it has ended by itself
                    connection.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Give the network back."""
        self.down.clear()

    def is_down(self, host: str) -> bool:
        """Say whether the network is cut between here and a host; count how often it was asked for."""
        down = any(fnmatch.fnmatch(host, hosts) for hosts in self.down)
        self.denied[host] += down
        return down


class Connection(socketserver.StreamRequestHandler):
    """One CONNECT and what follows."""

    server: Relay

    def handle(self) -> None:
        host = self.asked_for()
        if host is None:
            return
        port = self.server.port_of(host)
        self.server.live[self.connection] = host
        if port is None or self.server.is_down(host):
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            return
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with socket.create_connection(("127.0.0.1", port)) as other:
            join(self.connection, other)

    def asked_for(self) -> str | None:
        """Return the host of the request; one without CONNECT is shown with its http://, so none knows it.

        None: somebody only asked whether anybody listens.
        """
        if not (request := self.rfile.readline().decode().split()):
            return None
        method, target, _ = request
        while self.rfile.readline().strip():
            pass  # the request's headers
        if method == "CONNECT":
            return target.rpartition(":")[0]
        return f"http://{urlsplit(target).hostname}"

    def finish(self) -> None:
        """Forget the connection."""
        self.server.live.pop(self.connection, None)
        super().finish()


def join(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes both ways until either side ends."""
    across = {one: other, other: one}
    while True:
        for ready in select.select([one, other], [], [])[0]:
            try:
                if not (data := ready.recv(1 << 16)):
                    return
                across[ready].sendall(data)
            except OSError:
                return
