"""Endpoints by `lab deploy`: what fails is neither seen nor billed, and what was killed goes on."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from lab.deploy import command, endpoint, preflight
from lab.deploy.command import deploy
from stages.core.errors import UserError
from support.project import ROOT
from support.tiny_models import laid_out

from .conftest import files_of
from .endpoints import ENDPOINTS, READER, says
from .nodes import Nodes
from .service import HOME, error

pytestmark = [pytest.mark.azure, pytest.mark.slow]

NAME = "ft-for-travel"


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Without Azure's waits and words, as in `lab`."""
    monkeypatch.setattr(endpoint, "POLL", 0.01)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def registered(network):
    """Register a version, as `lab register` lays it out."""

    def register(number: int, **tags: str) -> None:
        content = f"content-of-{number}"
        for file in ("onnx/genai_config.json", "onnx_adapter/adapter.onnx_adapter"):
            blob = f"models/{NAME}/{content}/{file}"
            network.datastore.upload_blob(blob, b"{}", overwrite=True)
        uri = f"azureml://datastores/workspaceblobstore/paths/models/{NAME}/{content}"
        properties = {"modelUri": uri, "modelType": "custom_model", "flavors": {}}
        tags = {"content_sha256": content, **tags}
        network.service.put(f"{HOME}/models/{NAME}", {"latestVersion": str(number)})
        network.service.put(f"{HOME}/models/{NAME}/versions/{number}", properties | {"tags": tags})

    register(1)
    return register


def made(cloud) -> dict[str, dict]:
    """Return the deployments that there are, by name."""
    (one,) = [p for p in cloud.service.resources if re.fullmatch(rf"{ENDPOINTS}/[^/]+".lower(), p)]
    return {each["name"]: each for each in cloud.service.children(f"{one}/deployments")}


def owner(cloud) -> dict:
    (one,) = [
        each
        for path, each in cloud.service.resources.items()
        if re.fullmatch(rf"{ENDPOINTS}/[^/]+".lower(), path)
    ]
    return one


def traffic(cloud) -> dict[str, int]:
    return owner(cloud)["properties"]["traffic"]


def changes(cloud) -> list[str]:
    """Return what was made or deleted, in order, less what the SDK registers for it."""
    return [
        f"{method} {path.rpartition('/')[2]}"
        for method, path in cloud.service.calls
        if method in ("PUT", "DELETE") and path.lower().startswith(ENDPOINTS.lower())
    ]


def number_of(name: str) -> str:
    return name.partition("-")[0]


def test_the_first_deployment_is_asked_before_it_gets_traffic(network, registered, capsys):
    deploy(NAME)
    said = capsys.readouterr().out
    (name,) = made(network)
    assert number_of(name) == "v1"
    assert traffic(network) == {name: 100}
    assert network.service.endpoints.asked == [name]
    assert "1 x Standard_DS3_v2, about 0.25 USD an hour" in said
    assert said.index("USD an hour") < said.index("Creating endpoint")
    assert "it says 'In Illinois.'" in said
    one = owner(network)["name"]
    assert changes(network) == [f"PUT {one}", f"PUT {name}", f"PUT {one}"]
    assert f"https://{one}.westeurope.inference.ml.azure.com/v1/chat/completions" in said


def test_a_deployment_has_the_limits_probes_and_routes_of_our_server(network, registered):
    deploy(NAME, slots=4, queue=6)
    (found,) = made(network).values()
    properties = found["properties"]
    assert properties["requestSettings"] == {
        "maxConcurrentRequestsPerInstance": 10,
        "requestTimeout": "PT3M",
    }
    assert properties["instanceType"] == command.MACHINE
    assert found["sku"]["capacity"] == 1
    assert properties["model"].endswith(f"models/{NAME}/versions/1")
    assert properties["modelMountPath"] == "/var/model"
    assert properties["environmentVariables"]["LAB_BEHIND_GATEWAY"] == "1"
    assert "LAB_API_KEY" not in properties["environmentVariables"]
    assert properties["livenessProbe"]["failureThreshold"] == 30
    assert properties["readinessProbe"]["period"] == "PT10S"
    _, _, path = properties["environmentId"].partition("/workspaces/")
    environment = network.service.resource_of(path.partition("/")[2])["properties"]
    assert environment["inferenceConfig"] == {
        "livenessRoute": {"port": 8000, "path": "/livez"},
        "readinessRoute": {"port": 8000, "path": "/readyz"},
        "scoringRoute": {"port": 8000, "path": "/v1/chat/completions"},
    }
    assert owner(network)["properties"]["authMode"].lower() == "aadtoken"


def test_the_same_again_is_a_no_op(network, registered, capsys):
    deploy(NAME)
    network.service.calls.clear()
    deploy(NAME)
    deploy(f"{NAME}:1")
    assert "nothing to do" in capsys.readouterr().out
    assert changes(network) == []


def test_a_new_version_keeps_the_one_before_and_no_third(network, registered, capsys):
    deploy(NAME)
    registered(2)
    deploy(NAME)
    first, second = sorted(made(network))
    assert traffic(network) == {second: 100}
    assert f"{first} is kept for --rollback, and billed" in capsys.readouterr().out
    registered(3)
    deploy(NAME)
    assert [*map(number_of, sorted(made(network)))] == ["v2", "v3"]
    assert f"Deleting deployment {first}" in capsys.readouterr().out


def test_rollback_asks_and_gives_the_traffic_back(network, registered, capsys):
    deploy(NAME)
    registered(2)
    deploy(NAME)
    first, second = sorted(made(network))
    network.service.endpoints.asked.clear()
    deploy(NAME, rollback=True)
    assert traffic(network) == {first: 100}
    assert network.service.endpoints.asked == [first]
    deploy(NAME, rollback=True)
    assert traffic(network) == {second: 100}
    assert sorted(made(network)) == [first, second]


def test_there_is_nothing_before_the_first(network, registered):
    deploy(NAME)
    with pytest.raises(UserError, match="nothing to go back to"):
        deploy(NAME, rollback=True)


def name_of(number: int) -> str:
    """Return the name that a version's deployment will have, with the options' defaults."""
    from lab.azureml import workspace
    from lab.registry import download

    found = download.find(workspace.need().connect(), f"{NAME}:{number}")
    return f"v{number}-{command.digest(found, (command.MACHINE, 1, 8, 16, 256))[:8]}"


def test_a_failed_probe_prints_the_containers_words_and_leaves_the_old_one(
    network, registered, capsys
):
    deploy(NAME)
    registered(2)
    container = network.service.endpoints.containers[name_of(2)]
    container.fails = "Liveness probe failed: HTTP probe failed with statuscode: 502"
    container.log = "loading\nserver: LAB_MODEL /var/model holds no ONNX model"
    before = traffic(network)
    with pytest.raises(UserError, match=r"did not come up: .*502.*v1-\w+ goes on answering"):
        deploy(NAME)
    assert "  server: LAB_MODEL /var/model holds no ONNX model" in capsys.readouterr().err
    assert traffic(network) == before
    assert [*made(network)] == [*before]
    container.fails = ""
    deploy(NAME)
    assert number_of(*traffic(network)) == "v2"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (says("  "), "the answer is empty"),
        (lambda body: (200, {"answer": 42}), "is no chat completion"),
        (lambda body: (500, error("InternalServerError", "the graph broke")), "the graph broke"),
    ],
)
def test_one_that_answers_wrongly_gets_no_traffic(answer, why, network, registered, capsys):
    container = network.service.endpoints.containers[name_of(1)]
    container.answer, container.log = answer, "Traceback: the graph broke"
    with pytest.raises(UserError, match=f"did not answer: .*{why}.*is empty and costs nothing"):
        deploy(NAME)
    assert "the graph broke" in capsys.readouterr().err
    assert made(network) == {}
    assert traffic(network) == {}


def test_a_question_that_is_kept_from_it_leaves_it_for_the_next_try(network, registered):
    refusal = 403, error("Forbidden", "no score action")
    network.service.refusals["POST /v1/chat/completions"] = refusal
    with pytest.raises(UserError, match="stays without traffic: the same command goes on"):
        deploy(NAME)
    (name,) = made(network)
    assert traffic(network) == {}
    network.service.refusals.clear()
    network.service.calls.clear()
    deploy(NAME)
    assert traffic(network) == {name: 100}
    assert f"PUT {name}" not in changes(network)


STEPS = ["create_endpoint", "create_deployment", "check_answer", "move_traffic", "delete_others"]


@pytest.mark.parametrize("step", STEPS)
def test_killed_before_any_step_and_repeated_ends_as_if_never_killed(
    step, network, registered, monkeypatch
):
    deploy(NAME)
    registered(2)
    deploy(NAME)
    registered(3)

    def dies(*words):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(endpoint, step, dies)
        with pytest.raises(SystemExit):
            deploy(NAME)
    deploy(NAME)
    assert [*map(number_of, sorted(made(network)))] == ["v2", "v3"]
    assert number_of(*traffic(network)) == "v3"
    assert number_of(owner(network)["tags"][endpoint.PREVIOUS]) == "v2"
    puts = [change for change in changes(network) if change.startswith("PUT v")]
    assert len(puts) == 3


def test_killed_while_azure_makes_it_and_repeated_waits_for_it(
    network, registered, monkeypatch, capsys
):
    network.service.endpoints.stuck.set()
    monkeypatch.setattr(endpoint, "finish", interrupted(endpoint.finish))
    with pytest.raises(UserError, match="Azure goes on, and bills what it makes"):
        deploy(NAME)
    monkeypatch.undo()
    monkeypatch.setattr(endpoint, "POLL", 0.01)
    for name, value in network.laptop.items():
        monkeypatch.setenv(name, value)
    (found,) = made(network).values()
    assert found["properties"]["provisioningState"] == "Creating"
    monkeypatch.setattr(endpoint, "settled", ends(endpoint.settled, found))
    deploy(NAME)
    assert "waiting for it" in capsys.readouterr().out
    assert traffic(network) == {found["name"]: 100}
    assert [c for c in changes(network) if c.startswith("PUT v")] == [f"PUT {found['name']}"]


def interrupted(real):
    """Ctrl-C, as the second operation is waited for."""
    count = []

    def finish(begin):
        count.append(begin)
        if len(count) < 2:
            return real(begin)

        def dies():
            begin()
            raise KeyboardInterrupt

        return real(dies)

    return finish


def ends(real, resource):
    """A resource is ready at the third look."""
    looks = []

    def settled(look):
        def third():
            looks.append(1)
            if len(looks) > 2:
                resource["properties"]["provisioningState"] = "Succeeded"
            return look()

        return real(third)

    return settled


def refused(cloud, message: str, *words, **options) -> str:
    """Return why nothing was made."""
    with pytest.raises(UserError, match=message) as caught:
        deploy(*words, **options)
    assert "\n" not in str(caught.value)
    assert changes(cloud) == []
    return str(caught.value)


def test_a_reserve_of_a_fifth_counts(network, registered):
    cores = network.service.endpoints.cores
    cores["Standard DSv2 Family Cluster Dedicated"] = (17, 24)
    said = refused(network, "no quota: 1 x Standard_DS3_v2 needs 8 cores", NAME)
    assert "7 are left" in said
    refused(network, "needs 24 cores", NAME, instances=5)
    cores["Standard DSv2 Family Cluster Dedicated"] = (16, 24)
    deploy(NAME)


def test_a_quota_that_azure_does_not_list_and_a_price_that_it_does_not_tell_are_said(
    network, registered, capsys
):
    deploy(NAME, instance_type="standard_f4s_V2", instances=2)
    said = capsys.readouterr().out
    assert "Not checked: Azure lists no quota of standardFSv2Family" in said
    assert f"2 x Standard_F4s_v2, at the price an hour of {preflight.PRICES}" in said
    assert "USD" not in said


def test_no_such_machine(network, registered):
    said = refused(network, "no machine Standard_DS9_v2", NAME, instance_type="Standard_DS9_v2")
    assert "Standard_DS3_v2, Standard_DS4_v2" in said


@pytest.mark.parametrize(
    ("roles", "lacks"),
    [
        ([], "onlineEndpoints/write"),
        ([READER], "onlineEndpoints/write"),
        (
            [{"actions": ["*"], "notActions": ["*/score/action"]}],
            "allow onlineEndpoints/score/action:",
        ),
    ],
)
def test_no_role(roles, lacks, network, registered):
    network.service.endpoints.roles = roles
    assert "AzureML Data Scientist" in refused(network, lacks, NAME)


def test_what_one_role_denies_another_may_allow(network, registered):
    owner_role = {"actions": ["*"], "notActions": []}
    network.service.endpoints.roles = [READER, {"actions": [], "notActions": ["*"]}, owner_role]
    deploy(NAME)


def test_a_name_that_no_endpoint_can_have(network, registered):
    for name in ("ab", "1st", "a" * 33, "under_score", "two--dashes", "ends-"):
        refused(network, "cannot name an endpoint", NAME, endpoint=name)


def test_a_name_that_is_taken_elsewhere_is_told_with_azures_words(network, registered):
    taken = 400, error("BadRequest", "Endpoint with name travel already exists in this region")
    network.service.refusals["PUT */onlineEndpoints/travel"] = taken
    with pytest.raises(UserError, match=r"travel was not made: .*already exists.*--endpoint"):
        deploy(NAME, endpoint="travel")
    assert not any("deployments" in path for path in network.service.resources)


def test_an_endpoint_of_somebody_else_stays(network, registered):
    theirs = {"provisioningState": "Succeeded", "authMode": "Key", "traffic": {}, "properties": {}}
    network.service.put(f"{ENDPOINTS}/theirs", theirs, location="westeurope", tags={})
    for options in ({}, {"rollback": True}, {"status": True}, {"delete": True, "yes": True}):
        refused(network, "not made by lab deploy", NAME, endpoint="theirs", **options)


def test_versions_that_are_not_there(network, registered):
    refused(network, "ft-for-food has no version yet: registered are none", "ft-for-food")
    refused(network, "ft-for-travel has no version 9: registered are 1", f"{NAME}:9")


def test_a_version_that_failed_its_gates_needs_force(network, registered):
    registered(1, registered_despite="gate rouge_l: 0.1 is below the minimum 0.3")
    refused(network, "registered despite: gate rouge_l.*--force", NAME)
    deploy(NAME, force=True)


def test_a_version_that_lab_register_did_not_lay_out(network, registered):
    network.datastore.delete_blob(f"models/{NAME}/content-of-1/onnx/genai_config.json")
    refused(network, "holds no onnx/genai_config.json", NAME)


def test_status_says_what_there_is_and_that_it_is_billed(network, registered, capsys):
    deploy(NAME)
    registered(2)
    deploy(NAME)
    capsys.readouterr()
    deploy(NAME, status=True)
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"v1-\w+    0 %  succeeded  version 1  1 x Standard_DS3_v2  kept", lines[2])
    assert re.search(r"v2-\w+  100 %  succeeded  version 2", lines[3])
    assert "Billed by the hour" in lines[4]
    assert all(len(line) <= 100 for line in lines)


def test_delete_asks_and_takes_all_of_it(network, registered, monkeypatch, capsys):
    deploy(NAME)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(UserError, match="nobody is here to ask; --yes deletes it"):
        deploy(NAME, delete=True)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "confirm", lambda question: False)
    with pytest.raises(UserError, match="is not deleted"):
        deploy(NAME, delete=True)
    assert len(made(network)) == 1
    deploy(NAME, delete=True, yes=True)
    assert not any("onlineendpoints" in path for path in network.service.resources)
    assert "nothing of it is billed any more" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no endpoint"):
        deploy(NAME, status=True)


def test_two_workspaces_have_two_names_for_one_model():
    class Client:
        subscription_id, resource_group_name, workspace_name = "s", "g", "w"

    one = command.endpoint_name(Client(), "ft.for_travel-and-everything-else")
    preflight.check_name(one)
    assert one.startswith("ft-for-travel-and-everyth-")
    Client.workspace_name = "w2"
    assert command.endpoint_name(Client(), "ft.for_travel-and-everything-else") != one


def test_as_a_command_it_prints_what_it_means_and_nothing_of_the_sdks(
    network, registered, tmp_path
):
    def lab(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "lab.cli", "deploy", NAME, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    code, _, said = lab("--status")
    assert code == 1
    assert re.fullmatch(r"lab: there is no endpoint ft-for-travel-\w+ in .*\n", said)
    network.service.endpoints.containers[name_of(1)].fails = "Liveness probe failed"
    code, out, said = lab()
    assert code == 1
    assert "Creating endpoint" in out
    assert "has said nothing" in said
    assert said.splitlines()[-1].startswith("lab: deployment v1-")
    assert "Traceback" not in said
    assert "Activity" not in said


def test_not_signed_in(network, registered, monkeypatch):
    monkeypatch.delenv("AZURE_CLIENT_SECRET")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")
    refused(network, "not signed in to Azure: run `az login`", NAME)


def test_no_workspace(network, registered, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AZUREML_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    refused(network, "no Azure ML workspace is named", NAME)


@pytest.fixture
def nodes(network, tmp_path) -> Iterator[Nodes]:
    nodes = Nodes(network, tmp_path / "nodes")
    network.service.endpoints.start = nodes.start
    yield nodes
    nodes.end()


def test_what_is_sent_makes_a_server_that_answers(network, nodes, tiny, capsys):
    """The context and the model as Azure has them, on a node that has nothing else of ours."""
    for file, data in files_of(tiny).items():
        network.datastore.upload_blob(f"models/{NAME}/tiny/{file}", data, overwrite=True)
    uri = f"azureml://datastores/workspaceblobstore/paths/models/{NAME}/tiny"
    properties = {"modelUri": uri, "modelType": "custom_model", "flavors": {}, "tags": {}}
    network.service.put(f"{HOME}/models/{NAME}", {"latestVersion": "1"})
    network.service.put(f"{HOME}/models/{NAME}/versions/1", properties)
    deploy(NAME)
    assert "it says '" in capsys.readouterr().out
    (name,) = traffic(network)
    container = network.service.endpoints.containers[name]
    body = {"model": "nobody", "messages": [{"role": "user", "content": "hello"}]}
    status, said = container.answer(body)
    assert status == 404
    assert NAME in said["error"]["message"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny model as a version is laid out."""
    return laid_out(tmp_path_factory.mktemp("tiny"))
