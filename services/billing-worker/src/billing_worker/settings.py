"""What the billing worker is told from outside."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from taskmesh.contracts.billing import VatId
from taskmesh.objects import StoreUrl
from taskmesh.settings import WorkerSettings

Text = Annotated[str, StringConstraints(min_length=1, max_length=200, strip_whitespace=True)]


def _lines(value: str) -> str:
    if not 1 <= len(_split(value)) <= 6:
        raise ValueError('has one to six lines, with "|" between them')
    return value


def _split(value: str) -> tuple[str, ...]:
    return tuple(line for line in (part.strip() for part in value.split("|")) if line)


class Seller(BaseModel):
    """The legal entity that issues invoices; kept with each invoice as it was on the day of issue."""

    model_config = ConfigDict(frozen=True)

    name: str
    address: tuple[str, ...]
    vat_id: str
    iban: str
    email: str | None = None


class BillingSettings(WorkerSettings):
    """The worker's settings; `TASKMESH_SELLER_*` is the company that issues the invoices."""

    object_store_url: StoreUrl
    """`file:///absolute/folder`, or `s3://bucket/prefix?endpoint=...&region=...`."""
    seller_name: Text
    seller_address: Annotated[Text, AfterValidator(_lines)]
    """Up to six lines with `|` between them."""
    seller_vat_id: VatId
    """Names the series of invoice numbers too: changing it starts a new one."""
    seller_iban: Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}[0-9]{2}[0-9A-Z ]{11,40}$")]
    seller_email: Annotated[str, Field(max_length=254)] | None = None
    """Printed as the contact for questions."""

    @property
    def seller(self) -> Seller:
        """The seller as it is printed and kept."""
        return Seller(
            name=self.seller_name,
            address=_split(self.seller_address),
            vat_id=self.seller_vat_id,
            iban=self.seller_iban,
            email=self.seller_email,
        )
