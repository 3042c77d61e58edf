"""Names and secrets in every form that people paste: they work, or one line says which one is wrong."""

from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

import pytest
from azure.storage.blob import ContainerSasPermissions, generate_container_sas

from azureml import cloud as azure
from lab.remote import azurite as emulator
from lab.remote import sas
from stages.core.errors import UserError
from support.blob_service import Container, account_sas, lab

pytestmark = pytest.mark.azure


@pytest.mark.parametrize("form", ["{}", "?{}", '"{}"', "'?{}'  "])
@pytest.mark.usefixtures("reaches_azure")
def test_a_sas_token_as_az_or_the_portal_shows_it_with_quotes_and_without(form, laptop, container):
    token = account_sas("racwdl", azure.REMOTE, azure.KEY)
    url = f"azure://{azure.CONTAINER}/a/b/"
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
    said = lab(laptop, "doctor", exits=1)
    assert said.count(fault) == 1
    assert "sig=x" not in said
    assert "Traceback" not in said


def test_settings_that_cannot_be_parsed_are_said_in_dvcs_words(laptop):
    (laptop.root / ".dvc/config.local").write_text("['remote \"azure\"'\n")
    said = lab(laptop, "doctor", exits=1)
    assert "DVC's settings: " in said
    assert "Traceback" not in said


def test_a_sas_that_may_not_delete_pushes_and_leaves_one_blob(laptop, container: Container):
    token = generate_container_sas(
        emulator.ACCOUNT,
        container.name,
        account_key=emulator.KEY,
        permission=ContainerSasPermissions.from_string("racwl"),
        expiry=datetime.now(UTC) + timedelta(hours=1),
    )
    endpoint = f"http://127.0.0.1:{container.azurite.port}/{emulator.ACCOUNT}"
    words = f'"BlobEndpoint={endpoint};SharedAccessSignature={token}"'
    container.connect(laptop, connection_string=words)
    for _ in range(2):
        said = lab(laptop, "doctor", exits=1)  # there is no conf/ here
        assert "ok    push       wrote and read a blob; deleting is not allowed" in said
    assert list(container.sizes()) == ["probe"]
    lab(laptop, "run")
    container.connect(laptop)
    assert "wrote, read and deleted" in lab(laptop, "doctor", exits=1)
    assert "probe" not in container.sizes()


GOOD = {"sv": "2024-11-04", "se": "2999-01-01", "sr": "c", "sp": "racwl", "sig": "secret"}


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"se": "2020-01-31T12:00:00Z"}, "expired at 2020-01-31 12:00 UTC"),
        ({"se": "2020-01-31"}, "expired at 2020-01-31 00:00 UTC"),
        ({"st": "2998-01-01T00:30Z"}, "begins at 2998-01-01 00:30 UTC"),
        ({"se": "tomorrow"}, "se=tomorrow, which is not a time"),
        ({"sp": "racwd"}, "lacks l (list): make one with sp=racwl"),
        ({"sp": "cwl"}, "lacks r (read)"),
        ({"sp": "rl"}, "lacks w (write)"),
        ({"sp": ""}, "lacks r (read) and w (write) and l (list)"),
        ({"sr": "b"}, "for one blob (sr=b)"),
        ({"ss": "qt", "srt": "sco"}, "not for Blob storage"),
        ({"ss": "b", "srt": "s"}, "must hold for containers and objects: srt=co"),
        ({"sig": ""}, "no signature"),
    ],
)
def test_a_sas_token_that_cannot_work_says_why_before_any_network(fields, fault):
    with pytest.raises(UserError) as refusal:
        sas.check(urlencode(GOOD | fields), sas.PUSHING)
    assert fault in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sp": "racwdlmeop", "st": "2020-01-01T00:00:00Z"},
        {"se": "2999-01-01T00:00:00.0000000Z", "spr": "https"},
        {"ss": "bfqt", "srt": "sco"},
        {"si": "a-stored-policy", "se": "", "sp": "rwl"},
    ],
)
def test_a_sas_token_that_can_work_is_left_to_azure(fields):
    sas.check(f"?{urlencode(GOOD | fields)}", sas.PUSHING)
    policy = {key: value for key, value in GOOD.items() if key not in ("se", "sp")}
    sas.check(urlencode(policy | {"si": "a-stored-policy"}), sas.PUSHING)


@pytest.mark.parametrize("command", ["run", "fsck", "doctor"])
def test_an_expired_sas_is_told_by_its_own_date(command, laptop, container):
    expired = urlencode(GOOD | {"se": "2020-01-31T12:00:00Z"})
    container.connect(laptop, account_name="somelab", sas_token=expired)
    said = lab(laptop, command, exits=1)
    assert said.count("the SAS token expired at 2020-01-31 12:00 UTC") == 1
    assert "secret" not in said
