"""Sign-in, Azure Resource Manager and the data plane of Azure ML: the few calls that the SDK makes.

Resources are a dictionary from path to body, as ARM's are: PUT stores, GET returns, a GET of what
resources have in common lists them. What does more than that is a function under `@route`.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import re
import ssl
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TENANT = "11111111-1111-1111-1111-111111111111"
SUBSCRIPTION = "22222222-2222-2222-2222-222222222222"
GROUP, WORKSPACE, REGION = "lab-group", "lab-workspace", "westeurope"
DATA_PLANE = f"https://{REGION}.api.azureml.ms"
PROVIDER = "/providers/Microsoft.MachineLearningServices"
ROOT = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{GROUP}{PROVIDER}"
HOME = f"{ROOT}/workspaces/{WORKSPACE}"
TRACKING = f"azureml://{REGION}.api.azureml.ms/mlflow/v1.0{HOME}"
MLFLOW = f"/mlflow/v1.0{HOME}/api/2.0/mlflow"
JOB_TOKEN = "of this job alone"

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]  # status, body, headers
ROUTES: list[tuple[str, re.Pattern, Callable[..., Answer]]] = []


def route(method: str, pattern: str):
    """Register a function for a method and a path; it gets the service, the body and the groups."""

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(pattern, re.IGNORECASE), function))
        return function

    return register


class Service:
    """The state of the workspace, and the HTTPS server that shows it."""

    def __init__(self, certificate: Path, key: Path, secret: str) -> None:
        self.job_token: str | None = JOB_TOKEN  # None: it has expired
        self.secret = secret  # what the service principal of the laptop knows
        self.resources: dict[str, dict] = {}
        self.details: dict[str, dict] = {}  # of jobs, as the run history has them
        self.metrics: dict[str, list[dict]] = {}  # of jobs, as MLflow has them
        self.calls: list[tuple[str, str]] = []
        self.unknown: list[str] = []  # calls that nobody wrote an answer for
        self.refusals: dict[str, Answer] = {}  # pattern of method and path: what it answers instead
        self.denied: Counter[str] = Counter()  # method and path: how often it was refused
        self.start_job: Callable[[str, dict], None] = lambda name, body: None
        self.cancel_job: Callable[[str], None] = lambda name: None
        self.new_container: Callable[[], tuple[str, str]] = lambda: ("", "")
        self.read_sas: Callable[[str], str] = lambda uri: uri
        self.request = (
            threading.local()
        )  # whose `headers` and `query` are those of the request that a thread answers
        self.endpoints: Any = None  # endpoints.Endpoints
        handler = type("Bound", (Handler,), {"service": self})
        self.server = Server(("127.0.0.1", 0), handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        # the handshake is left to each connection's own thread: one that is slow keeps nobody else waiting
        self.server.socket = context.wrap_socket(
            self.server.socket, server_side=True, do_handshake_on_connect=False
        )
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def forget(self) -> None:
        """Become as empty as at the start."""
        for state in (self.resources, self.details, self.metrics, self.calls, self.unknown):
            state.clear()
        self.job_token = JOB_TOKEN
        self.refusals.clear()
        self.denied.clear()
        if self.endpoints:
            self.endpoints.forget()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    def put(self, path: str, properties: dict, **more: Any) -> dict:
        """Store a resource; return it as ARM shows it."""
        times = {"createdAt": "2030-01-01T00:00:00Z", "lastModifiedAt": "2030-01-01T00:00:00Z"}
        kind = f"Microsoft.MachineLearningServices/{path.split('/')[-2]}"
        resource = {"id": path, "name": path.rpartition("/")[2], "type": kind, **more}
        self.resources[path.lower()] = {**resource, "properties": properties, "systemData": times}
        return self.resources[path.lower()]

    def resource_of(self, path: str) -> dict:
        """Return a resource by its path in the workspace."""
        return self.resources[f"{HOME}/{path}".lower()]

    def children(self, path: str) -> list[dict]:
        """Return the resources right below a path, newest first."""
        start = path.lower() + "/"
        found = [r for p, r in self.resources.items() if p.rpartition("/")[0] + "/" == start]
        return found[::-1]

    def answer(self, method: str, path: str, query: dict, body: Any) -> Answer:
        """Return status and body for a request, and count those that are refused."""
        self.calls.append((method, path))
        answer = self.choose(method, path, query, body)
        self.denied[f"{method} {path}"] += answer[0] >= 400 and path != "/"
        return answer

    def choose(self, method: str, path: str, query: dict, body: Any) -> Answer:
        """Find who answers a request, and let him."""
        for pattern, refusal in self.refusals.items():
            if fnmatch.fnmatch(f"{method} {path}", pattern):
                return refusal
        for expected, pattern, function in ROUTES:
            if method == expected and (match := pattern.fullmatch(path)):
                return function(self, body, *match.groups())
        if path.lower().startswith("/subscriptions/"):
            return self.resource(method, path, query, body)
        self.unknown.append(f"{method} {path}")
        return 404, error("NotFound", f"the fake knows no {method} {path}")

    def resource(self, method: str, path: str, query: dict, body: Any) -> Answer:
        """Answer as ARM does for any resource."""
        if not path.lower().startswith(HOME.lower()) or HOME.lower() not in self.resources:
            return 404, error("ResourceNotFound", f"The Resource '{path}' was not found.")
        if method == "PUT":
            return 201, self.put(path, {"flavors": {}, **body["properties"]})
        if method == "GET" and path.lower() in self.resources:
            return 200, self.resources[path.lower()]
        last = path.rpartition("/")[2].lower()
        if method == "GET" and last in (
            "versions",
            "jobs",
            "computes",
            "datastores",
            "deployments",
        ):
            found = self.children(path)
            if query.get("listViewType") != ["All"]:
                found = [r for r in found if not r["properties"].get("isArchived")]
            if "hash" in query:
                found = [r for r in found if r["properties"].get("hash") == query["hash"][0]]
            return 200, {"value": found}
        if method != "GET":
            self.unknown.append(f"{method} {path}")
        return 404, error("ResourceNotFound", f"The Resource '{path}' was not found.")


def error(code: str, message: str) -> dict:
    """Return an error's body as ARM writes it."""
    return {"error": {"code": code, "message": message}}


def token(audience: str, subject: str) -> dict:
    """Return an access token in the form that Azurite checks: readable, unsigned."""
    now = int(time.time())
    claims = {
        "aud": audience,
        "iss": f"https://sts.windows.net/{TENANT}/",
        "iat": now - 5,
        "nbf": now - 5,
        "exp": now + 3600,
        "tid": TENANT,
        "oid": subject,
        "sub": subject,
    }
    parts = [{"alg": "RS256", "typ": "JWT"}, claims]
    words = [base64.urlsafe_b64encode(json.dumps(p).encode()).decode().strip("=") for p in parts]
    text = ".".join([*words, "c2lnbmF0dXJl"])
    return {"token_type": "Bearer", "expires_in": 3600, "access_token": text}


@route("GET", "/")
def sign_of_life(service: Service, body: Any) -> Answer:
    return 404, error("NotFound", "ARM has nothing here either")


@route("GET", r"/([^/]+)/v2\.0/\.well-known/openid-configuration")
def authority(service: Service, body: Any, tenant: str) -> Answer:
    login = f"https://login.microsoftonline.com/{tenant}"
    return 200, {
        "authorization_endpoint": f"{login}/oauth2/v2.0/authorize",
        "token_endpoint": f"{login}/oauth2/v2.0/token",
        "issuer": f"{login}/v2.0",
        "tenant_discovery_endpoint": f"{login}/v2.0/.well-known/openid-configuration",
    }


@route("GET", r"/common/discovery/instance")
def instances(service: Service, body: Any) -> Answer:
    return 200, {"tenant_discovery_endpoint": authority(service, body, TENANT)[1]["issuer"]}


@route("POST", r"/([^/]+)/oauth2/v2\.0/token")
def sign_in(service: Service, body: dict, tenant: str) -> Answer:
    if body.get("client_secret", [""])[0] != service.secret:
        return 401, {
            "error": "invalid_client",
            "error_description": "AADSTS7000215: Invalid client secret provided.",
        }
    return 200, token(body["scope"][0].removesuffix("/.default"), "laptop")


@route("POST", rf"{HOME}/codes/([^/]+)/versions/([^/]+)/startPendingUpload")
def pending_upload(service: Service, body: Any, name: str, version: str) -> Answer:
    blob_uri, sas_uri = service.new_container()
    credential = {"credentialType": "SAS", "sasUri": sas_uri}
    reference = {"blobUri": blob_uri, "credential": credential}
    return 200, {"pendingUploadId": str(uuid.uuid4()), "blobReferenceForConsumption": reference}


@route("PUT", rf"{HOME}/jobs/([^/]+)")
def put_job(service: Service, body: dict, name: str) -> Answer:
    studio = {"endpoint": f"https://ml.azure.com/runs/{name}", "jobServiceType": "Studio"}
    properties = {**body["properties"], "status": "NotStarted", "services": {"Studio": studio}}
    service.details[name] = {"runId": name, "status": "NotStarted", "logFiles": {}}
    resource = service.put(f"{HOME}/jobs/{name}", properties)
    service.start_job(name, resource)
    return 201, resource


@route("POST", rf"{HOME}/jobs/([^/]+)/cancel")
def cancel_job(service: Service, body: Any, name: str) -> Answer:
    service.cancel_job(name)
    return 200, None


@route("GET", r"/discovery")
def discovery(service: Service, body: Any) -> Answer:
    return 200, {"api": DATA_PLANE, "history": DATA_PLANE}


@route("GET", r"/history/v1\.0/subscriptions/.*/runs/([^/]+)/details")
def run_details(service: Service, body: Any, name: str) -> Answer:
    return 200, service.details[name]


@route("POST", rf"{MLFLOW}/runs/log-batch")
def log_batch(service: Service, body: dict) -> Answer:
    if not is_known(service):
        return 401, {"error_code": "PERMISSION_DENIED", "message": "the token has expired"}
    wrong = [
        each["key"] for each in body["metrics"] if not re.fullmatch(r"[/\w.\- ]+", each["key"])
    ]
    if wrong or len(body["metrics"]) > 1000 or body["run_id"] not in service.details:
        return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": f"{wrong}"}
    service.metrics.setdefault(body["run_id"], []).extend(body["metrics"])
    return 200, {}


@route("GET", rf"{MLFLOW}/runs/get")
def mlflow_run(service: Service, body: Any) -> Answer:
    if not is_known(service):
        return 401, {"error_code": "PERMISSION_DENIED", "message": "the token has expired"}
    (job,) = service.request.query["run_id"]
    last = {metric["key"]: metric for metric in service.metrics.get(job, [])}
    return 200, {"run": {"info": {"run_id": job}, "data": {"metrics": [*last.values()]}}}


@route("GET", rf"{MLFLOW}/metrics/get-history")
def mlflow_history(service: Service, body: Any) -> Answer:
    (job,), (key,) = (service.request.query[name] for name in ("run_id", "metric_key"))
    return 200, {"metrics": [each for each in service.metrics.get(job, []) if each["key"] == key]}


def is_known(service: Service) -> bool:
    """Say whether a request has a job's own token, while that is good, or somebody's who signed in."""
    given = service.request.headers.get("Authorization", "").removeprefix("Bearer ")
    return given == service.job_token or given.count(".") == 2


@route("GET", r"/registrymanagement/v1\.0/registries/([^/]+)/discovery")
def registry(service: Service, body: Any, name: str) -> Answer:
    return 200, {
        "registryName": name,
        "primaryRegion": REGION,
        "primaryRegionResourceProviderUri": f"{DATA_PLANE}/",
        "resourceGroup": "registry-group",
        "subscriptionId": SUBSCRIPTION,
    }


@route("GET", r".*/registries/([^/]+)/models/([^/]+)/versions/([^/]+)")
def registry_model(service: Service, body: Any, name: str, model: str, version: str) -> Answer:
    found = service.resources.get(f"/registries/{name}/models/{model}/versions/{version}".lower())
    return (200, found) if found else (404, error("UserError", f"{model} not found"))


@route("POST", r".*/registries/([^/]+)/datarefs/([^/]+)/versions/([^/]+)")
def registry_data(service: Service, body: dict, name: str, model: str, version: str) -> Answer:
    credential = {"credentialType": "SAS", "sasUri": service.read_sas(body["blobUri"])}
    return 200, {"blobReferenceForConsumption": {"credential": credential}}


class Server(ThreadingHTTPServer):
    """A thread for each connection, and room for many that wait while the cores are busy."""

    request_queue_size = 128


class Handler(BaseHTTPRequestHandler):
    """HTTP in, `Service.answer`, HTTP out."""

    service: Service
    protocol_version = "HTTP/1.1"

    def do_any(self) -> None:
        url = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        is_form = "urlencoded" in self.headers.get("Content-Type", "")
        body = parse_qs(raw) if is_form else json.loads(raw or "null")
        path = re.sub("/+", "/", unquote(url.path))
        path = path.removeprefix("/mferp/managementfrontend")
        self.service.request.headers = self.headers
        self.service.request.query = parse_qs(url.query)
        status, answer, *more = self.service.answer(self.command, path, parse_qs(url.query), body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **dict(*more)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = do_any

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""
