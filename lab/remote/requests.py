"""The requests of Azure's asynchronous Blob client, retries included: DVC has no settings for them.

intercept(handle)       # await handle(send, policy, request) in place of await send(policy, request)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

Send = Callable[[Any, Any], Awaitable[Any]]  # (policy, request) -> response


def intercept(handle: Callable[[Send, Any, Any], Awaitable[Any]]) -> None:
    """Let `handle` send each request from now on, in this process.

    adlfs, DVC's file system for Azure, takes no policies of ours, so the library's own is wrapped.
    A second call wraps the first.
    """
    from azure.storage.blob.aio import ExponentialRetry

    send = ExponentialRetry.send

    async def intercepted(policy: Any, request: Any) -> Any:
        return await handle(send, policy, request)

    ExponentialRetry.send = intercepted
