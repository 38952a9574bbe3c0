"""The thirty invoices of the demo: twenty-seven that a company in Berlin might write, and three that nobody may.

They are the same at every run.
"""

# ruff: noqa: RUF001 - names and words are in the script they are written in

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from taskmesh.contracts.billing import Buyer, InvoiceLine, IssueInvoice, Tax, TaxCategory

SEED = 20261122
LONG_INVOICE_LINES = 300

REVERSE_CHARGE = Tax(category=TaxCategory.REVERSE_CHARGE, rate="0")
INTRA_COMMUNITY = Tax(category=TaxCategory.INTRA_COMMUNITY, rate="0")
EXPORT = Tax(category=TaxCategory.EXPORT, rate="0")
ZERO = Tax(category=TaxCategory.ZERO, rate="0")
EXEMPT = Tax(category=TaxCategory.EXEMPT, rate="0", exemption_reason="Training, § 4 Nr. 21 UStG")


def _standard(*rates: str) -> tuple[Tax, ...]:
    return tuple(Tax(rate=rate) for rate in rates)


GERMAN = _standard("19", "7")
GREEK = _standard("24", "13", "6")
JAPANESE = _standard("10", "8")
BAHRAINI = (*_standard("10"), ZERO)


@dataclass(frozen=True, slots=True)
class Product:
    """Something to put on a line, and what it costs in each currency."""

    names: dict[str, str]
    eur: str
    jpy: str
    bhd: str
    quantities: tuple[str, ...]

    def line(self, language: str, currency: str, quantity: str, tax: Tax) -> InvoiceLine:
        return InvoiceLine(
            description=self.names.get(language, self.names["en"]),
            quantity=quantity,
            unit_price={"EUR": self.eur, "JPY": self.jpy, "BHD": self.bhd}[currency],
            tax=tax,
        )


# Prices below the minor unit are meant: a line is rounded once, after it is multiplied.
PRODUCTS = (
    Product(
        {
            "en": "Platform subscription, team plan",
            "de": "Plattform-Abonnement, Team",
            "fr": "Abonnement à la plateforme, équipe",
            "el": "Συνδρομή πλατφόρμας, ομάδα",
            "ja": "プラットフォーム利用料(チーム)",
            "ar": "اشتراك المنصة للفِرق",
        },
        eur="249.00",
        jpy="39800",
        bhd="102.500",
        quantities=("1", "2", "3"),
    ),
    Product(
        {
            "en": "Tasks executed, per thousand",
            "de": "Ausgeführte Aufgaben, je tausend",
            "fr": "Tâches exécutées, par millier",
            "el": "Εκτελεσμένες εργασίες, ανά χίλιες",
            "ja": "タスク実行(千件あたり)",
            "ar": "المهام المنفذة لكل ألف",
        },
        eur="0.3875",
        jpy="61.5",
        bhd="0.15925",
        quantities=("12", "318.4", "1250", "18420.75"),
    ),
    Product(
        {
            "en": "Consulting, hours",
            "de": "Beratung, Stunden",
            "fr": "Conseil, heures",
            "el": "Συμβουλευτικές υπηρεσίες, ώρες",
            "ja": "コンサルティング(時間)",
            "ar": "استشارات بالساعة",
        },
        eur="135.00",
        jpy="21500",
        bhd="55.750",
        quantities=("1.5", "7.5", "12", "48.25"),
    ),
    Product(
        {
            "en": "Object storage, GB-months",
            "de": "Objektspeicher, GB-Monate",
            "fr": "Stockage d'objets, Go-mois",
            "el": "Αποθήκευση αντικειμένων, GB-μήνες",
            "ja": "オブジェクトストレージ(GB・月)",
            "ar": "تخزين الكائنات، غيغابايت شهريًا",
        },
        eur="0.0215",
        jpy="3.42",
        bhd="0.00884",
        quantities=("250", "1024", "18420.5"),
    ),
    Product(
        {
            "en": "Handbook “Running Taskmesh”, printed",
            "de": "Handbuch „Taskmesh betreiben“, gedruckt",
            "fr": "Manuel « Exploiter Taskmesh », imprimé",
            "el": "Εγχειρίδιο «Λειτουργία του Taskmesh», έντυπο",
            "ja": "『Taskmesh運用ハンドブック』印刷版",
            "ar": "دليل «تشغيل Taskmesh»، نسخة مطبوعة",
        },
        eur="39.90",
        jpy="6300",
        bhd="16.425",
        quantities=("1", "2", "5", "12"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Customer:
    """Whom an invoice is for, and how it is taxed there."""

    name: str
    address: tuple[str, ...]
    country: str
    email: str
    locale: str
    taxes: tuple[Tax, ...]
    currency: str = "EUR"
    vat_id: str | None = None

    def buyer(self) -> Buyer:
        return Buyer(
            name=self.name,
            address=self.address,
            country=self.country,
            email=self.email,
            locale=self.locale,
            vat_id=self.vat_id,
        )


CUSTOMERS = (
    Customer(
        name="Bäckerei Grünwald & Söhne GmbH",
        address=("Oranienstraße 14", "10999 Berlin"),
        country="DE",
        email="buchhaltung@baeckerei-gruenwald.example",
        locale="de-DE",
        taxes=GERMAN,
        vat_id="DE136695976",
    ),
    Customer(
        name="Stadtwerke Lüneburg AöR",
        address=("Auf der Hude 2", "21335 Lüneburg"),
        country="DE",
        email="rechnungen@stadtwerke-lueneburg.example",
        locale="de-DE",
        taxes=GERMAN,
    ),
    Customer(
        name="Volkshochschule Görlitz e. V.",
        address=("Langenstraße 23", "02826 Görlitz"),
        country="DE",
        email="verwaltung@vhs-goerlitz.example",
        locale="de-DE",
        taxes=(EXEMPT,),
    ),
    Customer(
        name="Société Générale des Épices S.A.R.L.",
        address=("8 rue de l'Échiquier", "75010 Paris"),
        country="FR",
        email="compta@epices-generales.example",
        locale="fr-FR",
        taxes=(REVERSE_CHARGE,),
        vat_id="FR40303265045",
    ),
    Customer(
        name="Théâtre de l'Odyssée",
        address=("Place Bellecour 3", "69002 Lyon"),
        country="FR",
        email="administration@theatre-odyssee.example",
        locale="fr-FR",
        taxes=_standard("20", "5.5"),
    ),
    Customer(
        name="Łódzkie Zakłady Optyczne Sp. z o.o.",
        address=("ul. Piotrkowska 120", "90-006 Łódź"),
        country="PL",
        email="faktury@lzo.example",
        locale="en-GB",
        taxes=(INTRA_COMMUNITY,),
        vat_id="PL5260001246",
    ),
    Customer(
        name="Åsa Björkqvist Arkitekter AB",
        address=("Sveavägen 41", "111 34 Stockholm"),
        country="SE",
        email="faktura@bjorkqvist.example",
        locale="en-GB",
        taxes=(REVERSE_CHARGE,),
        vat_id="SE556188840401",
    ),
    Customer(
        name="Niño & Peña, Hermanos, S.L.",
        address=("Calle de Alcalá 52, 3.º izq.", "28014 Madrid"),
        country="ES",
        email="facturas@nino-pena.example",
        locale="en-GB",
        taxes=_standard("21", "10", "4"),
        vat_id="ESB58378431",
    ),
    Customer(
        name="O'Sullivan Logistics Ltd",
        address=("14 Merchant's Quay", "Dublin 8", "D08 F8WY"),
        country="IE",
        email="accounts@osullivan-logistics.example",
        locale="en-IE",
        taxes=(REVERSE_CHARGE,),
        vat_id="IE6388047V",
    ),
    Customer(
        name="Høegh Marine ApS",
        address=("Nyhavn 17, 2. tv.", "1051 København K"),
        country="DK",
        email="bogholderi@hoegh-marine.example",
        locale="en-GB",
        taxes=(INTRA_COMMUNITY,),
        vat_id="DK13585628",
    ),
    Customer(
        name="Kovács Gergő e.v.",
        address=("Ráday utca 9", "1092 Budapest"),
        country="HU",
        email="gergo@kovacs-muhely.example",
        locale="en-GB",
        taxes=_standard("27", "18", "5"),
    ),
    Customer(
        name="Ελένη Παπαδοπούλου και Σία Ο.Ε.",
        address=("Ερμού 56", "105 63 Αθήνα"),
        country="GR",
        email="logistirio@papadopoulou.example",
        locale="el-GR",
        taxes=(REVERSE_CHARGE,),
        vat_id="EL094259216",
    ),
    Customer(
        name="Εκδόσεις Αιγαίο Α.Ε.",
        address=("Λεωφόρος Νίκης 21", "546 22 Θεσσαλονίκη"),
        country="GR",
        email="timologia@ekdoseis-aigaio.example",
        locale="el-GR",
        taxes=GREEK,
    ),
    Customer(
        name="Γιώργος Ξανθόπουλος",
        address=("Πλατεία Συντριβανίου 4", "731 32 Χανιά"),
        country="GR",
        email="giorgos@xanthopoulos.example",
        locale="el-GR",
        taxes=GREEK,
    ),
    Customer(
        name="Ναυτιλιακή Ιονίου Μ.Ε.Π.Ε.",
        address=("Ακτή Μιαούλη 85", "185 38 Πειραιάς"),
        country="GR",
        email="accounting@ionian-shipping.example",
        locale="el-GR",
        taxes=(REVERSE_CHARGE,),
        vat_id="EL998537832",
    ),
    Customer(
        name="株式会社さくら物流",
        address=("〒104-0061", "東京都中央区銀座4丁目5番6号", "さくらビル8階"),
        country="JP",
        email="keiri@sakura-butsuryu.example",
        locale="ja-JP",
        taxes=JAPANESE,
        currency="JPY",
        vat_id="T1234567890123",
    ),
    Customer(
        name="有限会社山本製作所",
        address=("〒530-0001", "大阪府大阪市北区梅田2-4-9"),
        country="JP",
        email="seikyu@yamamoto-seisakusho.example",
        locale="ja-JP",
        taxes=JAPANESE,
        currency="JPY",
    ),
    Customer(
        name="渡邉 恵子",
        address=("〒602-8570", "京都府京都市上京区下立売通新町西入"),
        country="JP",
        email="keiko@watanabe.example",
        locale="ja-JP",
        taxes=JAPANESE,
        currency="JPY",
    ),
    Customer(
        name="北海道酪農協同組合",
        address=("〒060-0808", "北海道札幌市北区北八条西5丁目"),
        country="JP",
        email="jimukyoku@hokkaido-rakuno.example",
        locale="ja-JP",
        taxes=_standard("8"),
        currency="JPY",
    ),
    Customer(
        name="カフェ・ド・リール",
        address=("〒810-0001", "福岡県福岡市中央区天神1-8-1"),
        country="JP",
        email="tencho@cafe-de-lille.example",
        locale="ja-JP",
        taxes=(EXPORT,),
        currency="JPY",
    ),
    Customer(
        name="Sato & Miller Translations",
        address=("2-11-3 Meguro", "Meguro-ku", "Tokyo 153-0063"),
        country="JP",
        email="office@sato-miller.example",
        locale="en",
        taxes=JAPANESE,
        currency="JPY",
    ),
    Customer(
        name="شركة اللؤلؤ للتجارة ذ.م.م.",
        address=("مبنى 215، طريق 1704", "المنطقة الدبلوماسية 317", "المنامة، البحرين"),
        country="BH",
        email="accounts@alluluu-trading.example",
        locale="ar-BH",
        taxes=BAHRAINI,
        currency="BHD",
        vat_id="200004421600002",
    ),
    Customer(
        name="مؤسسة النخيل للمقاولات",
        address=("شارع الشيخ عيسى 88", "المحرق، البحرين"),
        country="BH",
        email="finance@alnakheel.example",
        locale="ar-BH",
        taxes=BAHRAINI,
        currency="BHD",
    ),
    Customer(
        name="د. فاطمة الزياني",
        address=("مجمع 428، السيف", "المنامة، البحرين"),
        country="BH",
        email="fatima@alzayani-clinic.example",
        locale="ar-BH",
        taxes=(ZERO,),
        currency="BHD",
    ),
    Customer(
        name="مطبعة الخليج",
        address=("شارع المعارض 12", "الحورة، البحرين"),
        country="BH",
        email="orders@gulf-press.example",
        locale="ar-BH",
        taxes=BAHRAINI,
        currency="BHD",
    ),
    Customer(
        name="Gulf Harbour Services W.L.L.",
        address=("Building 1398, Road 4626", "Manama Sea Front 346"),
        country="BH",
        email="payables@gulf-harbour.example",
        locale="en",
        taxes=(EXPORT,),
        currency="BHD",
        vat_id="200001107200002",
    ),
)
LONG_CUSTOMER = Customer(
    name="Rhein-Neckar Rechenzentrum eG",
    address=("Hafenstraße 25", "68159 Mannheim"),
    country="DE",
    email="kreditoren@rnrz.example",
    locale="de-DE",
    taxes=GERMAN,
    vat_id="DE811907980",
)


def good() -> list[IssueInvoice]:
    """The twenty-seven invoices that are to be issued; the last but one has three hundred lines."""
    dice = random.Random(SEED)  # noqa: S311 - the same invoices each time are the point
    invoices = [_invoice(customer, _lines(customer, dice), number) for number, customer in enumerate(CUSTOMERS)]
    invoices.insert(-1, _invoice(LONG_CUSTOMER, _usage_lines(), len(CUSTOMERS)))
    return invoices


@dataclass(frozen=True, slots=True)
class Mistake:
    """An invoice that must be refused, and where the gateway must point."""

    what: str
    payload: dict[str, Any]
    pointer: str


def bad() -> list[Mistake]:
    """The three invoices that must be refused, each for a reason of its own."""
    right = good()[0].payload()
    currency, price, address = (copy.deepcopy(right) for _ in range(3))
    currency["currency"] = "EURO"
    price["lines"][0]["unit_price"] = 249.0
    del address["buyer"]["email"]
    return [
        Mistake("a currency that does not exist", currency, "/payload/currency"),
        Mistake("a price that is a float", price, "/payload/lines/0/unit_price"),
        Mistake("a buyer without an address to mail to", address, "/payload/buyer/email"),
    ]


def _invoice(customer: Customer, lines: tuple[InvoiceLine, ...], number: int) -> IssueInvoice:
    return IssueInvoice(
        buyer=customer.buyer(),
        currency=customer.currency,
        lines=lines,
        due_days=(14, 30, 0, 60)[number % 4],
        buyer_reference=f"PO-2026-{4100 + 37 * number}" if number % 3 == 0 else None,
    )


def _lines(customer: Customer, dice: random.Random) -> tuple[InvoiceLine, ...]:
    language = customer.locale[:2]
    products = dice.sample(PRODUCTS, dice.randint(1, len(PRODUCTS)))
    return tuple(
        product.line(language, customer.currency, dice.choice(product.quantities), dice.choice(customer.taxes))
        for product in products
    )


def _usage_lines() -> tuple[InvoiceLine, ...]:
    """A month's usage, ten meters a day for thirty days."""
    dice = random.Random(SEED)  # noqa: S311 - as above
    return tuple(
        InvoiceLine(
            description=f"{day:02d}.10.2026, Zähler {meter:02d}: ausgeführte Aufgaben, je tausend",
            quantity=str(Decimal(dice.randint(1, 2_000_000)) / 1000),
            unit_price="0.3875",
            tax=GERMAN[0],
        )
        for day in range(1, 31)
        for meter in range(1, LONG_INVOICE_LINES // 30 + 1)
    )
