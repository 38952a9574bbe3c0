"""The schedule of faults and the load, which a seed decides."""

from __future__ import annotations

from itertools import islice

from taskmesh_local.faults.options import Options
from taskmesh_local.faults.orders import orders
from taskmesh_local.faults.schedule import BROKER, DATABASE, Kind


def test_a_seed_decides_the_faults():
    """Whoever replays a seed sees the same faults at the same moments."""
    options = Options(seed=7, minutes=4)

    assert options.faults() == Options(seed=7, minutes=4).faults()
    assert options.faults() != Options(seed=8, minutes=4).faults()


def test_a_short_campaign_has_more_than_forty_faults_of_every_kind():
    """Each role is killed, and both servers are killed, cut off, held and slowed down."""
    faults = Options(seed=1, minutes=4).faults()

    assert len(faults) > 40
    assert {fault.kind for fault in faults} == set(Kind)
    killed = {fault.victim for fault in faults if fault.kind is Kind.KILL}
    assert killed >= {role.name for role in Options(seed=1, minutes=4).fleet().roles} | {BROKER, DATABASE}


def test_no_victim_has_two_faults_at_a_time():
    """A stopped process that is killed meanwhile would be neither."""
    for seed in range(20):
        ends: dict[str, float] = {}
        for fault in Options(seed=seed, minutes=10).faults():
            assert fault.at >= ends.get(fault.victim, 0.0), fault
            ends[fault.victim] = fault.at + fault.seconds


def test_a_seed_decides_the_load():
    """The keys, too: a replay of a campaign repeats its requests."""
    first, again = (list(islice(orders(3, seconds=60, rate=20), 500)) for _ in range(2))

    assert first == again
    assert len({order.key for order in first}) == 500


def test_the_command_of_a_campaign_repeats_all_that_it_was_told():
    """What a failed campaign prints is enough to see it again."""
    options = Options(seed=5, minutes=1.5, rate=8, count=12)

    assert options.replay().endswith("faults --seed 5 --minutes 1.5 --rate 8 --faults 12")
