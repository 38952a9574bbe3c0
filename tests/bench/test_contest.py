"""How turns are taken, and what they are charged with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from meshbench.contest import take_turns
from meshbench.processes import Meter, tree

CHILD = "import os, sys, threading; threading.Thread(target=lambda: os.system('echo; read line')).start()"


def test_contestants_take_turns():
    """A B A B and not A A B B: what slows the machine down for a while must not meet one of them alone."""
    called = []
    contestants = {name: lambda name=name: called.append(name) or {"rate": float(len(called))} for name in "AB"}

    turns = take_turns(contestants, 2)

    assert "".join(called) == "ABAB"
    assert turns == {"A": [{"rate": 1.0}, {"rate": 3.0}], "B": [{"rate": 2.0}, {"rate": 4.0}]}


def test_a_process_that_a_thread_has_started_belongs_to_the_tree():
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"\n"

        family = tree(parent.pid)

        parent.communicate(b"\n")
    assert len(family) > 1


def test_costs_are_given_for_1000_tasks_and_the_generator_is_no_part_of_the_sum():
    meter = Meter({"own": os.getpid()})
    meter.begin()

    figures = meter.figures(500, generator=2.0)

    assert figures["cpu.generator"] == 4.0
    assert figures["cpu"] == pytest.approx(figures["cpu.own"])
    assert figures["mib.own"] > 1
