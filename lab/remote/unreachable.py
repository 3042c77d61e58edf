"""A remote that cannot be reached delays `dvc exp run` by seconds, not by minutes.

Before its first stage, `dvc exp run` asks the default remote for the list of every output directory that
the cache lacks, and Azure's library repeats each question for a minute or longer. DVC has no setting for
that. So hydra_plugins/unreachable.py, which `dvc exp run` imports, has the first question decide: where
it gets no answer, all later ones fail at once, as they would have in the end.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any
from urllib.parse import urlsplit

from lab.remote.reach import CHECK_NETWORK, need_answer
from lab.remote.requests import Send, intercept
from stages.core.errors import UserError

FIRST_ANSWER = 15  # seconds, a sign-in by `az` included; a healthy remote takes one or two
OVERLOADED = (
    3  # answers of 5xx in a row, PAUSE seconds apart, before the remote counts as out of order
)
PAUSE = 2


def ask_once() -> None:
    """Have every request of Azure's asynchronous Blob client fail at once after the first one has."""
    from azure.core.exceptions import AzureError, ServiceRequestError

    answers: set[str] = set()
    faults: dict[str, AzureError] = {}

    async def decisive(send: Send, policy: Any, request: Any) -> Any:
        host = urlsplit(request.http_request.url).netloc
        if host in answers:
            return await send(policy, request)
        if host not in faults:
            try:
                async with asyncio.timeout(FIRST_ANSWER):
                    await asyncio.to_thread(need_answer, request.http_request.url, "the remote")
                    response = await first_answer(send, policy, request)
            except (AzureError, UserError, TimeoutError) as error:
                if host not in faults:  # requests come several at once
                    why = f"lab: going on without the remote: {reason(error)}"
                    print(f"\n{why}", file=sys.stderr, flush=True)
                    known = isinstance(error, AzureError)
                    faults[host] = error if known else ServiceRequestError(why)
            else:
                answers.add(host)
                return response
        raise faults[host]

    intercept(decisive)


async def first_answer(send: Send, policy: Any, request: Any) -> Any:
    """Return the answer to a request that Azure's library may not repeat by itself.

    Raises `UserError` if the remote answers only that it is overloaded or out of order.
    """
    for attempt in range(OVERLOADED):
        await asyncio.sleep(PAUSE if attempt else 0)
        # the library would repeat a failing sign-in too, until the timeout hides what was wrong
        request.context.options["retry_total"] = 0
        response = await send(policy, request)
        status = response.http_response.status_code
        if status < 500:
            return response
    raise UserError(f"it answers {status}, so it is overloaded or out of order")


def reason(error: Exception) -> str:
    """Say in one line why the first question got no answer."""
    from azure.core.exceptions import ClientAuthenticationError

    if isinstance(error, ClientAuthenticationError):
        return "not signed in to Azure: run `az login`, or lab remote setup"
    return str(error) if isinstance(error, UserError) else f"it does not answer: {CHECK_NETWORK}"
