# ruff: noqa: RUF001 - Greek letters look like Latin ones, and Japanese has its own punctuation

"""What the invoice mail says, language by language.

A language is one `Phrases`: a phrase that is missing is a type error. `{...}` are filled in by the templates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrases:
    """One language; addressed formally, and without guessing anybody's gender."""

    language: str
    direction: Literal["ltr", "rtl"] = "ltr"
    subject: str
    heading: str
    preview: str
    greeting: str
    introduction: str
    number: str
    amount: str
    due: str
    attachment: str
    closing: str
    automatic: str
    pair: str = "{label}: {value}"


ENGLISH = Phrases(
    language="en",
    subject="Invoice {number} from {sender}",
    heading="Your invoice",
    preview="{amount}, due on {due_on}",
    greeting="Hello {name},",
    introduction="Thank you for your business. Your invoice is attached to this message as a PDF file.",
    number="Invoice number",
    amount="Amount",
    due="Due on",
    attachment="Attachment",
    closing="Kind regards",
    automatic="This message was sent automatically.",
)

GERMAN = Phrases(
    language="de",
    subject="Rechnung {number} von {sender}",
    heading="Ihre Rechnung",
    preview="{amount}, zahlbar bis {due_on}",
    greeting="Guten Tag {name},",
    introduction="vielen Dank für Ihren Auftrag. Ihre Rechnung finden Sie als PDF-Datei im Anhang.",
    number="Rechnungsnummer",
    amount="Betrag",
    due="Zahlbar bis",
    attachment="Anhang",
    closing="Mit freundlichen Grüßen",
    automatic="Diese Nachricht wurde automatisch versandt.",
)

FRENCH = Phrases(
    language="fr",
    subject="Facture {number} de {sender}",
    heading="Votre facture",
    preview="{amount}, à payer au plus tard le {due_on}",
    greeting="Bonjour {name},",
    introduction="Merci de votre confiance. Vous trouverez votre facture en pièce jointe, au format PDF.",
    number="Numéro de facture",
    amount="Montant",
    due="À payer au plus tard le",
    attachment="Pièce jointe",
    closing="Cordialement",
    automatic="Ce message a été envoyé automatiquement.",
    pair="{label}\N{NO-BREAK SPACE}: {value}",
)

GREEK = Phrases(
    language="el",
    subject="Τιμολόγιο {number} από {sender}",
    heading="Το τιμολόγιό σας",
    preview="{amount}, πληρωτέο έως {due_on}",
    greeting="Γεια σας {name},",
    introduction="Σας ευχαριστούμε για τη συνεργασία. Το τιμολόγιό σας επισυνάπτεται ως αρχείο PDF.",
    number="Αριθμός τιμολογίου",
    amount="Ποσό",
    due="Πληρωτέο έως",
    attachment="Συνημμένο",
    closing="Με εκτίμηση",
    automatic="Το μήνυμα αυτό στάλθηκε αυτόματα.",
)

JAPANESE = Phrases(
    language="ja",
    subject="【{sender}】請求書 {number} のご案内",
    heading="請求書のご案内",
    preview="{amount} お支払期限 {due_on}",
    greeting="{name} 様",
    introduction="平素よりお世話になっております。請求書をPDFファイルにて添付いたしましたので、ご確認ください。",
    number="請求書番号",
    amount="ご請求金額",
    due="お支払期限",
    attachment="添付ファイル",
    closing="よろしくお願いいたします。",
    automatic="このメールは自動送信されています。",
    pair="{label}：{value}",
)

ARABIC = Phrases(
    language="ar",
    direction="rtl",
    subject="الفاتورة {number} من {sender}",
    heading="فاتورتكم",
    preview="{amount}، تاريخ الاستحقاق {due_on}",
    greeting="مرحبًا {name}،",
    introduction="شكرًا لتعاملكم معنا. تجدون فاتورتكم مرفقة بهذه الرسالة بصيغة PDF.",
    number="رقم الفاتورة",
    amount="المبلغ",
    due="تاريخ الاستحقاق",
    attachment="المرفق",
    closing="مع أطيب التحيات",
    automatic="أُرسلت هذه الرسالة تلقائيًا.",
)

PHRASES = {phrases.language: phrases for phrases in (ENGLISH, GERMAN, FRENCH, GREEK, JAPANESE, ARABIC)}


def phrases_for(locale: str) -> Phrases:
    """The phrases for a locale such as `de-AT`; English when its language has none."""
    return PHRASES.get(locale.partition("-")[0], ENGLISH)
