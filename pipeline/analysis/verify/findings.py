"""What verifying a version brings to light."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.dataset.table import Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    kind: str
    """What differs, in a word, to count by."""
    message: str
    path: str
    """Of the partition, relative to the dataset."""
    shard: str
    key: str | None = None
    """Of the row, or of the first of several."""

    @classmethod
    def of(cls, entry: Entry, kind: str, message: str, key: str | None = None) -> Finding:
        """A finding about a partition that the log names."""
        return cls(kind=kind, message=message, path=entry.path, shard=entry.shard, key=key)

    def __str__(self) -> str:
        row = f" key {self.key!r}" if self.key is not None else ""
        return f"{self.path} ({self.shard}){row}: {self.message}"

    def as_json(self) -> dict[str, Any]:
        """A mapping of plain values."""
        return {name: getattr(self, name) for name in ("kind", "path", "shard", "key", "message")}


@dataclass(slots=True, kw_only=True)
class Report:
    """What was looked at and what is wrong."""

    version: int
    num_partitions: int
    num_rows: int
    """As the log says."""
    num_bytes: int
    """Of the partitions, as the log says."""
    deep: bool
    """Whether all columns were read."""
    tolerance: float
    """Share of a row's largest value by which it may differ from what its image gives now."""
    num_sampled: int = 0
    num_compared: int = 0
    """Rows whose image was embedded again."""
    max_difference: float = 0.0
    """Of the rows that agree, as a share of their largest value."""
    findings: list[Finding] = field(default_factory=list)
    unavailable: list[Finding] = field(default_factory=list)
    """Sampled rows whose image the source no longer has, or cannot give by itself: not the dataset's fault."""
    seconds: float = 0.0

    @property
    def num_damaged(self) -> int:
        """Partitions with a finding."""
        return len({finding.path for finding in self.findings})

    @property
    def verdict(self) -> str:
        """What is wrong in a sentence; empty when nothing is."""
        if self.findings:
            return f"{self.num_damaged:,} of {self.num_partitions:,} partitions are not what they should be"
        if self.num_sampled and not self.num_compared:
            first = self.unavailable[0].message
            return f"none of the {self.num_sampled:,} sampled rows could be compared with its image, the first because {first}"
        return ""

    def as_json(self) -> dict[str, Any]:
        """A mapping of plain values."""
        return {
            "version": self.version,
            "ok": not self.verdict,
            "partitions": {"total": self.num_partitions, "damaged": self.num_damaged},
            "rows": {
                "total": self.num_rows,
                "sampled": self.num_sampled,
                "compared": self.num_compared,
                "unavailable": len(self.unavailable),
            },
            "bytes": self.num_bytes,
            "deep": self.deep,
            "tolerance": self.tolerance,
            "max_difference": self.max_difference,
            "findings": [finding.as_json() for finding in self.findings],
            "unavailable": [finding.as_json() for finding in self.unavailable],
            "seconds": round(self.seconds, 3),
        }
