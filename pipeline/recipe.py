"""What a row depends on: the recipe of its embedding and the layout of its other columns.

Two digests decide what a refresh has to do: another `recipe_id` means another embedding for every sample, another
`layout_id` means the same embeddings in rows of another shape. Both dictionaries travel whole with the dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT_VERSION = 1
"""Of the dataset on storage. A reader refuses a newer one."""

TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 5e-2, "float16": 5e-3}
"""By precision: two embeddings of one picture are equal when they differ by at most this share of the largest value. Programs
and devices round differently, and only float32 in its last digits; the others allow more than a step of what is stored."""


def digest(*parts: str) -> str:
    """32 hex digits (128 bits of SHA-256) over text parts; `("a", "b")` and `("ab",)` differ."""
    payload = b"".join(len(raw).to_bytes(8, "big") + raw for raw in (part.encode("utf-8", "surrogateescape") for part in parts))
    return hashlib.sha256(payload).hexdigest()[:32]


def canonical(fields: Mapping[str, Any]) -> str:
    """JSON in which equal mappings have equal text."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that determines an embedding besides the pixels."""

    fields: Mapping[str, Any]
    """Model, weights digest, nodes with pooling and normalisation, preprocessing with its decode version, precision."""
    widths: Mapping[str, int]
    """Column to number of float32 values. Follows from `fields`; not part of the digest."""
    recipe_id: str = field(init=False)
    """16 hex digits."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe_id", digest(canonical(self.fields))[:16])

    @property
    def rounded(self) -> bool:
        """Whether stored values are rounded to what float16 can hold."""
        return self.fields["precision"] in {"bfloat16", "float16"}

    @property
    def tolerance(self) -> float:
        """How far two embeddings of one picture may be apart, as a share of the largest value; see `TOLERANCE`."""
        return TOLERANCE[self.fields["precision"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a row holds besides embeddings: where key, label and carried columns come from, and the format version."""

    fields: Mapping[str, Any]
    layout_id: str = field(init=False)
    """16 hex digits."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout_id", digest(canonical(self.fields))[:16])


def of_column(fields: Mapping[str, Any], column: str) -> dict[str, Any]:
    """The part of a recipe that one embedding column depends on, whatever it is called and wherever the weights lie."""
    others = {name: value for name, value in fields.items() if name not in {"nodes", "weights"}}
    return {**others, "node": fields["nodes"][column]}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """The fields in which two recipes or layouts differ, one `field: old -> new` each."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{path}{name}.")
        elif before != after:
            found.append(f"{path}{name}: {_shown(before)} -> {_shown(after)}")
    return found


def _shown(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
