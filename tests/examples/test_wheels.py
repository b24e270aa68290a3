"""`examples/common/wheels.py`, with pip and without a network."""

import dataclasses

import pytest
import wheel
from common.run import Failure


MEMBERS = {"some_data/numbers.txt": b"1 2 3"}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder in which pip looks for wheels, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_a_wheel_is_downloaded_once(index, tmp_path):
    wanted = wheel.write(index, MEMBERS)
    cache = tmp_path / "deep" / "cache"
    assert wanted.read(cache, "some_data/numbers.txt") == b"1 2 3"
    assert [path.name for path in cache.iterdir()] == [wanted.filename]
    (index / wanted.filename).unlink()
    assert wanted.read(cache, "some_data/numbers.txt") == b"1 2 3"


def test_what_pip_cannot_find_is_one_line_with_a_remedy(index, tmp_path):
    wanted = wheel.write(tmp_path / "elsewhere", MEMBERS)
    with pytest.raises(Failure) as caught:
        wanted.fetch(tmp_path / "cache")
    said = str(caught.value)
    assert "\n" not in said
    assert "pip could not fetch some-data==1.0" in said
    assert f"put {wanted.filename} into {tmp_path / 'cache'}" in said
    assert not list((tmp_path / "cache").iterdir())


def test_another_file_under_the_name_is_refused(tmp_path):
    wanted = wheel.write(tmp_path, MEMBERS)
    path = tmp_path / wanted.filename
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Failure, match="not the file that is meant: its SHA-256 is"):
        wanted.read(tmp_path, "some_data/numbers.txt")


def test_a_member_that_is_not_there_is_named(tmp_path):
    wanted = wheel.write(tmp_path, MEMBERS)
    with pytest.raises(Failure, match="there is no some_data/letters.txt in it"):
        wanted.read(tmp_path, "some_data/letters.txt")


def test_what_is_no_archive_is_one_line(tmp_path):
    wanted = wheel.write(tmp_path, MEMBERS)
    (tmp_path / wanted.filename).write_bytes(b"not a wheel")
    digest = "7fd6d17a62a1c2fc9ef70ad1b2cf1ff9a35db0fb3f2f0a3e3c5f7d8f6f1a0c0e"
    pinned = dataclasses.replace(wanted, sha256=digest)
    with pytest.raises(Failure, match="in place of 7fd6d17a"):
        pinned.fetch(tmp_path)
    digest = wheel.hashlib.sha256(b"not a wheel").hexdigest()
    with pytest.raises(Failure, match="cannot be read: File is not a zip file"):
        dataclasses.replace(wanted, sha256=digest).read(tmp_path, "x")
