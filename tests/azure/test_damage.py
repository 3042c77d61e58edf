"""Blobs that are damaged or lost in the remote: never accepted, found by lab fsck, sent again."""

import json

import pytest
import yaml

from support.blob_service import lab

pytestmark = pytest.mark.azure


def hashes(project) -> tuple[str, str]:
    """Return the hash of the list of models/base, and of a file in it."""
    lock = yaml.safe_load((project.root / "dvc.lock").read_text())
    md5 = lock["stages"]["make"]["outs"][0]["md5"]
    listed = (project.root / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}").read_text()
    return md5, json.loads(listed)[3]["md5"]


def flip_a_byte(blob) -> None:
    content = bytearray(blob.download_blob().readall())
    content[len(content) // 2] ^= 1
    blob.upload_blob(bytes(content), overwrite=True)


def truncate(blob) -> None:
    blob.upload_blob(blob.download_blob().readall()[:-7], overwrite=True)


def remove(blob) -> None:
    blob.delete_blob()


@pytest.mark.parametrize(
    ("damage", "part"),
    [(flip_a_byte, "file"), (truncate, "file"), (remove, "file"), (truncate, "list")],
)
def test_a_damaged_blob_is_not_accepted_and_repaired_from_where_it_is_whole(
    damage, part, laptop, colleague, pushed
):
    whole, file = hashes(laptop)
    damage(pushed.blob(whole if part == "list" else file))

    failed = lab(colleague, "dvc", "pull", exits=1)
    assert "lab fsck --deep" in failed
    assert not (colleague.root / "models/base").exists()

    found = lab(colleague, "fsck", "--deep", exits=1)
    assert "models/base" in found
    assert "1 of them missing or damaged" in found

    assert "sent again" in lab(laptop, "fsck", "--deep", "--repair")
    lab(colleague, "dvc", "pull")
    assert colleague.dvc("status").strip() == "Data and pipelines are up to date."


@pytest.mark.parametrize("damage", [truncate, remove])
def test_without_reading_every_byte_lost_and_shortened_blobs_are_found(
    damage, laptop, colleague, pushed
):
    _, file = hashes(laptop)
    damage(pushed.blob(file))
    assert "1 of them missing or damaged" in lab(colleague, "fsck", exits=1)


def test_a_missing_file_does_not_hide_a_shortened_one_beside_it(laptop, colleague, pushed):
    whole, file = hashes(laptop)
    listed = json.loads((laptop.root / f".dvc/cache/files/md5/{whole[:2]}/{whole[2:]}").read_text())
    truncate(pushed.blob(listed[7]["md5"]))
    remove(pushed.blob(file))
    assert "2 of them missing or damaged" in lab(colleague, "fsck", exits=1)


def test_a_machine_without_a_copy_says_so_and_repairs_nothing(laptop, colleague, pushed):
    _, file = hashes(laptop)
    remove(pushed.blob(file))
    said = lab(colleague, "fsck", "--repair", exits=1)
    assert "is missing, and this machine has no copy" in said
    assert not pushed.blob(file).exists()


def test_a_damaged_copy_here_never_replaces_a_whole_one_there(laptop, pushed):
    _, file = hashes(laptop)
    cached = laptop.root / f".dvc/cache/files/md5/{file[:2]}/{file[2:]}"
    cached.chmod(0o644)
    cached.write_bytes(b"not it")
    assert "0 of them" in lab(laptop, "fsck", "--repair")
    remove(pushed.blob(file))
    assert "no copy" in lab(laptop, "fsck", "--repair", exits=1)
    assert not pushed.blob(file).exists()


def test_a_remote_that_lost_everything_is_filled_again(laptop, container):
    laptop.dvc("push", "--run-cache")  # and DVC notes what it has sent
    for name in container.sizes():
        container.client.delete_blob(name)
    assert "sent again" in lab(laptop, "fsck", "--repair")
    assert "0 of them" in lab(laptop, "fsck", "--deep")
