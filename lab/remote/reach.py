"""Whether a remote can be reached at all, answered within seconds.

need_answer("https://mylab.blob.core.windows.net", remote)      # raises UserError unless something listens
"""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from stages.core.errors import UserError
from stages.core.network import with_timeout

TIMEOUT = 3  # seconds that a healthy remote may take to answer
CHECK_NETWORK = "check the network, or start the emulator (make azurite)"


def need_answer(url: str, remote: object) -> None:
    """Raise within seconds if nothing listens; the Azure SDK, and DNS, would try for a minute."""
    target, proxies, way = urlsplit(url), getproxies(), ""
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(target.netloc):
        way = f" (the proxy of {target.scheme.upper()}_PROXY; NO_PROXY={target.hostname} goes round it)"
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = target.port or {"https": 443}.get(target.scheme, 80)
    why = with_timeout(TIMEOUT, lambda: why_unreachable(target.hostname or "", port))
    if why != "":
        raise UserError((why or f"{remote} does not answer: {CHECK_NETWORK}") + way)


def why_unreachable(host: str, port: int) -> str:
    """Return why an address cannot be reached, an empty string if it can."""
    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except socket.gaierror:
        return (
            f"{host} cannot be found: check the network, and the account's name (lab remote setup)"
        )
    except OSError:
        return f"{host}:{port} does not answer: {CHECK_NETWORK}"
    return ""


def is_emulator(connection_string: str) -> bool:
    """Say whether a connection string leads to this very machine."""
    words = dict(pair.partition("=")[::2] for pair in connection_string.split(";"))
    host = urlsplit(words.get("BlobEndpoint", "")).hostname or ""
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    return loopback or "UseDevelopmentStorage" in words
