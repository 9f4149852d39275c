"""Everything that this package raises on purpose.

PipelineError
├── UserError            what the user got wrong: exit code 2, one line, never a traceback
│   ├── ConfigError        a field of the config: names field, value and what is allowed
│   ├── SourceError        the source is not there, is empty, or is not of the named format
│   ├── BackboneError      no such model, weights or node
│   ├── DatasetError       no dataset there, or one that this version cannot read
│   │   └── SourceChanged    the image that a row was made from is no longer there
│   └── ClusterError       no Ray cluster there, or one that does not take the job
├── WorldError           what the world did: exit code 1
│   ├── StorageError       the store refused or failed, after the retries that made sense
│   │   └── StorageRefused   it answered, and the answer is no: exit code 2
│   │       └── NotFound       nothing lies there
│   ├── ShardError         one shard cannot be read: names the shard; the others go on
│   └── ShardChanged       a shard is no longer what was listed: it is listed again
├── RunError             the run's own verdict: exit code 1
│   ├── BudgetExceeded     more samples were quarantined than the config allows: nothing was committed
│   ├── RemovalRefused     more of the dataset would vanish than the config allows: nothing was committed
│   ├── IncompleteRun      shards failed: says which
│   ├── VerifyFailed       a dataset is not what its log and its source say
│   └── CommitConflict     another run committed first
├── GuardError           what we or the model did: a promise was about to be broken (exit code 1)
└── SampleError          one sample: never leaves the process, becomes a quarantine row
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

MAX_NAMES = 1000
"""Of a folder, to look for one that was meant."""


class PipelineError(Exception):
    """Base of all errors here. The message is one complete sentence for the user."""

    exit_code = 1


class UserError(PipelineError):
    """The user's input is wrong."""

    exit_code = 2


class ConfigError(UserError):
    """A config field has a wrong value; the message names field, value and what is allowed."""


class SourceError(UserError):
    """The source does not exist, holds nothing, or is not of the format that was named."""


class BackboneError(UserError):
    """The model, its weights or one of its nodes cannot be had."""


class DatasetError(UserError):
    """There is no dataset at this place, or its format is newer than this program."""


class SourceChanged(DatasetError):
    """The source has other bytes where the image of a row was."""


class ClusterError(UserError):
    """There is no Ray cluster at this address, or it does not take the job."""


class WorldError(PipelineError):
    """Something outside this program failed."""


class StorageError(WorldError):
    """The store failed, and kept failing. Never holds a secret."""


class StorageRefused(StorageError):
    """The store answered, and the answer is no: missing, forbidden, not possible. For the user to mend."""

    exit_code = 2


class NotFound(StorageRefused):
    """Nothing lies there.

    Args:
        message: as of every error.
        url: where nothing lies.
    """

    def __init__(self, message: str, url: str = "") -> None:
        super().__init__(message)
        self.url = url


class ShardError(WorldError):
    """A shard that cannot be read; the message names it."""


class ShardChanged(WorldError):
    """A shard that was written anew since it was listed."""


class RunError(PipelineError):
    """The run did not do all it was asked to."""


class BudgetExceeded(RunError):
    """More samples were quarantined than `run.max_failed` allows."""


class RemovalRefused(RunError):
    """More rows would vanish than `run.max_removed` allows."""


class IncompleteRun(RunError):
    """Some shards could not be extracted."""


class VerifyFailed(RunError):
    """Partitions or rows of a dataset are not what they should be."""


class CommitConflict(RunError):
    """The table moved on between plan and commit."""


class GuardError(PipelineError):
    """A promise would have been broken: a model that learns, a row that depends on its neighbours, counts that differ."""


class SampleError(PipelineError):
    """One sample cannot be embedded.

    Args:
        stage: where it failed: `read`, `label`, `decode` or `embed`.
        error: a short stable name of the kind of failure, to count by.
        message: what is wrong, for a person.
    """

    def __init__(self, stage: str, error: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage
        self.error = error
        self.message = message

    @classmethod
    def of(cls, error: Exception) -> SampleError:
        """What a decoder raised, as the refusal of its picture: whatever it was, it may not end the loop."""
        return error if isinstance(error, cls) else cls("decode", type(error).__name__, f"cannot be decoded: {error}")


def nearest(name: str, names: Iterable[str], count: int = 5, cutoff: float = 0.4) -> str:
    """`did you mean a, b, c?` for a name that does not exist; empty when nothing is near."""
    found = difflib.get_close_matches(name, list(names), n=count, cutoff=cutoff)
    return f"did you mean {', '.join(found)}?" if found else ""


def nearby(url: str) -> str:
    """Where a path to nothing leaves what is there: `/data has no 'shard'; did you mean shards?`. Empty where nobody can tell.

    Only local folders are looked into, and only the first names of a large one. It is for one line to a person, once.
    """
    if slip := re.match(r"(s3|gs|gcs|abfs|az|http|https|file|hdfs):/?(?!/)", url):
        return f"did you mean {slip[1]}://{url[slip.end() :]}?"
    if "://" in url.removeprefix("file://"):
        return ""
    there = Path("/")
    for part in Path(os.path.abspath(url.removeprefix("file://"))).parts[1:]:
        if not there.is_dir():
            return f"{there} is a file, not a folder"
        if glob.has_magic(part) and not (there / part).exists():
            return f"nothing in {there} matches {part!r}"
        if not (there / part).exists():
            with contextlib.suppress(OSError), os.scandir(there) as entries:
                hint = nearest(part, (entry.name for entry in itertools.islice(entries, MAX_NAMES)), 3, 0.6)
                return f"{there} has no {part!r}" + (f"; {hint}" if hint else "")
            return ""
        there /= part
    return ""


def printable(text: str) -> str:
    """Text that may hold names from data, for a terminal or a log: what would steer it or turn a line round is spelled out."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in text)
