"""What replies of SMTP servers mean."""

from __future__ import annotations

from datetime import timedelta

import pytest

from email_worker.replies import Outcome, Reply, Stage


@pytest.mark.parametrize(
    ("stage", "code", "text", "outcome"),
    [
        (Stage.ANSWER, 250, "2.0.0 queued as 4F1", Outcome.ACCEPTED),
        (Stage.ANSWER, None, "", Outcome.AMBIGUOUS),
        (Stage.ANSWER, 421, "4.3.2 shutting down", Outcome.DEFERRED),
        (Stage.DATA, None, "", Outcome.DEFERRED),
        (Stage.RCPT, None, "", Outcome.DEFERRED),
        (Stage.SESSION, None, "ConnectionRefusedError", Outcome.DEFERRED),
        (Stage.SESSION, 554, "no SMTP service here", Outcome.DEFERRED),
        (Stage.SESSION, 535, "5.7.8 authentication failed", Outcome.DEFERRED),
        (Stage.MAIL, 530, "5.7.0 must issue a STARTTLS command first", Outcome.DEFERRED),
        (Stage.MAIL, 552, "message size exceeds limit", Outcome.TOO_BIG),
        (Stage.ANSWER, 552, "5.3.4 message too big", Outcome.TOO_BIG),
        (Stage.MAIL, 550, "5.1.8 bad sender's system address", Outcome.SENDER_REFUSED),
        (Stage.MAIL, 553, "sender not allowed", Outcome.SENDER_REFUSED),
        (Stage.RCPT, 450, "4.2.1 mailbox busy", Outcome.DEFERRED),
        (Stage.RCPT, 421, "4.7.28 unusual rate of mail", Outcome.DEFERRED),
        (Stage.RCPT, 550, "5.1.1 no such user", Outcome.HARD_BOUNCE),
        (Stage.RCPT, 550, "5.1.10 recipient not found", Outcome.HARD_BOUNCE),
        (Stage.ANSWER, 550, "5.2.1 mailbox disabled", Outcome.HARD_BOUNCE),
        (Stage.RCPT, 550, "no such user here", Outcome.HARD_BOUNCE),
        (Stage.RCPT, 552, "5.2.2 mailbox full", Outcome.DEFERRED),
        (Stage.RCPT, 554, "rejected", Outcome.REFUSED),
        (Stage.RCPT, 550, "5.4.4 unable to route", Outcome.REFUSED),
        (Stage.RCPT, 550, "5.7.1 relaying denied", Outcome.SENDER_REFUSED),
        (Stage.ANSWER, 550, "5.7.26 unauthenticated mail is not accepted", Outcome.SENDER_REFUSED),
        (Stage.ANSWER, 550, "5.7.515 access denied", Outcome.SENDER_REFUSED),
        (Stage.ANSWER, 554, "transaction failed", Outcome.CONTENT_REFUSED),
        (Stage.ANSWER, 550, "5.6.0 bad content", Outcome.CONTENT_REFUSED),
    ],
)
def test_a_reply_decides_what_becomes_of_the_mail(stage, code, text, outcome):
    assert Reply(stage, code, text).outcome is outcome


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("4.7.0 greylisted, try again in 5 minutes", timedelta(minutes=5)),
        ("retry in 300 seconds", timedelta(seconds=300)),
        ("come back in 99999 hours", timedelta(hours=24)),
        ("try again later", None),
    ],
)
def test_a_servers_wish_to_wait_is_read_from_its_text(text, hint):
    assert Reply(Stage.RCPT, 450, text).wait_hint == hint


def test_the_printed_form_never_quotes_the_server():
    reply = Reply(Stage.RCPT, 550, "5.1.1 <anna@example.org> unknown")

    assert str(reply) == "550 5.1.1 at rcpt"
