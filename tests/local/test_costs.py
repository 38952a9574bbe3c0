"""`make costs`: the parts of it that need no mesh; a whole measurement is what it writes."""

from __future__ import annotations

import os
import subprocess
import sys

import psycopg
import pytest

from taskmesh.parts import PartMissing
from taskmesh.planning.costs import MEASURED, Costs
from taskmesh_local import ceilings, costs
from taskmesh_local.folders import Folders


def test_the_figures_that_are_kept_are_whole():
    """Each kind of task was measured on every process, exchange and database that the model adds up."""
    kept = Costs.model_validate_json(MEASURED.read_text())

    assert {*kept.kinds} == {*costs.KINDS}
    for kind in kept.kinds.values():
        assert {"postgres", "rabbitmq", "gateway-api", "gateway-relay", "gateway-projector"} <= {*kind.cpu}
        assert kind.published["commands"] == pytest.approx(round(kind.published["commands"]), abs=0.05)
        assert {*kind.kept} == {"gateway", "billing", "email"}


def test_the_processor_time_of_a_process_holds_that_of_its_children():
    """A child burns a fifth of a second, and ends; its parent is charged with it."""
    burn = "import os, time\nwhile time.process_time() < 0.2: pass"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); print(1, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert parent.stdout.readline() == b"1\n"
        tree = costs._tree(parent.pid, costs._family())

        assert costs._cpu_ms(tree) >= 200
        assert parent.pid in costs._tree(os.getpid(), costs._family())
    finally:
        parent.communicate(b"\n")


def test_figures_are_grouped_and_never_below_nothing():
    grouped = costs._grouped({"wal": 10.00049, "cpu/gateway-api": 2.5, "cpu/email-worker": -0.1})

    assert grouped == {"wal": 10.0, "cpu": {"gateway-api": 2.5, "email-worker": 0.0}}


def test_a_mesh_that_never_started_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKMESH_LOCAL_FOLDER", str(tmp_path / "mesh"))

    with pytest.raises(PartMissing, match="`make up` starts it"):
        costs.Meter.of(Folders.find())


def test_each_kind_of_commit_is_counted_and_nothing_is_left_behind(postgres):
    measured = ceilings.commits_per_second(postgres, seconds=0.3)

    assert {*measured} == {*ceilings.TRANSACTIONS}
    assert min(measured.values()) > 0
    with psycopg.connect(postgres) as connection:
        left = connection.execute("select count(*) from pg_database where datname like 'ceilings_%'").fetchone()
    assert left == (0,)
