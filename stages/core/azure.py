"""Sign-in to Azure ML, and its errors in one line each: for the catalogue's models and the lab commands.

with translate_errors():
    client = MLClient(credential(), registry_name="azureml", **OPTIONS)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from stages.core.errors import UserError
from stages.core.network import answers

ARM = "https://management.azure.com"
LOGIN = "https://login.microsoftonline.com"
PATIENCE = 8  # seconds that Azure may take to show a sign of life
SIGN_IN = "run `az login`, or set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET"
CERTIFICATE = (
    "behind a proxy that opens TLS, set REQUESTS_CA_BUNDLE and SSL_CERT_FILE to its certificate"
)
# two tries of four seconds each to be heard, where the libraries would wait for minutes
CONNECT = {"connection_timeout": PATIENCE // 2, "retry_connect": 1, "retry_read": 1}
OPTIONS = {"enable_telemetry": False, "retry_total": 2, "read_timeout": 60, **CONNECT}


def credential() -> Any:
    """Return what signs in: environment, managed identity or `az login`, as DVC's remote does."""
    from azure.identity import DefaultAzureCredential

    # AZURE_CLIENT_ID is how a job's managed identity is told apart from others of its node
    return DefaultAzureCredential(process_timeout=PATIENCE, **CONNECT)


def need_azure() -> None:
    """Raise `UserError` within seconds when Azure cannot be reached or refuses the sign-in."""
    from azure.core.exceptions import ClientAuthenticationError

    need_answer(ARM)
    with translate_errors():
        try:
            credential().get_token(f"{ARM}/.default")
        except ClientAuthenticationError:
            need_answer(LOGIN)  # an unreachable sign-in fails like a refused one
            raise


def need_answer(url: str) -> None:
    """Raise `UserError` within seconds when a server does not answer."""
    if not answers(url, PATIENCE):
        host = url.removeprefix("https://")
        raise UserError(f"{host} does not answer: check the network (and HTTPS_PROXY)")


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
    """Turn the errors of Azure's libraries into one line that says what to do."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    logging.getLogger("azure").setLevel(logging.CRITICAL)  # the error is told once, below
    try:
        yield
    except (AzureError, MlException) as error:
        raise UserError(explain(error)) from None


def explain(error: Exception) -> str:
    """Say what an error means and what to do."""
    from azure.core.exceptions import (
        ClientAuthenticationError,
        ServiceRequestError,
        ServiceResponseError,
    )

    code, status = code_of(error), getattr(error, "status_code", None)
    first = (str(getattr(error, "message", "") or error).strip().splitlines() or ["no reason"])[0]
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return f"the certificate that Azure shows here is not trusted: {CERTIFICATE}"
    if isinstance(error, (ServiceRequestError, ServiceResponseError)):
        return f"Azure does not answer: check the network (and HTTPS_PROXY): {first}"
    if isinstance(error, ClientAuthenticationError) and status in (None, 400, 401):
        return f"not signed in to Azure: {SIGN_IN}"
    if "quota" in f"{code} {first}".lower():
        return (
            f"no quota: {first}; ask for more in Azure ML studio (Quota), or choose another machine"
        )
    if status == 403 and "Permission" in f"{code}{first}":
        return (
            "Azure refuses: you need the role Storage Blob Data Contributor on the storage account"
        )
    if status == 403:
        return "Azure refuses: you need the role AzureML Data Scientist on the workspace"
    return f"Azure ML answers{f' {status}' if status else ''}: {first}"


def code_of(error: Exception) -> str:
    """Return the error code of ARM or of Blob Storage, empty where there is none."""
    arm = getattr(getattr(error, "error", None), "code", None)
    return str(getattr(error, "error_code", None) or arm or "")
