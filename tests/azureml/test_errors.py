"""What goes wrong with Azure is not asked for again and again, and ends in one line that says what to do."""

from __future__ import annotations

import json
import socket

import pytest
from azure.core.exceptions import ClientAuthenticationError

from lab.remote import azurite
from lab.remote.reach import is_emulator
from stages.core import azure

from .cloud import PROXIES, STORE
from .service import GROUP, HOME, SUBSCRIPTION, WORKSPACE, error

pytestmark = [pytest.mark.azure, pytest.mark.slow]

TRIES = 1 + azure.OPTIONS["retry_total"]  # of one request, before a command gives up


def last_line(laptop, cloud, *words: str) -> str:
    """Return the one line in which a lab command fails, after Azure or the network said no a few times."""
    output = laptop.lab(*words, exits=1)
    assert cloud.denials <= TRIES
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("lab: ")]
    assert len(lines) == 1
    return lines[0]


def test_not_signed_in(laptop, cloud):
    # whoever runs the tests may be signed in with az or pwsh
    only = {"AZURE_TOKEN_CREDENTIALS": "EnvironmentCredential"}
    nobody = laptop.but(**dict.fromkeys(cloud.signed_in), **only)
    assert "not signed in to Azure: run `az login`" in last_line(nobody, cloud, "jobs")


def test_a_wrong_secret(laptop, cloud):
    stranger = laptop.but(AZURE_CLIENT_SECRET="guessed")
    assert "not signed in to Azure" in last_line(stranger, cloud, "jobs")


def test_no_such_workspace(laptop, cloud):
    line = last_line(laptop.but(AZUREML_ARM_WORKSPACE_NAME="nowhere"), cloud, "jobs")
    assert f"no workspace nowhere in resource group {GROUP}" in line
    assert "az ml workspace list" in line


def test_no_workspace_named(laptop, cloud):
    unnamed = laptop.but(**{name: None for name in laptop.azure if name.startswith("AZUREML_")})
    assert "no Azure ML workspace is named" in last_line(unnamed, cloud, "jobs")


def test_half_a_workspace_named(laptop, cloud):
    half = laptop.but(AZUREML_ARM_WORKSPACE_NAME=None)
    assert "AZUREML_ARM_WORKSPACE_NAME must be set too" in last_line(half, cloud, "jobs")


def test_the_network_is_down(laptop, cloud):
    cloud.relay.cut()
    assert "management.azure.com does not answer: check the network" in last_line(
        laptop, cloud, "jobs"
    )


def test_the_sign_in_cannot_be_reached(laptop, cloud):
    cloud.relay.cut("login.microsoftonline.com")
    line = last_line(laptop, cloud, "jobs")
    assert "login.microsoftonline.com does not answer: check the network" in line


def test_a_network_that_swallows_every_word_is_given_up_in_seconds(network, monkeypatch):
    """As many tries as fit into the patience that is promised; here each is a short one."""
    tries = 1 + azure.CONNECT["retry_connect"]
    assert tries * azure.CONNECT["connection_timeout"] <= azure.PATIENCE <= 10
    monkeypatch.setitem(azure.CONNECT, "connection_timeout", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name in PROXIES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ClientAuthenticationError):
            azure.credential().get_token(f"{azure.ARM}/.default")
        assert 1 <= waiting(silent) <= tries


def waiting(server: socket.socket) -> int:
    """Return how many connected to a server that took nobody in."""
    server.setblocking(False)
    count = 0
    while True:
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def test_the_network_is_lost_before_the_model_is_sent(laptop, cloud):
    cloud.relay.cut(f"{STORE}.blob.core.windows.net")
    assert "Azure does not answer: check the network" in last_line(laptop, cloud, "register")


def test_a_certificate_that_nobody_trusts(laptop, cloud):
    without = laptop.but(SSL_CERT_FILE=None, REQUESTS_CA_BUNDLE=None)
    line = last_line(without, cloud, "jobs")
    assert "not trusted" in line
    assert "REQUESTS_CA_BUNDLE" in line


def test_a_job_of_somebody_else_has_no_results_for_us(laptop, cloud):
    theirs = {"jobType": "Command", "command": "true", "status": "Completed", "environmentId": "x"}
    cloud.service.put(f"{HOME}/jobs/theirs", theirs)
    line = last_line(laptop, cloud, "jobs", "--restore", "theirs")
    assert "job theirs is not one of lab submit" in line


def test_no_such_compute(laptop, cloud):
    line = last_line(laptop, cloud, "submit", "--compute", "nothing")
    assert "no compute nothing in workspace lab-workspace (there: gpu-cluster)" in line


def test_a_compute_without_identity(laptop, cloud):
    cloud.service.resource_of("computes/gpu-cluster").pop("identity")
    assert "--identity-type SystemAssigned" in last_line(laptop, cloud, "submit")


def test_a_compute_that_got_no_quota(laptop, cloud):
    failed = {"error": {"code": "ClusterCoreQuotaReached", "message": "no cores"}}
    compute = cloud.service.resource_of("computes/gpu-cluster")
    compute["properties"]["provisioningErrors"] = [failed]
    line = last_line(laptop, cloud, "submit")
    assert "ClusterCoreQuotaReached" in line
    assert "Quota" in line


def test_a_job_that_quota_refuses(laptop, cloud):
    answer = 400, error("QuotaExceeded", "Not enough vCPU quota for Standard_NC24ads_A100_v4")
    cloud.service.refusals["PUT */jobs/*"] = answer
    assert "no quota: " in last_line(laptop, cloud, "submit")


def test_no_role_on_the_storage_account(laptop, cloud):
    cloud.service.refusals["GET */datastores"] = (
        403,
        error("AuthorizationFailed", "no permission"),
    )
    assert "AzureML Data Scientist" in last_line(laptop, cloud, "register")


def test_the_remote_is_an_emulator_of_this_machine(laptop, cloud):
    words = ("DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey=a2V5;"
             "BlobEndpoint=http://127.0.0.1:1/devstoreaccount1;")  # fmt: skip
    laptop.dvc("remote", "modify", "--local", "azure", "connection_string", words)
    assert "a job cannot reach" in last_line(laptop, cloud, "submit")


@pytest.mark.parametrize(
    ("connection_string", "here"),
    [
        (azurite.connection_string(10000), True),
        ("UseDevelopmentStorage=true", True),
        ("AccountName=a;AccountKey=a2V5;BlobEndpoint=http://localhost:10000/a", True),
        ("AccountName=a;AccountKey=a2V5;EndpointSuffix=core.windows.net", False),
        ("BlobEndpoint=https://a.blob.core.windows.net;SharedAccessSignature=sv=1", False),
        ("", False),
    ],
)
def test_only_a_remote_on_this_machine_is_called_an_emulator(connection_string, here):
    assert is_emulator(connection_string) == here


def test_values_that_do_not_compose_are_refused_before_anything_is_asked_for(laptop, cloud):
    assert "finetune.rank" in last_line(laptop, cloud, "submit", "-S", "finetune.rank=0")
    assert "--sweep" in last_line(laptop, cloud, "submit", "-S", "finetune.rank=1,2")
    assert cloud.service.calls == []


def test_dvc_settings_and_config_json_name_the_workspace_too(laptop):
    unnamed = laptop.but(**{name: None for name in laptop.azure if name.startswith("AZUREML_")})
    uri = f"azureml://subscriptions/{SUBSCRIPTION}/resourcegroups/{GROUP}/workspaces/{WORKSPACE}"
    unnamed.dvc("config", "--local", "db.azureml.url", uri)
    assert "No jobs yet" in unnamed.lab("jobs")
    unnamed.dvc("config", "--local", "--unset", "db.azureml.url")
    names = {"subscription_id": SUBSCRIPTION, "resource_group": GROUP, "workspace_name": WORKSPACE}
    (laptop.root / "config.json").write_text(json.dumps(names))
    assert "No jobs yet" in unnamed.lab("jobs")
    assert HOME.endswith(WORKSPACE)
