"""The simulation against queueing theory, against sums by hand, and against what must hold of any run."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskmesh.planning import load as loads
from taskmesh.planning.autoscaling import Fallback, HorizontalPodAutoscaler, Policy, Rules, ScaledObject
from taskmesh.planning.fleet import Fleet, PodSpec
from taskmesh.planning.load import BadRecording, Load, Window
from taskmesh.planning.queueing import Station
from taskmesh.planning.simulation import CpuScaler, KedaScaler, simulate

QUICK_DOWN = Rules(policies=(Policy(percent=100),))


class Fixed:
    """An autoscaler that follows a script: from each moment on, so many replicas."""

    polling_seconds = 1e9

    def __init__(self, script=None):
        self._script = script or {}

    def poll(self, now, replicas, seen):
        return replicas

    def sync(self, now, replicas, seen):
        return self._script.get(now, replicas)


def keda(*, minimum=1, maximum=50, queue=None, work=None, **spec):
    return KedaScaler(ScaledObject(minimum=minimum, maximum=maximum, **spec), queue_value=queue, work_value=work)


class TestAgainstTheory:
    @pytest.mark.parametrize(("cv", "slots", "near"), [(1.0, 10, 0.08), (0.0, 1, 0.15), (1.5, 4, 0.15)])
    def test_waits_are_those_of_the_queue(self, cv, slots, near):
        """Slots that are busy for 80 % of the time: the formula of M/M/c is exact, the others are near."""
        load = Load("steady", 300_000 / slots, loads.constant(0.8 * slots), 1.0, cv)

        outcome = simulate(load, PodSpec(slots=slots), Fixed(), replicas=1)

        station = Station(0.8 * slots, 1.0, cv, slots)
        assert outcome.busy_share == pytest.approx(0.8, abs=0.01)
        assert outcome.delays.p95 == pytest.approx(station.wait(95), rel=near)
        assert outcome.delays.p50 == pytest.approx(station.wait(50), abs=0.25)

    def test_slots_of_many_pods_are_one_queue(self):
        load = Load("steady", 5_000, loads.constant(8), 1.0)

        one = simulate(load, PodSpec(slots=10), Fixed(), replicas=1)
        five = simulate(load, PodSpec(slots=2), Fixed(), replicas=5)

        assert five.delays == one.delays


class TestPods:
    def test_a_pod_takes_tasks_once_it_has_started_up(self):
        fleet = Fleet(PodSpec(slots=2, startup_seconds=20), horizon=100)
        fleet.resize(10.0, 3)

        fleet.begin(29.0)
        assert (fleet.replicas, fleet.ready) == (3, 0)
        fleet.begin(30.0)
        assert (fleet.replicas, fleet.ready, len(fleet.free)) == (3, 3, 6)

    def test_the_youngest_pods_stop_first(self):
        fleet = Fleet(PodSpec(slots=1, startup_seconds=20), horizon=100)
        fleet.resize(0.0, 2, at_once=True)
        fleet.begin(0.0)
        old = list(fleet.pods)
        fleet.resize(5.0, 4)

        fleet.resize(10.0, 2)

        assert fleet.pods == old
        assert fleet.pod_seconds == 2 * 5

    def stopped_while_running(self, **pod):
        """One pod with two runs, of 10 s and of 100 s, is told to stop after 1 s."""
        fleet = Fleet(PodSpec(slots=2, **pod), horizon=200)
        fleet.resize(0.0, 1, at_once=True)
        fleet.begin(0.0)
        for due, seconds in ((0.0, 10.0), (0.5, 100.0)):
            fleet.start(0.5, due, seconds)
        fleet.resize(1.0, 0)
        return fleet

    def test_what_ends_within_the_soft_shutdown_ends_and_the_rest_is_handed_back(self):
        fleet = self.stopped_while_running(soft_shutdown_seconds=20, grace_seconds=90)

        assert (fleet.handed_back, fleet.killed, fleet.pod_seconds) == (1, 0, 21)
        assert [fleet.returned(at) for at in (20.0, 21.0, 22.0)] == [[], [0.5], []]
        assert fleet.lost_seconds == 20.5

    def test_a_grace_period_below_the_soft_shutdown_kills(self):
        fleet = self.stopped_while_running(soft_shutdown_seconds=120, grace_seconds=30)

        assert (fleet.handed_back, fleet.killed, fleet.pod_seconds) == (0, 1, 31)

    def test_with_enough_time_nothing_is_interrupted(self):
        fleet = self.stopped_while_running(soft_shutdown_seconds=120, grace_seconds=330)

        assert (fleet.handed_back, fleet.killed, fleet.pod_seconds) == (0, 0, 100.5)

    @pytest.mark.parametrize("soft", [0.0, 5.0, 100.0])
    def test_runs_that_have_ended_or_stopped_are_not_busy(self, soft):
        fleet = self.stopped_while_running(soft_shutdown_seconds=soft, grace_seconds=330)
        for second in range(1, 180):
            fleet.end(float(second))

        assert fleet.busy == 0


class TestSimulation:
    def test_every_task_is_started_or_waits(self):
        load = Load("rising", 600, lambda at: at / 20, 1.0)

        outcome = simulate(load, PodSpec(slots=2), keda(maximum=8, queue=4), replicas=1)

        assert outcome.due == outcome.started + outcome.waiting
        assert outcome.waiting > 0
        assert outcome.oldest_waiting_seconds > 0

    def test_interrupted_tasks_run_again(self):
        load = Load("long", 900, loads.constant(0), 60.0, cv=0.0, known_ahead=((10.0, 20),))

        outcome = simulate(load, PodSpec(slots=1, soft_shutdown_seconds=5), Fixed({30.0: 10}), replicas=20)

        assert (outcome.due, outcome.handed_back, outcome.started, outcome.waiting) == (20, 10, 30, 0)

    def test_the_same_seed_is_the_same_run_and_another_is_not(self):
        load = Load("steady", 300, loads.constant(5), 1.0)

        runs = [simulate(load, PodSpec(slots=2), keda(queue=4), replicas=3, seed=seed) for seed in (7, 7, 8)]

        assert runs[0] == runs[1] != runs[2]

    def test_while_the_broker_is_away_nothing_starts_and_no_pod_goes(self):
        load = Load("outage", 900, loads.constant(8), 1.0, outage=Window(300, 600))
        spec = {"fallback": Fallback(3, 1), "scale_down": QUICK_DOWN}

        outcome = simulate(load, PodSpec(slots=2), keda(queue=2, **spec), replicas=5)

        away = [at for at in outcome.timeline if 330 <= at.at_seconds < 585]
        assert {at.delays for at in away} == {None}
        assert len({at.replicas for at in away}) == 1
        assert away[-1].waiting == pytest.approx(8 * 300, rel=0.15)

    def test_the_moment_of_zero_after_an_outage_takes_pods_without_a_window(self):
        """What the scale-down window is for: the broker says 0 of a queue of hundreds just after its start."""
        load = Load("outage", 900, loads.constant(12), 1.0, outage=Window(300, 600))
        spec = {"maximum": 5, "queue": 2, "fallback": Fallback(3, 1)}

        hasty = simulate(load, PodSpec(slots=2), keda(scale_down=QUICK_DOWN, **spec), replicas=5)
        patient = simulate(load, PodSpec(slots=2), keda(**spec), replicas=5)

        before = [at for at in hasty.timeline if 240 <= at.at_seconds < 290]
        assert min(at.waiting for at in before) > 100
        assert min(at.replicas for at in before) == 5
        assert min(at.replicas for at in hasty.timeline if 590 <= at.at_seconds <= 615) == 1
        assert min(at.replicas for at in patient.timeline if 590 <= at.at_seconds <= 615) == 5

    def test_work_that_is_due_soon_has_its_pods_when_it_comes(self):
        load = Load("batch", 600, loads.constant(0.1), 1.0, known_ahead=((300.0, 400),))
        pod = PodSpec(slots=2, startup_seconds=20)

        ahead = simulate(load, pod, keda(work=10, scale_down=QUICK_DOWN), replicas=1)
        behind = simulate(load, pod, keda(queue=4, scale_down=QUICK_DOWN), replicas=1)

        ready = {
            name: {at.at_seconds: at.ready for at in run.timeline}[300.0] for name, run in (("a", ahead), ("b", behind))
        }
        assert ready["a"] >= 10 > 2 >= ready["b"]
        assert ahead.delays.p95 < behind.delays.p95

    def test_seconds_of_work_keep_the_delay_when_runs_get_slow_and_messages_do_not(self):
        """Four times the run time: a target in messages makes tasks wait four times as long, one in seconds does not."""
        load = Load("slow", 3600, loads.constant(10), 1.0, slow=Window(600, 3600), slowness=4.0)
        pod = PodSpec(slots=2, startup_seconds=10)

        def late_wait(scaler):
            run = simulate(load, pod, scaler, replicas=6)
            ends = [at.delays.p50 for at in run.timeline if at.at_seconds > 2400 and at.delays]
            return sum(ends) / len(ends)

        in_messages = late_wait(keda(queue=22, scale_down=QUICK_DOWN))
        in_seconds = late_wait(keda(work=20, scale_down=QUICK_DOWN))

        assert in_messages > 3 * 10
        assert in_seconds < 1.2 * 10

    def test_an_hpa_on_cpu_takes_pods_away_when_a_provider_is_slow(self):
        load = Load("slow", 2400, loads.constant(10), 1.0, slow=Window(600, 2400), slowness=4.0)
        pod = PodSpec(slots=2)
        hpa = HorizontalPodAutoscaler(2, 50, scale_down=QUICK_DOWN)

        outcome = simulate(load, pod, CpuScaler(hpa, target=0.7, pod=pod), replicas=7)

        last = outcome.timeline[-1]
        assert last.replicas < 7
        assert last.waiting > 1000

    def test_a_worker_at_zero_wakes_sleeps_and_loses_nothing(self):
        load = Load("rare", 3600, lambda at: 5.0 if at % 1800 < 10 else 0.0, 1.0)

        outcome = simulate(load, PodSpec(slots=2), keda(minimum=0, queue=4, cooldown_seconds=60), replicas=0)

        assert (outcome.fewest_replicas, outcome.waiting) == (0, 0)
        assert outcome.most_replicas >= 2
        assert outcome.delays.p50 > 20, "a pod had to start first"

    def test_failing_runs_come_back_after_their_backoff(self):
        load = Load("failing", 1200, loads.constant(2), 1.0, slow=Window(0, 600), failing=0.5, retry_seconds=60)

        outcome = simulate(load, PodSpec(slots=20), Fixed(), replicas=1)

        # Half of the runs of the first 600 s fail; of their repetitions within it, half again.
        assert outcome.due == pytest.approx(2 * 1200 + 2 * 600 * 0.95, rel=0.1)

    def test_a_flood_is_worked_off_at_the_rate_of_the_pods(self):
        load = Load("flood", 600, loads.flood(0, 100_000, 0, 5_000), 0.1)

        outcome = simulate(load, PodSpec(slots=10), keda(minimum=1, maximum=5, queue=20), replicas=5)

        drained = next(at.at_seconds for at in outcome.timeline if at.at_seconds > 30 and at.waiting == 0)
        assert drained == pytest.approx(100_000 / (5 * 10 / 0.1), rel=0.05)

    @settings(max_examples=25, deadline=None)
    @given(
        st.floats(0, 6),
        st.floats(0.2, 8),
        st.floats(0, 2),
        st.integers(1, 4),
        st.integers(0, 2),
        st.floats(0, 60),
        st.floats(0, 40),
        st.integers(0, 1000),
    )
    def test_whatever_happens_the_books_balance(self, rate, run, cv, slots, minimum, startup, soft, seed):
        load = Load(
            "any", 900, loads.flood(rate, 200, 300, 20), run, cv, outage=Window(200, 260), slow=Window(500, 700),
            slowness=3.0, failing=0.2, known_ahead=((450.0, 50), (450.0, 5)),
        )  # fmt: skip
        pod = PodSpec(slots=slots, startup_seconds=startup, soft_shutdown_seconds=soft, grace_seconds=20)
        scaler = keda(minimum=minimum, maximum=6, queue=2 * slots, work=4 * slots, scale_down=QUICK_DOWN)

        outcome = simulate(load, pod, scaler, replicas=minimum, seed=seed)

        returned = outcome.handed_back + outcome.killed
        # A run that is interrupted within the last seconds has no time to be back in the queue.
        assert 0 <= outcome.due + returned - outcome.started - outcome.waiting <= 6 * slots
        assert 0 <= outcome.busy_share <= 1
        assert minimum <= outcome.fewest_replicas <= outcome.most_replicas <= 6
        assert outcome.delays.p50 <= outcome.delays.p95 <= outcome.delays.p99 <= outcome.delays.longest
        assert 0 <= outcome.wasted_pod_seconds <= outcome.pod_seconds + 0.1


class TestLoads:
    def test_arrivals_have_the_mean_and_the_spread_of_chance(self):
        random = Random(1)

        for mean in (3.0, 200.0):
            drawn = [loads.poisson(random, mean) for _ in range(4000)]
            average = sum(drawn) / len(drawn)
            assert average == pytest.approx(mean, rel=0.03)
            assert sum((each - average) ** 2 for each in drawn) / len(drawn) == pytest.approx(mean, rel=0.1)

    @given(st.floats(0.1, 3))
    @settings(max_examples=10, deadline=None)
    def test_run_times_have_the_mean_and_the_spread_that_were_asked_for(self, cv):
        drawn = loads.spread(cv)

        assert sum(drawn) / len(drawn) == pytest.approx(1)
        assert (sum((each - 1) ** 2 for each in drawn) / len(drawn)) ** 0.5 == pytest.approx(cv, rel=0.15)

    def test_a_day_goes_from_its_lowest_to_its_peak_and_back(self):
        day = loads.wave(2, 18, 86_400)

        assert (day(0), day(43_200)) == (2, 18)
        assert sum(day(hour * 3600) for hour in range(24)) / 24 == pytest.approx(10)

    def test_a_flood_brings_what_it_says(self):
        load = Load("flood", 1000, loads.flood(0, 30_000, 100, 300), 1.0)

        assert load.expected_tasks() == 30_000

    def test_a_recording_is_read_from_its_first_row_on(self, tmp_path):
        file = tmp_path / "load.csv"
        file.write_text("at_seconds,tasks,comment\n1700000000,600,a\n1700000060,0,b\n1700000120,60,c\n")

        seconds, rate = loads.read_recording(file)

        assert seconds == 180
        assert [rate(at) for at in (0, 59, 60, 120, 179)] == [10, 10, 0, 1, 1]

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, "cannot be read: No such file"),
            ("time,count\n1,2\n", "needs a first line with the columns at_seconds and tasks"),
            ("at_seconds,tasks\n1,2\n", "needs two rows or more"),
            ("at_seconds,tasks\n1,2\n1,2\n", "with at_seconds rising"),
            ("at_seconds,tasks\n1,2\nnoon,2\n", "line 3: at_seconds and tasks must be numbers"),
            ("at_seconds,tasks\n1,2\n2\n", "line 3: at_seconds and tasks must be numbers"),
            ("at_seconds,tasks\n1,2\n2,-1\n", "line 3: tasks must be 0 or more"),
            ("at_seconds,tasks\n1,2\n2,nan\n", "line 3: tasks must be 0 or more"),
            ("at_seconds,tasks\n1,2\n2,2\n", "lasts 2 s; it must be a minute or more"),
            ("at_seconds,tasks\n1700000000000,2\n1700003600000,2\n", "31 days or less"),
        ],
    )
    def test_a_recording_that_cannot_be_used_says_what_to_mend(self, tmp_path, content, says):
        file = tmp_path / "load.csv"
        if content is not None:
            file.write_text(content)

        with pytest.raises(BadRecording, match=says):
            loads.read_recording(file)
