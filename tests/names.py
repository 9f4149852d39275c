"""Names and labels that mean no good, and how a page or a terminal shows those that it spells out."""

from __future__ import annotations

NAMES = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "abc\u202egnp.exe", "a'b\"c&amp;{{7*7}}",
    "</style>{% raw %}", "\u2066\u05e9\u05dc\u05d5\u05dd\u202e", "plain\x00\x1b[31mred", "javascript:alert(1)",
]  # fmt: skip
SHOWN = {
    NAMES[2]: r"abc\u202egnp.exe",
    NAMES[5]: "\\u2066\u05e9\u05dc\u05d5\u05dd\\u202e",
    NAMES[6]: r"plain\x00\x1b[31mred",
}
