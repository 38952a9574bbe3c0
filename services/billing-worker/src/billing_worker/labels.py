"""The words on a document, by language. A language that is not here reads English."""

# ruff: noqa: RUF001 - Greek letters are meant where they stand

from __future__ import annotations

from dataclasses import dataclass

from taskmesh.contracts.billing import TaxCategory


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The words of one language; texts in braces are filled in."""

    invoice: str
    bill_to: str
    number: str
    issued: str
    due: str
    supplied: str
    reference: str
    vat_id: str
    description: str
    quantity: str
    unit_price: str
    vat: str
    amount: str
    net_total: str
    vat_on: str
    """{rate}, {taxable}"""
    total: str
    payment: str
    pay: str
    """{total}, {due}, {number}"""
    nothing_due: str
    iban: str
    contact: str
    page: str
    """{page}, {pages}"""
    untaxed: dict[TaxCategory, str]
    """What stands in for a rate, for each category without tax."""


def for_language(language: str) -> Labels | None:
    """The words of an ISO 639-1 language, or None."""
    return _BY_LANGUAGE.get(language)


ENGLISH = Labels(
    invoice="Invoice",
    bill_to="Bill to",
    number="Invoice number",
    issued="Date of issue",
    due="Due date",
    supplied="Date of supply",
    reference="Your reference",
    vat_id="VAT ID",
    description="Description",
    quantity="Quantity",
    unit_price="Unit price",
    vat="VAT",
    amount="Amount",
    net_total="Subtotal",
    vat_on="VAT {rate} on {taxable}",
    total="Total due",
    payment="Payment",
    pay="Please pay {total} by {due}, quoting {number}.",
    nothing_due="Nothing is due on this invoice.",
    iban="IBAN",
    contact="Questions",
    page="Page {page} of {pages}",
    untaxed={
        TaxCategory.ZERO: "Zero rated",
        TaxCategory.EXEMPT: "Exempt",
        TaxCategory.REVERSE_CHARGE: "Reverse charge",
        TaxCategory.INTRA_COMMUNITY: "Intra-Community supply",
        TaxCategory.EXPORT: "Export",
        TaxCategory.OUT_OF_SCOPE: "Outside the scope of VAT",
    },
)

_GERMAN = Labels(
    invoice="Rechnung",
    bill_to="Rechnung an",
    number="Rechnungsnummer",
    issued="Rechnungsdatum",
    due="Fällig am",
    supplied="Leistungsdatum",
    reference="Ihre Referenz",
    vat_id="USt-IdNr.",
    description="Beschreibung",
    quantity="Menge",
    unit_price="Einzelpreis",
    vat="USt.",
    amount="Betrag",
    net_total="Zwischensumme",
    vat_on="{rate} USt. auf {taxable}",
    total="Gesamtbetrag",
    payment="Zahlung",
    pay="Bitte überweisen Sie {total} bis zum {due} unter Angabe von {number}.",
    nothing_due="Auf diese Rechnung ist nichts zu zahlen.",
    iban="IBAN",
    contact="Fragen",
    page="Seite {page} von {pages}",
    untaxed={
        TaxCategory.ZERO: "Nullsatz",
        TaxCategory.EXEMPT: "Steuerfrei",
        TaxCategory.REVERSE_CHARGE: "Steuerschuldnerschaft des Leistungsempfängers",
        TaxCategory.INTRA_COMMUNITY: "Steuerfreie innergemeinschaftliche Lieferung",
        TaxCategory.EXPORT: "Steuerfreie Ausfuhrlieferung",
        TaxCategory.OUT_OF_SCOPE: "Nicht steuerbar",
    },
)

_FRENCH = Labels(
    invoice="Facture",
    bill_to="Facturé à",
    number="Numéro de facture",
    issued="Date d’émission",
    due="Échéance",
    supplied="Date de livraison",
    reference="Votre référence",
    vat_id="N° TVA",
    description="Désignation",
    quantity="Quantité",
    unit_price="Prix unitaire",
    vat="TVA",
    amount="Montant",
    net_total="Total HT",
    vat_on="TVA {rate} sur {taxable}",
    total="Total TTC",
    payment="Règlement",
    pay="Merci de régler {total} avant le {due} en rappelant le numéro {number}.",
    nothing_due="Aucun montant n’est dû au titre de cette facture.",
    iban="IBAN",
    contact="Contact",
    page="Page {page} sur {pages}",
    untaxed={
        TaxCategory.ZERO: "Taux zéro",
        TaxCategory.EXEMPT: "Exonéré",
        TaxCategory.REVERSE_CHARGE: "Autoliquidation",
        TaxCategory.INTRA_COMMUNITY: "Livraison intracommunautaire exonérée",
        TaxCategory.EXPORT: "Exportation exonérée",
        TaxCategory.OUT_OF_SCOPE: "Hors champ de la TVA",
    },
)

_GREEK = Labels(
    invoice="Τιμολόγιο",
    bill_to="Στοιχεία πελάτη",
    number="Αριθμός τιμολογίου",
    issued="Ημερομηνία έκδοσης",
    due="Ημερομηνία λήξης",
    supplied="Ημερομηνία παράδοσης",
    reference="Αναφορά πελάτη",
    vat_id="ΑΦΜ",
    description="Περιγραφή",
    quantity="Ποσότητα",
    unit_price="Τιμή μονάδας",
    vat="ΦΠΑ",
    amount="Ποσό",
    net_total="Καθαρή αξία",
    vat_on="ΦΠΑ {rate} επί {taxable}",
    total="Πληρωτέο ποσό",
    payment="Πληρωμή",
    pay="Παρακαλούμε εξοφλήστε {total} έως {due}, αναφέροντας τον αριθμό {number}.",
    nothing_due="Δεν οφείλεται ποσό για αυτό το τιμολόγιο.",
    iban="IBAN",
    contact="Επικοινωνία",
    page="Σελίδα {page} από {pages}",
    untaxed={
        TaxCategory.ZERO: "Μηδενικός συντελεστής",
        TaxCategory.EXEMPT: "Απαλλάσσεται",
        TaxCategory.REVERSE_CHARGE: "Αντίστροφη επιβάρυνση",
        TaxCategory.INTRA_COMMUNITY: "Ενδοκοινοτική παράδοση",
        TaxCategory.EXPORT: "Εξαγωγή",
        TaxCategory.OUT_OF_SCOPE: "Εκτός πεδίου ΦΠΑ",
    },
)

_JAPANESE = Labels(
    invoice="請求書",
    bill_to="請求先",
    number="請求書番号",
    issued="発行日",
    due="お支払期限",
    supplied="納品日",
    reference="貴社参照番号",
    vat_id="登録番号",
    description="品目",
    quantity="数量",
    unit_price="単価",
    vat="税率",
    amount="金額",
    net_total="小計",
    vat_on="消費税 {rate}(対象額 {taxable})",
    total="ご請求金額",
    payment="お支払いについて",
    pay="{due}までに{total}をお支払いください。お振込の際は番号 {number} をご記入ください。",
    nothing_due="この請求書のお支払いは不要です。",
    iban="IBAN",
    contact="お問い合わせ",
    page="{page} / {pages} ページ",
    untaxed={
        TaxCategory.ZERO: "税率ゼロ",
        TaxCategory.EXEMPT: "非課税",
        TaxCategory.REVERSE_CHARGE: "リバースチャージ",
        TaxCategory.INTRA_COMMUNITY: "EU域内取引",
        TaxCategory.EXPORT: "輸出免税",
        TaxCategory.OUT_OF_SCOPE: "不課税",
    },
)

_ARABIC = Labels(
    invoice="فاتورة",
    bill_to="فاتورة إلى",
    number="رقم الفاتورة",
    issued="تاريخ الإصدار",
    due="تاريخ الاستحقاق",
    supplied="تاريخ التوريد",
    reference="مرجعكم",
    vat_id="الرقم الضريبي",
    description="الوصف",
    quantity="الكمية",
    unit_price="سعر الوحدة",
    vat="الضريبة",
    amount="المبلغ",
    net_total="المجموع الفرعي",
    vat_on="ضريبة القيمة المضافة {rate} على {taxable}",
    total="المبلغ المستحق",
    payment="الدفع",
    pay="يرجى دفع {total} قبل {due} مع ذكر الرقم {number}.",
    nothing_due="لا يوجد مبلغ مستحق على هذه الفاتورة.",
    iban="IBAN",
    contact="للاستفسار",
    page="صفحة {page} من {pages}",
    untaxed={
        TaxCategory.ZERO: "نسبة الصفر",
        TaxCategory.EXEMPT: "معفى",
        TaxCategory.REVERSE_CHARGE: "احتساب عكسي",
        TaxCategory.INTRA_COMMUNITY: "توريد داخل الاتحاد الأوروبي",
        TaxCategory.EXPORT: "تصدير",
        TaxCategory.OUT_OF_SCOPE: "خارج نطاق الضريبة",
    },
)

_BY_LANGUAGE = {
    "ar": _ARABIC,
    "de": _GERMAN,
    "el": _GREEK,
    "en": ENGLISH,
    "fr": _FRENCH,
    "ja": _JAPANESE,
}
