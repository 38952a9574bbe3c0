"""What the processes of a local mesh are told, and what a shell is."""

from __future__ import annotations

import subprocess

import pytest

from taskmesh.parts import PartMissing
from taskmesh_local import backing, environment
from taskmesh_local.folders import Folders
from taskmesh_local.state import State, locked

OURS = {
    "TASKMESH_AMQP_URL": "amqp://admin:s3cret@127.0.0.1:20001/taskmesh",
    "TASKMESH_LOCAL_AMQP_URL": "amqp://admin:s3cret@127.0.0.1:20001/taskmesh",
    "TASKMESH_MANAGEMENT_URL": "http://admin:s3cret@127.0.0.1:20002",
    "TASKMESH_LOCAL_MANAGEMENT_URL": "http://admin:s3cret@127.0.0.1:20002",
    "TASKMESH_API_KEY": 'it\'s $HOME "quoted"',
}


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path / "mesh")


def test_a_shell_that_sources_the_file_has_exactly_what_was_written(folders):
    """Whatever is in a password; and nobody else may read it."""
    environment.write(folders.env, OURS)

    command = f'. "{folders.env}"; printf "%s" "$TASKMESH_API_KEY"'
    sourced = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)

    assert sourced.stdout == OURS["TASKMESH_API_KEY"]
    assert environment.read(folders.env) == OURS
    assert folders.env.stat().st_mode & 0o777 == 0o600


def test_a_shell_that_has_sourced_the_file_does_not_name_its_own_broker_as_a_given_one(folders):
    """Neither with the file's URLs nor with those of a file that is gone."""
    environment.write(folders.env, OURS)
    state = State.load(folders)

    backing.take_given(state, OURS)
    folders.env.unlink()
    backing.take_given(state, OURS)

    assert state.given == {}


def test_a_given_broker_is_remembered(folders):
    """A later command without the variables means the same mesh."""
    with locked(folders) as state:
        backing.take_given(state, {"TASKMESH_AMQP_URL": "amqp://a", "TASKMESH_MANAGEMENT_URL": "http://a"})
        state.save()

    assert State.load(folders).given == {"amqp": "amqp://a", "management": "http://a"}


def test_a_given_broker_needs_its_management_api(folders):
    """Users and policies cannot be made over AMQP; the line says which variable is missing."""
    with pytest.raises(PartMissing, match="TASKMESH_MANAGEMENT_URL"):
        backing.take_given(State.load(folders), {"TASKMESH_AMQP_URL": "amqp://a"})


def test_a_process_is_told_nothing_that_the_file_exports_for_people(folders, monkeypatch):
    """The file's URLs are elevated ones; a role gets its own, narrow ones, and the caller's other variables."""
    environment.write(folders.env, OURS)
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TASKMESH_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://elsewhere")

    told = environment.of_process({"TASKMESH_AMQP_URL": "amqp://billing"}, mesh_file=folders.env)

    assert told["TASKMESH_AMQP_URL"] == "amqp://billing"
    assert told["TASKMESH_LOG_LEVEL"] == "DEBUG"
    assert not {"TASKMESH_API_KEY", "TASKMESH_MANAGEMENT_URL", "OTEL_EXPORTER_OTLP_ENDPOINT"} & set(told)


def test_ports_and_passwords_stay_the_same(folders):
    """URLs that somebody has noted down go on working after a restart."""
    with locked(folders) as state:
        port, password = state.port("gateway-api"), state.password("postgres-gateway")
        state.save()

    with locked(folders) as state:
        assert (state.port("gateway-api"), state.password("postgres-gateway")) == (port, password)
        assert state.port("inbox") != port
    assert folders.state.stat().st_mode & 0o777 == 0o600
