"""ISO 4217: which currencies there are, and how many decimals each one's minor unit has.

The table is vendored from the list that the ISO 4217 maintenance agency published on 2026-01-01. CLDR (and so Babel)
differs for thirteen currencies: it knows what people write, and ISO knows what an amount is. Amounts follow ISO.
"""

from __future__ import annotations

from decimal import Decimal

_CODES_BY_EXPONENT = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    2: (
        "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF CHW "
        "CNY COP COU CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF "
        "IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK "
        "MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP "
        "SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD USN UYU UZS VED VES WST XCD XCG YER "
        "ZAR ZMW ZWG"
    ),
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}

EXPONENTS: dict[str, int] = {code: exponent for exponent, codes in _CODES_BY_EXPONENT.items() for code in codes.split()}
"""Decimals of the minor unit by currency code; metals, test codes and baskets, which have none, are left out."""

CURRENCIES: tuple[str, ...] = tuple(sorted(EXPONENTS))

MAX_MINOR = 2**53 - 1
"""The largest amount in minor units, either way: what every JSON reader keeps exactly."""


class UnknownCurrency(ValueError):
    """The code is not in ISO 4217, or names something without a minor unit, such as gold."""


def exponent(currency: str) -> int:
    """The number of decimals of a currency's minor unit: EUR 2, JPY 0, BHD 3.

    Raises:
        UnknownCurrency: There is no such currency.
    """
    try:
        return EXPONENTS[currency]
    except KeyError:
        raise UnknownCurrency(f"{currency!r} is not an ISO 4217 currency code") from None


def to_major(amount_minor: int, currency: str) -> Decimal:
    """The amount in major units, exact, with as many decimals as the currency has: 1000 BHD-minor is `1.000`.

    Raises:
        UnknownCurrency: There is no such currency.
    """
    return Decimal(amount_minor).scaleb(-exponent(currency))
