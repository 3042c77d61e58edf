"""Names and secrets in every form that people paste: they work, or one line says which one is wrong."""

import pytest
from azureml import cloud as azure
from blob_service import Container, account_sas, lab
from conftest import Project

from lab import azurite as emulator

pytestmark = pytest.mark.azure


@pytest.fixture
def online(laptop, cloud, monkeypatch) -> Project:
    """A clone on a machine that reaches Azure."""
    for name, value in cloud.network.items():
        monkeypatch.setenv(name, value)
    return laptop


def configure(project: Project, **settings: str) -> None:
    """Write the remote's settings as an editor would."""
    lines = "".join(f"    {key} = {value}\n" for key, value in settings.items())
    (project.root / ".dvc/config.local").write_text(f"['remote \"azure\"']\n{lines}")


@pytest.mark.parametrize("form", ["{}", "?{}", '"{}"', "'?{}'  "])
def test_a_sas_token_as_az_or_the_portal_shows_it_with_quotes_and_without(form, online, cloud):
    token = account_sas("racwdl", azure.REMOTE, azure.KEY)
    url = f"azure://{cloud.remote_container()}/a/b/"
    configure(online, url=url, account_name=azure.REMOTE, sas_token=form.format(token))
    said = lab(online, "dvc", "push") + lab(online, "fsck", "--deep")
    assert "0 of them" in said
    assert token not in said


def test_a_connection_string_in_quotes_that_holds_a_sas(laptop, container: Container):
    endpoint = f"http://127.0.0.1:{container.azurite.port}/{emulator.ACCOUNT}"
    words = f"'BlobEndpoint={endpoint};SharedAccessSignature={account_sas('racwdl')}'"
    configure(laptop, url=f"azure://{container.name}/", connection_string=words)
    lab(laptop, "dvc", "push")
    assert "0 of them" in lab(laptop, "fsck")


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"account_name": "somelab'"}, 'account "somelab\'": must be 3 to 24 lower-case'),
        ({"account_name": "https://somelab.blob.core.windows.net"}, "must be 3 to 24 lower-case"),
        ({"url": "azure://MyContainer/path"}, "container 'MyContainer': must be 3 to 63 lower-"),
    ],
)
def test_a_name_that_cannot_be_one_is_named_and_not_looked_up(settings, fault, laptop):
    configure(laptop, **{"account_name": "somelab", "url": "azure://container"} | settings)
    said = lab(laptop, "doctor", exits=1, soon=True)
    assert fault in said
    assert "Traceback" not in said
