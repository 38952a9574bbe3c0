"""The rules of the HPA and of KEDA, against the examples and sentences of their documentation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskmesh.planning.autoscaling import (
    SCALE_DOWN,
    Behavior,
    Fallback,
    HorizontalPodAutoscaler,
    Keda,
    Pods,
    Policy,
    Reading,
    Rules,
    ScaledObject,
    Select,
    desired_by_average,
    desired_by_utilisation,
)

AT_ONCE = Rules(policies=(Policy(percent=100, period_seconds=15),))


class TestDesired:
    """The HPA's "algorithm details"."""

    @pytest.mark.parametrize(("value", "replicas"), [(200, 8), (50, 2)])
    def test_twice_the_target_doubles_and_half_of_it_halves(self, value, replicas):
        assert desired_by_average(Reading(4 * value, 100), 4) == replicas

    def test_ninety_percent_where_seventy_five_are_wanted_makes_sixty_of_fifty(self):
        """The example that Kubernetes 1.33 was announced with."""
        assert desired_by_utilisation(Pods((0.90,) * 50), 0.75, 50) == 60

    @pytest.mark.parametrize(("messages", "replicas"), [(109, 10), (111, 12), (91, 10), (90, 10), (89, 9)])
    def test_within_a_tenth_nothing_changes(self, messages, replicas):
        assert desired_by_average(Reading(messages, 10), 10) == replicas

    def test_a_replica_is_added_for_every_target_begun(self):
        assert desired_by_average(Reading(21, 10), 1) == 3

    def test_a_quotient_without_remainder_is_not_rounded_up(self):
        assert desired_by_average(Reading(0.3, 0.1), 1) == 3

    def test_starting_pods_count_as_idle_on_the_way_up(self):
        """Four at 90 %, two starting: 0.9 x 4 / 6 = 60 %, which is 1.2 times the target, of six."""
        assert desired_by_utilisation(Pods((0.9,) * 4, unready=2), 0.5, 6) == 8
        assert desired_by_utilisation(Pods((0.9,) * 4), 0.5, 6) == 8

    def test_starting_pods_hold_back_what_they_would_make_superfluous(self):
        assert desired_by_utilisation(Pods((0.9,) * 4, unready=8), 0.5, 12) == 12

    def test_pods_without_a_figure_are_fully_used_on_the_way_down(self):
        assert desired_by_utilisation(Pods((0.1,) * 4), 0.5, 6) == 1
        assert desired_by_utilisation(Pods((0.1,) * 4, missing=2), 0.5, 6) == 5

    def test_without_any_figure_there_is_no_wish(self):
        assert desired_by_utilisation(Pods((), unready=3), 0.5, 3) is None
        assert desired_by_average(Reading(None, 10), 3) is None


class TestHorizontalPodAutoscaler:
    """The HPA's "configurable scaling behavior"."""

    def test_by_default_it_adds_four_or_doubles_every_fifteen_seconds(self):
        hpa = HorizontalPodAutoscaler(1, 100)
        replicas, seen = 1, []
        for sync in range(6):
            replicas = hpa.sync(15.0 * sync, replicas, [80])
            seen.append(replicas)

        assert seen == [5, 10, 20, 40, 80, 80]

    def test_by_default_it_goes_down_at_once_after_five_minutes(self):
        hpa = HorizontalPodAutoscaler(1, 100)
        assert hpa.sync(0, 10, [10]) == 10

        seen = {at: hpa.sync(at, 10, [2]) for at in range(15, 316, 15)}

        assert [at for at, replicas in seen.items() if replicas == 2] == [300, 315]

    def test_eighty_go_down_to_ten_by_a_tenth_or_four_a_minute(self):
        """The documentation's example: 8 go first, then a tenth rounded up, and 4 at a time from 40 on."""
        rules = Rules(policies=(Policy(pods=4, period_seconds=60), Policy(percent=10, period_seconds=60)))
        hpa = HorizontalPodAutoscaler(1, 100, scale_down=rules)
        replicas, seen = 80, []
        for minute in range(14):
            replicas = hpa.sync(60.0 * minute, replicas, [10])
            seen.append(replicas)

        assert seen == [72, 64, 57, 51, 45, 40, 36, 32, 28, 24, 20, 16, 12, 10]

    def test_a_policy_counts_what_its_whole_period_has_seen(self):
        rules = Rules(policies=(Policy(pods=4, period_seconds=60),))
        hpa = HorizontalPodAutoscaler(1, 100, scale_up=rules)

        assert [hpa.sync(at, replicas, [50]) for at, replicas in ((0, 10), (15, 14), (45, 14), (61, 14))] == [
            14,
            14,
            14,
            18,
        ]

    def test_pods_go_one_by_one_once_the_window_is_over(self):
        """Seen on a cluster: a window of 60 s and one pod every 30 s made 9, 8, 7, 6 of nine."""
        rules = Rules(stabilization_seconds=60, policies=(Policy(pods=1, period_seconds=30),))
        hpa = HorizontalPodAutoscaler(1, 20, scale_down=rules)
        replicas, seen = hpa.sync(0, 9, [9]), []
        for at in range(15, 166, 15):
            replicas = hpa.sync(at, replicas, [2])
            seen.append(replicas)

        assert seen == [9, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5]

    def test_the_smallest_change_can_be_chosen(self):
        rules = Rules(
            policies=(Policy(pods=5, period_seconds=60), Policy(percent=10, period_seconds=60)), select=Select.MIN
        )

        assert HorizontalPodAutoscaler(1, 100, scale_down=rules).sync(0, 80, [10]) == 75

    def test_one_direction_can_be_switched_off(self):
        off = Rules(select=Select.DISABLED)

        assert HorizontalPodAutoscaler(1, 100, scale_down=off).sync(0, 80, [10]) == 80
        assert HorizontalPodAutoscaler(1, 100, scale_up=off).sync(0, 10, [80]) == 10

    def test_on_the_way_up_the_least_wish_of_the_window_counts(self):
        rules = Rules(stabilization_seconds=60, policies=(Policy(percent=900),))
        hpa = HorizontalPodAutoscaler(1, 100, scale_up=rules, scale_down=AT_ONCE)
        hpa.sync(0, 2, [2])

        assert [hpa.sync(at, 2, [wish]) for at, wish in ((15, 10), (30, 4), (45, 10), (60, 10))] == [2, 2, 2, 4]

    def test_the_largest_of_several_wishes_counts(self):
        assert HorizontalPodAutoscaler(1, 100).sync(0, 4, [2, 7, 5]) == 7

    def test_while_a_metric_fails_it_only_goes_up(self):
        hpa = HorizontalPodAutoscaler(1, 100, scale_down=AT_ONCE)

        assert hpa.sync(0, 4, [2, None]) == 4
        assert hpa.sync(15, 4, [6, None]) == 6
        assert hpa.sync(30, 6, [None, None]) == 6
        assert hpa.sync(45, 6, [2, 1]) == 2

    def test_at_zero_it_is_switched_off(self):
        assert HorizontalPodAutoscaler(1, 100).sync(0, 0, [50]) == 0

    @settings(deadline=None)
    @given(
        st.integers(1, 5),
        st.integers(0, 40),
        st.lists(st.one_of(st.none(), st.integers(0, 200)), min_size=1, max_size=60),
    )
    def test_it_stays_within_its_bounds_and_never_more_than_doubles_or_adds_four(self, minimum, more, wishes):
        hpa = HorizontalPodAutoscaler(minimum, minimum + more)
        replicas = minimum
        for sync, wish in enumerate(wishes):
            before, replicas = replicas, hpa.sync(15.0 * sync, replicas, [wish])
            assert minimum <= replicas <= minimum + more
            assert replicas <= max(2 * before, before + 4)
            if replicas < before:
                recent = wishes[max(sync - 19, 0) : sync + 1]
                assert replicas >= max(
                    [each for each in recent if each is not None and each <= minimum + more], default=0
                )

    @settings(deadline=None)
    @given(st.integers(1, 100), st.integers(0, 100))
    def test_a_constant_wish_is_reached_and_kept(self, start, wish):
        hpa = HorizontalPodAutoscaler(1, 100)
        replicas = start
        for sync in range(40):
            replicas = hpa.sync(15.0 * sync, replicas, [wish])

        assert replicas == max(wish, 1)


class TestKeda:
    """KEDA's "scaling deployments" and the specification of the ScaledObject."""

    def test_it_wakes_a_worker_for_the_first_message_and_leaves_the_rest_to_the_hpa(self):
        keda = Keda(ScaledObject(minimum=0, maximum=10), 1)

        assert keda.poll(0, 0, [Reading(0, 10)]) == 0
        assert keda.poll(30, 0, [Reading(95, 10)]) == 1
        assert keda.poll(60, 1, [Reading(95, 10)]) == 1
        assert keda.sync(60, 1, [Reading(95, 10)]) == 5

    def test_it_wakes_to_the_minimum(self):
        assert Keda(ScaledObject(minimum=3), 1).poll(0, 0, [Reading(1, 10)]) == 3

    def test_below_the_activation_value_it_stays_asleep_whatever_the_target_says(self):
        """activation 50, target 10, value 40: asleep, although the HPA would want four."""
        keda = Keda(ScaledObject(minimum=0, activation=50), 1)

        assert keda.poll(0, 0, [Reading(40, 10)]) == 0
        assert keda.poll(30, 0, [Reading(51, 10)]) == 1

    def test_it_puts_to_sleep_only_after_the_cooldown(self):
        keda = Keda(ScaledObject(minimum=0, cooldown_seconds=300), 1)
        keda.poll(0, 1, [Reading(5, 10)])

        asleep = [at for at in range(30, 400, 30) if keda.poll(at, 1, [Reading(0, 10)]) == 0]

        assert asleep[0] == 330

    def test_with_a_minimum_it_never_sleeps(self):
        keda = Keda(ScaledObject(minimum=2, cooldown_seconds=0), 1)

        assert keda.poll(1000, 2, [Reading(0, 10)]) == 2
        assert keda.sync(1000, 2, [Reading(0, 10)]) == 2

    def test_of_several_triggers_the_largest_counts(self):
        keda = Keda(ScaledObject(minimum=1), 2)

        assert keda.sync(0, 4, [Reading(40, 10), Reading(70, 10)]) == 7

    def test_any_active_trigger_keeps_it_awake(self):
        keda = Keda(ScaledObject(minimum=0, cooldown_seconds=0), 2)

        assert keda.poll(0, 1, [Reading(0, 10), Reading(1, 10)]) == 1

    def test_it_falls_back_after_more_failures_than_the_threshold(self):
        spec = ScaledObject(minimum=1, fallback=Fallback(3, 6, Behavior.STATIC), scale_down=AT_ONCE)
        keda = Keda(spec, 1)

        seen = [keda.sync(15.0 * sync, 2, [Reading(None, 10)]) for sync in range(4)]

        assert seen == [2, 2, 2, 6]
        assert keda.falls_back
        keda.sync(60, 6, [Reading(60, 10)])
        assert not keda.falls_back

    def test_eight_replicas_are_kept_through_an_outage(self):
        """Seen on a cluster: the broker was stopped for 80 s, the fallback condition was true, and 8 replicas were kept."""
        keda = Keda(ScaledObject(minimum=2, fallback=Fallback(3, 2), scale_down=AT_ONCE), 1)

        assert {keda.sync(15.0 * sync, 8, [Reading(None, 10)]) for sync in range(6)} == {8}
        assert keda.falls_back

    def test_the_default_fallback_cuts_running_workers(self):
        """Why the behavior must be named: `static` takes eight replicas down to two."""
        keda = Keda(ScaledObject(minimum=2, fallback=Fallback(3, 2, Behavior.STATIC), scale_down=AT_ONCE), 1)

        assert [keda.sync(15.0 * sync, 8, [Reading(None, 10)]) for sync in range(4)] == [8, 8, 8, 2]

    def test_without_a_fallback_a_failing_trigger_changes_nothing(self):
        keda = Keda(ScaledObject(minimum=1, scale_down=AT_ONCE), 1)

        assert {keda.sync(15.0 * sync, 8, [Reading(None, 10)]) for sync in range(20)} == {8}

    def test_a_failing_trigger_puts_nothing_to_sleep(self):
        keda = Keda(ScaledObject(minimum=0, cooldown_seconds=0), 1)

        assert keda.poll(1000, 3, [Reading(None, 10)]) == 3

    def test_the_window_holds_through_a_moment_of_zero(self):
        """RabbitMQ says 0 for some seconds after its start: five minutes of stabilization outlast that."""
        keda = Keda(ScaledObject(minimum=1, scale_down=SCALE_DOWN), 1)
        keda.sync(0, 8, [Reading(80, 10)])

        assert keda.sync(15, 8, [Reading(0, 10)]) == 8
        assert keda.sync(30, 8, [Reading(80, 10)]) == 8
