"""How many GPUs a job asks for, and what a cluster whose nodes have fewer is told."""

from __future__ import annotations

import copy
import json

import pytest

from lab.azureml import gpus, submit, workspace
from lab.azureml.submit import Task, describe
from stages.core.errors import UserError

from .cloud import CLUSTER
from .service import HOME

pytestmark = [pytest.mark.azure, pytest.mark.slow]


def cluster(cloud, name: str, size: str | None) -> None:
    """Add a cluster of another size."""
    other = copy.deepcopy(cloud.service.resource_of(f"computes/{CLUSTER}"))
    inner = other["properties"] | {"properties": {"vmSize": size} if size else {}}
    more = {key: other[key] for key in ("location", "identity")}
    cloud.service.put(f"{HOME}/computes/{name}", inner, **more)


def test_a_cluster_whose_nodes_have_fewer_gpus_is_refused_with_those_that_have_enough(network):
    client = workspace.need().connect()
    gpus.check(client, CLUSTER, 1)
    with pytest.raises(
        UserError, match=r"--gpus is 2: none here has as many: az ml compute create"
    ):
        gpus.check(client, CLUSTER, 2)
    cluster(network, "pair", "Standard_NC48ads_A100_v4")
    cluster(network, "cpus", "Standard_DS3_v2")
    gpus.check(client, "pair", 2)
    with pytest.raises(UserError) as refused:
        gpus.check(client, CLUSTER, 2)
    assert str(refused.value) == (
        "compute gpu-cluster has 1 GPU a node (STANDARD_NC24ADS_A100_V4), --gpus is 2: choose with --compute "
        "one that has (pair)"
    )
    with pytest.raises(UserError, match="compute cpus has no GPUs a node"):
        gpus.check(client, "cpus", 1)


def test_a_machine_that_azure_does_not_list_is_said_to_be_unchecked(network, capsys):
    cluster(network, "odd", "Standard_Unheard_of")
    cluster(network, "none", None)
    client = workspace.need().connect()
    for name in ("odd", "none"):
        gpus.check(client, name, 8)
        assert f"how many GPUs a node of {name} has" in capsys.readouterr().out


def test_the_job_sees_the_gpus_that_are_asked_for_and_without_asking_all(tmp_path):
    def variables(wanted: int | None) -> dict[str, str]:
        task = Task("name", [], [], "0" * 40)
        return describe(
            task, CLUSTER, gpus.variables(wanted), tmp_path, tmp_path, "azureml://x"
        ).environment_variables

    assert variables(None) == {}
    assert variables(2) == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert json.dumps(variables(1)) == '{"CUDA_VISIBLE_DEVICES": "0"}'


def test_submit_checks_the_cluster_before_anything_is_sent(network, monkeypatch):
    started = []

    def start(client, compute, variables, combined):
        started.append(variables)
        return [Task("name", [], [], "0" * 40)]

    monkeypatch.setattr(submit, "start", start)
    monkeypatch.setattr(submit, "preflight", lambda compute: workspace.need().connect())
    for module, name in (
        (submit.snapshot, "bring_params_up_to_date"),
        (submit.snapshot, "check_ignored"),
        (submit.run, "dvc"),
    ):
        monkeypatch.setattr(module, name, lambda *words: None)
    with pytest.raises(UserError, match="--gpus is 2: none here"):
        submit.submit(compute=CLUSTER, gpus=2, detach=True)
    with pytest.raises(UserError, match="--nodes is 2, but a stage runs on one node"):
        submit.submit(compute=CLUSTER, gpus=1, nodes=2, detach=True)
    assert started == []
    for wanted in (1, None):
        submit.submit(compute=CLUSTER, gpus=wanted, detach=True)
    assert started == [{"CUDA_VISIBLE_DEVICES": "0"}, {}]
