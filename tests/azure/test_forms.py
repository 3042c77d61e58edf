"""Names and secrets in every form that people paste: they work, or one line says which one is wrong."""

import pytest
from azureml import cloud as azure
from blob_service import Container, account_sas, lab

from lab import azurite as emulator

pytestmark = pytest.mark.azure


@pytest.mark.parametrize("form", ["{}", "?{}", '"{}"', "'?{}'  "])
@pytest.mark.usefixtures("reaches_azure")
def test_a_sas_token_as_az_or_the_portal_shows_it_with_quotes_and_without(
    form, laptop, container, cloud
):
    token = account_sas("racwdl", azure.REMOTE, azure.KEY)
    url = f"azure://{cloud.remote_container()}/a/b/"
    sas_token = form.format(token)
    container.connect(laptop, url=url, account_name=azure.REMOTE, sas_token=sas_token)
    said = lab(laptop, "dvc", "push") + lab(laptop, "fsck", "--deep")
    assert "0 of them" in said
    assert token not in said


def test_a_connection_string_in_quotes_that_holds_a_sas(laptop, container: Container):
    endpoint = f"http://127.0.0.1:{container.azurite.port}/{emulator.ACCOUNT}"
    words = f"'BlobEndpoint={endpoint};SharedAccessSignature={account_sas('racwdl')}'"
    container.connect(laptop, url=f"azure://{container.name}/", connection_string=words)
    lab(laptop, "dvc", "push")
    assert "0 of them" in lab(laptop, "fsck")


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"account_name": "somelab'"}, 'account "somelab\'": must be 3 to 24 lower-case'),
        ({"account_name": "https://somelab.blob.core.windows.net"}, "must be 3 to 24 lower-case"),
        ({"url": "azure://MyContainer/path"}, "container 'MyContainer': must be 3 to 63 lower-"),
        (
            {"url": "https://somelab.blob.core.windows.net/c?sig=x"},
            "windows.net/c?...': must be az",
        ),
        ({"url": "team-models"}, "url is 'team-models': must be azure://CONTAINER"),
        (
            {"sas_token": "https://somelab.blob.core.windows.net/c?sig=x"},
            "sas_token is a whole URL",
        ),
    ],
)
def test_a_name_that_cannot_be_one_is_named_and_not_looked_up(settings, fault, laptop, container):
    container.connect(laptop, **{"account_name": "somelab"} | settings)
    said = lab(laptop, "doctor", exits=1, soon=True)
    assert said.count(fault) == 1
    assert "sig=x" not in said
    assert "Traceback" not in said


def test_settings_that_cannot_be_parsed_are_said_in_dvcs_words(laptop):
    (laptop.root / ".dvc/config.local").write_text("['remote \"azure\"'\n")
    said = lab(laptop, "doctor", exits=1, soon=True)
    assert "DVC's settings: " in said
    assert "Traceback" not in said
