"""Deliveries, against a real SMTP server and a real database."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import text

from email_worker.delivering import DEFERRALS, Ambiguous, GaveUp, HardBounce, SenderRefused, deferral
from email_worker.mailer import Mailer
from taskmesh.errors import PermanentError, TaskCancelled, TransientError
from taskmesh.objects import ObjectCorrupt
from taskmesh.testing.smtp import HANG_UP


class Crash(BaseException):
    """The process is gone: nothing that comes later is done."""


class CrashingMailer(Mailer):
    """A real mailer whose process dies at a named point."""

    at = "content"

    def send(self, envelope, mime, *, before_data):
        if self.at == "connecting":
            raise Crash

        def then_crash():
            before_data()
            raise Crash

        return super().send(envelope, mime, before_data=then_crash)


def crashing(desk, at):
    mailer = desk.office.mailer
    crashing_mailer = CrashingMailer(mailer.server, hello_name="mail.example.com", answer_seconds=5)
    crashing_mailer.at = at
    return replace(desk, office=replace(desk.office, mailer=crashing_mailer))


def test_an_accepted_mail_is_a_result_and_an_event(desk, smtp_sink):
    task = uuid4()

    result = desk.deliver(task)

    (mail,) = smtp_sink.messages
    assert result == {"message_id": str(task), "outcome": "accepted"}
    assert (mail.mail_from, mail.rcpt_to) == ("billing@example.com", ["anna@example.org"])
    assert mail.message_id == f"<{task}.message@mail.example.com>"
    assert mail.message["Auto-Submitted"] == "auto-generated"
    assert desk.events() == ["accepted"]


def test_a_redelivered_task_sends_nothing_and_answers_the_same(desk, smtp_sink):
    task = uuid4()
    first = desk.deliver(task)

    second = desk.deliver(task)

    assert second == first
    assert len(smtp_sink.messages) == 1
    assert desk.events() == ["accepted"]


def test_a_deferred_mail_waits_and_leaves_later_as_it_was(desk, smtp_sink):
    task = uuid4()
    smtp_sink.reply("DATA", "451 4.3.0 try again later")

    with pytest.raises(TransientError) as deferred:
        desk.deliver(task)
    content = desk.execute("select mime from message_contents").scalar_one()
    desk.rest(task)
    result = desk.deliver(task)

    assert DEFERRALS[0] * 0.9 < deferred.value.retry_after <= DEFERRALS[0] * 1.1
    assert result["outcome"] == "accepted"
    # The sink reads lines, so it gives back the end of the last one.
    assert smtp_sink.messages[0].content.rstrip() == bytes(content).rstrip()
    assert (desk.row(task).attempt, desk.row(task).deferrals) == (2, 1)


def test_a_deferred_mail_is_not_sent_before_its_time(desk, smtp_sink):
    task = uuid4()
    smtp_sink.reply("RCPT", "450 4.2.1 mailbox busy")
    with pytest.raises(TransientError):
        desk.deliver(task)

    with pytest.raises(TransientError) as early:
        desk.deliver(task)

    assert early.value.retry_after > timedelta(seconds=50)
    assert smtp_sink.messages == []


def test_the_relays_own_wish_for_a_later_time_is_honoured(desk, smtp_sink):
    smtp_sink.reply("RCPT", "450 4.2.0 greylisted, please retry in 20 minutes")

    with pytest.raises(TransientError) as deferred:
        desk.deliver(uuid4())

    assert deferred.value.retry_after > timedelta(minutes=19)


def test_deferrals_grow_and_stay_within_their_jitter():
    waits = [deferral(count, hint=None) for count in range(10)]

    assert all(wait <= later * 1.1 for wait, later in itertools.pairwise(waits))
    assert timedelta(hours=4) <= waits[-1] <= timedelta(hours=4.4)


def test_after_three_days_a_mail_is_given_up(desk, smtp_sink):
    task = uuid4()
    smtp_sink.reply("MAIL", "451 4.3.0 not now", times=2)
    with pytest.raises(TransientError):
        desk.deliver(task)
    desk.execute("update messages set created_at = now() - interval '72 hours'")
    desk.rest(task)

    with pytest.raises(GaveUp):
        desk.deliver(task)

    assert desk.events() == ["failed gave_up"]


def test_a_relay_that_is_down_defers(desk, smtp_sink):
    task = uuid4()
    smtp_sink.stop()

    with pytest.raises(TransientError):
        desk.deliver(task)

    assert desk.row(task).state == "deferred"


def test_a_hard_bounce_fails_the_task_and_suppresses_the_address(desk, smtp_sink):
    bounced, later = uuid4(), uuid4()
    smtp_sink.reply("RCPT", "550 5.1.1 <anna@example.org> no such user")

    with pytest.raises(HardBounce) as failure:
        desk.deliver(bounced)
    result = desk.deliver(later, desk.mail(to={"address": "Anna@Example.org"}))

    assert "anna" not in str(failure.value)
    assert result == {"message_id": str(later), "outcome": "suppressed"}
    assert smtp_sink.messages == []
    assert desk.events() == ["failed hard_bounce"]
    with pytest.raises(HardBounce):
        desk.deliver(bounced)
    assert desk.events() == ["failed hard_bounce"]


@pytest.mark.parametrize(
    ("command", "reply", "error"),
    [
        ("RCPT", "550 5.7.1 policy", SenderRefused),
        ("RCPT", "552 5.2.2 mailbox full", TransientError),
        ("MAIL", "530 5.7.0 must issue STARTTLS", TransientError),
        ("DATA", "554 5.6.0 bad content", PermanentError),
    ],
)
def test_a_recipient_is_not_punished_for_what_is_not_the_recipients_fault(desk, smtp_sink, command, reply, error):
    smtp_sink.reply(command, reply)
    with pytest.raises(error):
        desk.deliver(uuid4())

    result = desk.deliver(uuid4())

    assert result["outcome"] == "accepted"


def test_an_ambiguous_mail_rests_and_is_sent_once_more_with_the_same_bytes(desk, smtp_sink):
    task = uuid4()
    smtp_sink.reply("DATA", HANG_UP)

    with pytest.raises(TransientError) as doubt:
        desk.deliver(task)
    state = desk.row(task).state
    with pytest.raises(TransientError):
        desk.deliver(task)
    desk.rest(task)
    result = desk.deliver(task)

    first, second = smtp_sink.messages
    assert state == "ambiguous"
    assert doubt.value.retry_after > timedelta(minutes=9)
    assert result["outcome"] == "accepted"
    assert first.content == second.content


def test_a_mail_that_is_ambiguous_twice_is_never_sent_a_third_time(desk, smtp_sink):
    task = uuid4()
    smtp_sink.reply("DATA", HANG_UP, times=2)
    for _ in range(2):
        with pytest.raises(TransientError):
            desk.deliver(task)
        desk.rest(task)

    for _ in range(2):
        with pytest.raises(Ambiguous):
            desk.deliver(task)

    assert len(smtp_sink.messages) == 2
    assert desk.events() == ["failed ambiguous"]


def test_a_connection_lost_before_the_content_leaves_no_doubt(desk, smtp_sink):
    task = uuid4()
    smtp_sink.reply("RCPT", HANG_UP)

    with pytest.raises(TransientError):
        desk.deliver(task)

    assert desk.row(task).state == "deferred"


def test_a_crash_before_the_content_leaves_costs_nothing(desk, smtp_sink):
    task = uuid4()
    with pytest.raises(Crash):
        crashing(desk, "connecting").deliver(task)

    result = desk.deliver(task)

    assert result["outcome"] == "accepted"
    assert desk.row(task).resends == 0


@pytest.mark.parametrize("look", [1, 2])
def test_a_cancelled_mail_is_not_sent(desk, smtp_sink, look):
    """Before the relay is called, and at the last moment before it is given the content."""
    task = uuid4()

    with pytest.raises(TaskCancelled):
        desk.deliver(task, cancelled_at_look=look)

    assert smtp_sink.messages == []
    assert desk.events() == []


def test_a_mail_that_the_relay_has_is_told_although_it_is_cancelled_too_late(desk, smtp_sink):
    result = desk.deliver(uuid4(), cancelled_at_look=3)

    assert result["outcome"] == "accepted"
    assert desk.events() == ["accepted"]


def test_a_crash_in_data_is_treated_as_ambiguous_once_its_lease_is_over(desk, smtp_sink):
    task = uuid4()
    with pytest.raises(Crash):
        crashing(desk, "content").deliver(task)

    with pytest.raises(TransientError) as leased:
        desk.deliver(task)
    desk.rest(task)
    result = desk.deliver(task)

    assert leased.value.retry_after is None
    assert result["outcome"] == "accepted"
    assert desk.row(task).resends == 1


def test_a_database_that_restarts_while_the_relay_answers_does_not_cost_a_second_mail(desk, smtp_sink, caplog):
    task = uuid4()

    class Restarting(Mailer):
        def send(self, envelope, mime, *, before_data):
            reply = super().send(envelope, mime, before_data=before_data)
            with desk.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                others = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
                connection.execute(text(others + " and pid <> pg_backend_pid()"))
                connection.invalidate()
            return reply

    office = replace(desk.office, mailer=Restarting(desk.office.mailer.server, hello_name="mail.example.com"))
    desk.execute("select 1")
    with desk.engine.connect(), desk.engine.connect():
        pass  # two connections wait in the pool, and will be dead

    result = replace(desk, office=office).deliver(task)

    assert result["outcome"] == "accepted"
    assert "the relay's reply waits to be recorded" in caplog.messages[0]
    assert len(smtp_sink.messages) == 1
    assert desk.events() == ["accepted"]


def test_two_deliveries_at_once_send_one_mail(desk, smtp_sink):
    tasks = [uuid4() for _ in range(8)]
    start = threading.Barrier(16)

    def deliver(task):
        start.wait(10)
        try:
            return desk.deliver(task)["outcome"]
        except TransientError:
            return "busy"

    with ThreadPoolExecutor(16) as threads:
        outcomes = list(threads.map(deliver, tasks * 2))

    assert len({mail.message_id for mail in smtp_sink.messages}) == len(smtp_sink.messages) == 8
    assert outcomes.count("accepted") >= 8
    assert desk.events() == ["accepted"] * 8


def test_an_attempt_that_was_overtaken_does_not_send(desk, smtp_sink):
    task = uuid4()

    class Overtaken(Mailer):
        def send(self, envelope, mime, *, before_data):
            def second_first():
                assert desk.deliver(task)["outcome"] == "accepted"
                before_data()

            return super().send(envelope, mime, before_data=second_first)

    slow = replace(desk.office, mailer=Overtaken(desk.office.mailer.server, hello_name="mail.example.com"))

    with pytest.raises(TransientError):
        replace(desk, office=slow).deliver(task)

    assert len(smtp_sink.messages) == 1
    assert desk.deliver(task)["outcome"] == "accepted"


def test_an_attachment_arrives_as_it_was_stored_under_its_japanese_name(desk, smtp_sink):
    content = bytes(range(256)) * 300 + b"\r\n.\r\n.trailing"
    stored = desk.objects.put(content, "application/pdf")
    name = "請求書 2026-000123.pdf"

    desk.deliver(
        uuid4(),
        desk.mail(attachments=[{"sha256": stored.sha256, "filename": name, "media_type": "application/pdf"}]),
    )

    (part,) = smtp_sink.messages[0].message.iter_attachments()
    assert part.get_filename() == name
    assert part.get_content_type() == "application/pdf"
    assert part.get_content() == content


def test_a_missing_or_changed_attachment_fails_the_task(desk, smtp_sink, tmp_path):
    stored = desk.objects.put(b"%PDF", "application/pdf")
    (file,) = (path for path in tmp_path.rglob(stored.sha256) if path.is_file())
    file.write_bytes(b"%PDx")

    for sha256, error in [(stored.sha256, ObjectCorrupt), ("0" * 64, PermanentError)]:
        attachment = {"sha256": sha256, "filename": "a.pdf", "media_type": "application/pdf"}
        with pytest.raises(error):
            desk.deliver(uuid4(), desk.mail(attachments=[attachment]))

    assert smtp_sink.messages == []


def test_lines_that_begin_with_a_dot_survive(desk, smtp_sink):
    lines = ".\n..\n.hidden\nend"

    desk.deliver(uuid4(), desk.mail(text=lines))

    assert smtp_sink.messages[0].message.get_content().split() == lines.split()
