"""What email-worker is told by its environment, beyond what every worker is told."""

from __future__ import annotations

from email.headerregistry import Address
from email.utils import parseaddr
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, StringConstraints

from email_worker.addresses import is_header_safe, parse_address
from email_worker.mailer import SmtpServer
from taskmesh.settings import WorkerSettings


def _smtp(value: SecretStr) -> SecretStr:
    SmtpServer.parse(value.get_secret_value())
    return value


def _mailbox(value: str) -> str:
    parse_address(parseaddr(value)[1])
    if not is_header_safe(value):
        raise ValueError("holds characters that do not belong into a header")
    return value


class EmailSettings(WorkerSettings):
    """Where mail goes out, under whose name, and where attachments come from."""

    smtp_url: Annotated[SecretStr, AfterValidator(_smtp)]
    """`smtp://host:port`, `smtp+starttls://user:password@host:port` or `smtps://user:password@host:port`."""
    smtp_ca_file: Path | None = None
    """Certificates to trust for the relay in place of the system's."""
    smtp_answer_seconds: Annotated[float, Field(gt=0, le=900)] = 600.0
    """How long to wait for the relay's reply to a whole message (RFC 5321 4.5.3.2.6: ten minutes)."""
    resend_after_seconds: Annotated[float, Field(ge=0)] = 600.0
    """How long a message whose fate is unknown rests before its one resend."""
    mail_domain: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]+(\.[a-z0-9-]+)*$", max_length=253)]
    """The domain in each Message-ID, and our name in EHLO; in ASCII."""
    mail_from: Annotated[str, AfterValidator(_mailbox)]
    """`Example Ltd <billing@example.com>`: the From of every mail and the sender in its envelope."""
    object_store_url: SecretStr
    """`file:///absolute/folder` or `s3://bucket/prefix`: where attachments are fetched."""

    @property
    def sender(self) -> Address:
        """`mail_from`, read."""
        name, address = parseaddr(self.mail_from)
        return Address(display_name=name, addr_spec=parse_address(address))

    @property
    def sender_name(self) -> str:
        """Whom the reader takes the mail to be from."""
        return self.sender.display_name or self.mail_domain
