"""What a plan asks for, against the running code that it is for, and against the simulation of itself."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from taskmesh import topology
from taskmesh.planning import scenarios, simulation, sizing
from taskmesh.planning.costs import measured
from taskmesh.planning.scenarios import Scenario, TooManyTasks, Trigger
from taskmesh.planning.sizing import Pool, Requirement, Workers
from taskmesh.settings import WorkerSettings
from taskmesh.worker.app import configuration
from taskmesh.worker.task import MeshTask

SETTINGS = WorkerSettings(database_url="postgresql://a@b/c", amqp_url="amqp://a@b/c")

loads = st.builds(
    lambda rate, factor, **rest: Requirement(rate=rate, peak=rate * factor, **rest),
    st.floats(0.1, 50),
    st.floats(1, 5),
    run_seconds=st.floats(0.01, 10),
    cv=st.floats(0, 2),
    attempts=st.floats(1, 3),
    delay_seconds=st.floats(0.1, 120),
    percentile=st.floats(50, 99.9),
    backlog=st.integers(0, 100_000),
)
workers = st.builds(Workers, concurrency=st.integers(1, 32), prefetch=st.integers(1, 8))


def plan(rate=3.0, peak=None, run_seconds=0.5, *, concurrency=2, **load):
    wanted = Requirement(rate=rate, peak=peak or rate, run_seconds=run_seconds, **load)
    return sizing.plan(wanted, Workers(concurrency=concurrency), "mail")


class TestAgainstTheWorker:
    """Values that a plan must not invent."""

    def test_a_worker_holds_as_many_messages_as_a_plan_takes_it_to(self):
        assert configuration("billing", SETTINGS, listens=False)["worker_prefetch_multiplier"] == sizing.PREFETCH

    def test_concurrency_and_soft_shutdown_are_the_settings_defaults(self):
        assert (
            SETTINGS.worker_concurrency,
            SETTINGS.soft_shutdown_seconds,
        ) == (sizing.CONCURRENCY, sizing.SOFT_SHUTDOWN_SECONDS)

    def test_pools_are_those_that_a_worker_knows(self):
        assert {*Pool} == {*WorkerSettings.model_fields["worker_pool"].annotation.__args__}

    def test_the_time_limit_is_that_of_a_task_that_names_none(self):
        assert MeshTask.time_limit == sizing.TIME_LIMIT_SECONDS

    def test_a_queue_takes_what_its_policy_says(self):
        assert simulation.QUEUE_LIMIT == topology.MAX_MESSAGES


class TestTriggers:
    def test_the_worked_example_of_the_page(self):
        """Two slots, runs of 0.5 s, 5 s of delay, half of which is aimed at: 2 x (1 + 2.5 / 0.5) and 2 x 2.5."""
        triggers = plan(delay_seconds=5).triggers

        assert (triggers.queue_value, triggers.work_seconds_value) == (12, 5)

    @settings(deadline=None)
    @given(loads, workers)
    def test_a_pod_s_own_work_never_asks_for_another_pod(self, load, worker):
        made = sizing.plan(load, worker, "mail")

        assert made.triggers.queue_value >= worker.concurrency * worker.prefetch

    @settings(deadline=None)
    @given(st.integers(1, 64), st.floats(0.01, 60), st.floats(0.1, 600))
    def test_both_triggers_ask_for_the_same_at_the_run_time_that_was_planned(self, concurrency, run_seconds, delay):
        """With n pods busy, and a wait of `delay` in the queue, both want n: messages less those that run, times the run time."""
        in_messages = sizing.queue_value(concurrency, 1, run_seconds, delay)
        in_seconds = sizing.work_seconds_value(concurrency, delay)

        assert (in_messages + 1 - concurrency) * run_seconds >= in_seconds * (1 - 1e-9)
        assert (in_messages - concurrency) * run_seconds <= in_seconds * (1 + 1e-9) + 1e-9

    @settings(deadline=None)
    @given(loads, workers)
    def test_a_pod_has_time_to_end_what_it_runs(self, load, worker):
        triggers = sizing.plan(load, worker, "mail").triggers

        assert triggers.grace_seconds >= worker.time_limit_seconds + 30
        assert triggers.grace_seconds > triggers.soft_shutdown_seconds
        assert triggers.stabilization_seconds >= 60


class TestReplicas:
    @settings(deadline=None)
    @given(loads, workers)
    def test_a_plan_keeps_its_own_promise(self, load, worker):
        made = sizing.plan(load, worker, "mail")
        replicas = made.replicas

        assert 1 <= replicas.minimum <= replicas.maximum
        assert replicas.utilisation <= sizing.MOST_BUSY + 1e-6
        assert replicas.mean_wait_seconds < math.inf
        assert replicas.maximum * worker.concurrency > load.peak * load.attempts * load.run_seconds
        if load.percentile == 95:
            assert replicas.p95_wait_seconds <= load.delay_seconds

    @settings(deadline=None)
    @given(loads, workers, st.floats(1, 3))
    def test_more_work_never_needs_fewer_pods(self, load, worker, factor):
        small = sizing.plan(load, worker, "mail").replicas
        large = sizing.plan(
            load.model_copy(update={"rate": load.rate * factor, "peak": load.peak * factor}), worker, "mail"
        ).replicas

        assert small.minimum <= large.minimum
        assert small.maximum <= large.maximum

    def test_a_flood_is_worked_off_in_time(self):
        """A million runs of 0.5 s in an hour keep 139 slots busy, beside the 1.5 of 3 tasks/s."""
        assert plan(backlog=1_000_000, drain_seconds=3600).replicas.maximum == math.ceil(
            (1_000_000 * 0.5 / 3600 + 1.5) / 2
        )

    @pytest.mark.parametrize("trigger", [Trigger.QUEUE, Trigger.WORK, Trigger.BOTH])
    def test_a_simulated_day_keeps_the_delay(self, trigger):
        """The quick version of a day: from 3 to 15 tasks/s and back within four hours."""
        made = plan(rate=3, peak=15, delay_seconds=10)
        quick = simulation.Load("day", 14_400, scenarios.loads.wave(3, 15, 14_400), 0.5)

        outcome = scenarios.run(made, quick, trigger)

        assert outcome.delays.p95 <= 10
        assert outcome.most_replicas > made.replicas.minimum
        assert outcome.killed == 0

    def test_a_steady_load_is_met_without_scaling(self):
        made = plan(rate=8, peak=8, delay_seconds=1)

        outcome = scenarios.run(made, scenarios.load_of(made, Scenario.STEADY), Trigger.BOTH)

        assert outcome.fewest_replicas == outcome.most_replicas == made.replicas.minimum
        assert outcome.delays.p95 <= 1
        assert outcome.busy_share == pytest.approx(made.replicas.utilisation, abs=0.02)


class TestDemands:
    def test_what_a_task_costs_is_multiplied(self):
        cost = measured().kinds["mail"]
        needed = plan(rate=10, peak=100).demands

        assert needed.wal_mib_per_second == pytest.approx(100 * cost.wal / 1024**2)
        assert needed.messages_per_second == pytest.approx(100 * sum(cost.published.values()))
        assert {part.name: part.cpu_ms for part in needed.parts}["gateway-api"] == cost.cpu["gateway-api"]

    def test_an_invoice_is_three_tasks(self):
        load = Requirement(rate=30, peak=30, run_seconds=0.1)

        needed = sizing.plan(load, Workers(), "invoice").demands

        assert needed.wal_mib_per_second == pytest.approx(10 * measured().kinds["invoice"].wal / 1024**2, rel=0.01)

    def test_threads_need_no_process_each(self):
        few = sizing.plan(
            Requirement(rate=1, peak=1, run_seconds=1), Workers(concurrency=20, pool=Pool.THREADS), "mail"
        )
        many = sizing.plan(Requirement(rate=1, peak=1, run_seconds=1), Workers(concurrency=20), "mail")

        assert few.demands.pod_memory_mib < many.demands.pod_memory_mib / 4

    def test_limits_are_in_the_order_in_which_they_are_reached(self):
        for like in measured().kinds:
            carried = [
                limit.tasks_per_second
                for limit in sizing.plan(Requirement(rate=1, peak=1, run_seconds=1), Workers(), like).limits
            ]
            assert carried == sorted(carried)

    def test_only_invoices_take_numbers(self):
        def names(like):
            return {
                limit.what for limit in sizing.plan(Requirement(rate=1, peak=1, run_seconds=1), Workers(), like).limits
            }

        assert names("invoice") - names("mail") == {"a series of invoice numbers"}

    def test_the_figures_were_measured_side_by_side_as_they_are_used(self):
        commits = measured().commits_per_second

        assert commits["one_counter"] < commits["side_by_side"]
        assert commits["alone"] < commits["side_by_side"]


class TestWarnings:
    @pytest.mark.parametrize(
        ("load", "worker", "says"),
        [
            ({"cv": 3}, {}, "beyond what the formulas are good for"),
            ({"run_seconds": 400}, {}, "raise --time-limit"),
            ({}, {"prefetch": 4}, "not what Taskmesh workers do"),
            ({"peak": 50}, {}, "New pods help 40 s after the load has risen"),
            ({"peak": 500}, {}, "Raise max_connections"),
            ({"backlog": 2_000_000}, {}, "the queue trigger does not see it"),
            ({}, {"pool": Pool.THREADS}, "cannot enforce time limits"),
        ],
    )
    def test_what_a_plan_cannot_promise_it_says(self, load, worker, says):
        made = sizing.plan(Requirement(**{"rate": 3, "peak": 3, "run_seconds": 0.5} | load), Workers(**worker), "mail")

        assert any(says in warning for warning in made.warnings)

    def test_an_ordinary_plan_warns_of_nothing(self):
        assert plan().warnings == ()

    def test_what_cannot_be_is_refused(self):
        with pytest.raises(ValidationError, match="peak must not be below"):
            Requirement(rate=3, peak=2, run_seconds=1)
        with pytest.raises(ValidationError, match="concurrency must be 1"):
            Workers(pool=Pool.SOLO, concurrency=2)

    def test_a_simulation_that_would_take_minutes_is_refused_with_a_way_out(self):
        made = plan(rate=5000, peak=5000)

        with pytest.raises(TooManyTasks, match="Divide --rate, --peak and --backlog"):
            scenarios.run(made, scenarios.load_of(made, Scenario.WAVE), Trigger.BOTH)
