"""What is drawn from a seed: the shards that a run finds, what is killed, which requests fail, and when.

The moments are numbers of requests, counted by the proxy, or seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import faults
from conftest import noise, shard_members
from faults import Action, Request

KINDS = ("actor", "node", "store", "faults", "driver", "refresh", "multipart", "mixed")
"""A seed's kind is its number modulo eight."""
NUM_SHARDS, PER_SHARD = 12, 10
NUM_LARGE = 450
"""Images whose embeddings, with a model that makes large ones, need a multipart upload: more than 64 MiB."""
NUM_CALM_REQUESTS, NUM_CALM_DATA_REQUESTS = 66, 48
"""What an undisturbed run of the twelve shards makes, and those for shards and partitions: each shard is read, its partition
written, asked for and its footer read."""
CALM_S = 5.0
"""How long it takes, about."""

COUNTED: dict[str, Callable[[Request], bool]] = {
    "any": lambda request: True,
    "data": lambda request: request.path.endswith((".tar", ".parquet")),
    "parts": lambda request: "uploads" in request.query or "uploadId=" in request.query,
}
"""Which requests a moment counts: all, those for shards and partitions, those of multipart uploads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """One kill."""

    victim: str
    """`actor`, `node`, `store` or `driver`."""
    at_request: int | None = None
    """Number of the request, among those that are counted, at which it strikes; or at a later one, where it finds no victim."""
    counted: str = "any"
    at_s: float = 0.0
    """Seconds after the start of the run, where there is no request."""
    number: int = 1
    """Of nodes."""
    down_s: float = 0.0
    """How long the store is down, or until new nodes join."""

    def __str__(self) -> str:
        counted = "request" if self.counted == "any" else f"{self.counted} request"
        when = f"{counted} {self.at_request}" if self.at_request is not None else f"{self.at_s:.1f} s"
        what = f"{self.number} nodes" if self.number > 1 else self.victim
        return f"{what} at {when}" + (f", back after {self.down_s:.1f} s" if self.down_s else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of failing requests."""

    name: str
    """`drop`, `delay`, `truncate`, `503`, `403`, `slow` or `swallow`."""
    probability: float = 1.0
    times: int | None = None
    value: float = 0.0
    """Seconds, bytes, or bytes a second."""
    after: int = 0
    """So many requests are spared."""
    counted: str = "any"
    only: str = ""
    """Text that the path has to have."""

    def applies(self, request: Request) -> bool:
        """Whether it counts a request."""
        return COUNTED[self.counted](request) and self.only in request.path

    @property
    def action(self) -> Action:
        """What the proxy does."""
        makers: dict[str, Callable[[], Action]] = {
            "drop": lambda: faults.drop,
            "delay": lambda: faults.delay(self.value),
            "truncate": lambda: faults.truncate(int(self.value)),
            "503": lambda: faults.status(503),
            "403": lambda: faults.status(403, "AccessDenied"),
            "slow": lambda: faults.slow(self.value),
            "swallow": lambda: faults.swallow,
        }
        return makers[self.name]()

    def __str__(self) -> str:
        often = f"{self.times} times" if self.times is not None else f"p = {self.probability:.2f}"
        where = f" of {self.only}" if self.only else ""
        return f"{self.name}{where} {often}" + (f" ({self.value:.3g})" if self.value else "") + f" after {self.after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """All that a seed decides."""

    seed: int
    kind: str
    strikes: tuple[Strike, ...] = ()
    faults: tuple[Fault, ...] = ()
    before: dict[str, int] = field(default_factory=dict)
    """Shards, by name, and their variants in the version before; none where there is none before."""
    after: dict[str, int] = field(default_factory=dict)
    """The same of the source that the run finds."""
    is_large: bool = False
    """Whether one shard's partition is a multipart upload."""

    def __str__(self) -> str:
        names = {name for name, _ in set(self.before.items()) ^ set(self.after.items())}
        changed = f"{len(names)} shards changed" if self.before else ""
        return "; ".join(filter(None, [changed, *map(str, self.strikes), *map(str, self.faults)]))


def drawn(seed: int, kind: str | None = None) -> Scenario:
    """The scenario of a seed."""
    kind = kind or KINDS[seed % len(KINDS)]
    draw = random.Random(f"{seed} {kind}")
    kinds = draw.sample(("actor", "node", "store", "faults", "driver"), draw.choice((2, 2, 3))) if kind == "mixed" else [kind]
    names = [f"{number:03d}" for number in range(NUM_SHARDS)]
    before, after = dict[str, int](), dict.fromkeys(names, 0)
    if kind == "refresh" or (kind == "mixed" and draw.random() < 0.3):
        before, after = after, _changed(draw, after)
    if kind == "multipart":
        after = {"000": 0, "001": 0, "002": 0, "large": 0}
    to_do = sorted(name for name, variant in after.items() if before.get(name) != variant)
    strikes, failing = list[Strike](), list[Fault]()
    for each in kinds:
        if each in ("faults", "refresh"):
            failing += [_fault(draw, to_do) for _ in range(draw.choice((1, 1, 2, 3)))]
        elif each == "multipart":
            # A kill between two requests of the upload, or one of them fails.
            if draw.random() < 0.6:
                victim = draw.choice(("actor", "driver", "store"))
                down_s = draw.uniform(0.2, 1.0) if victim == "store" else 0.0
                strikes.append(Strike(victim=victim, at_request=draw.randint(1, 4), counted="parts", down_s=down_s))
            else:
                name = draw.choice(("drop", "503", "swallow", "truncate"))
                failing.append(Fault(name=name, times=draw.randint(1, 2), after=draw.randint(0, 3), counted="parts"))
        else:
            # A driver that is killed is started again under the same chaos, and may be killed again.
            strikes += [_strike(draw, each) for _ in range(draw.choice((1, 1, 2) if each != "node" else (1,)))]
    if kind == "refresh" and draw.random() < 0.5:
        strikes.append(_strike(draw, draw.choice(("actor", "driver"))))
    return Scenario(
        seed=seed,
        kind=kind,
        strikes=tuple(strikes),
        faults=tuple(failing),
        before=before,
        after=after,
        is_large=kind == "multipart",
    )


def _changed(draw: random.Random, shards: dict[str, int]) -> dict[str, int]:
    """Three to five shards written anew, one gone, one or two new ones."""
    names = draw.sample(sorted(shards), draw.randint(4, 6))
    changed = {**shards, **dict.fromkeys(names, 1)}
    del changed[names[0]]
    return changed | {f"{NUM_SHARDS + number:03d}": 0 for number in range(draw.randint(1, 2))}


def _strike(draw: random.Random, victim: str) -> Strike:
    down_s = {"store": draw.uniform(0.2, 2.0), "node": draw.uniform(0.5, 3.0)}.get(victim, 0.0)
    number = draw.choice((1, 2)) if victim == "node" else 1
    if draw.random() < 0.25:
        return Strike(victim=victim, at_s=draw.uniform(0.2, CALM_S), down_s=down_s, number=number)
    if victim in ("actor", "node"):
        # While shards are read and partitions are written: after that there is no actor any more.
        last = NUM_CALM_DATA_REQUESTS // 2
        return Strike(victim=victim, at_request=draw.randint(2, last), counted="data", down_s=down_s, number=number)
    if draw.random() < 0.5:
        return Strike(victim=victim, at_request=draw.randint(1, NUM_CALM_DATA_REQUESTS), counted="data", down_s=down_s)
    return Strike(victim=victim, at_request=draw.randint(1, NUM_CALM_REQUESTS), down_s=down_s, number=number)


def _fault(draw: random.Random, shards: list[str]) -> Fault:
    name = draw.choice(("drop", "delay", "truncate", "503", "403", "slow", "swallow"))
    if name == "403":
        # One shard that may not be read: tried no second time, so the others are committed without it.
        return Fault(name=name, only=f"/{draw.choice(shards)}.tar")
    value = {
        "delay": draw.uniform(0.05, 0.5),
        "truncate": draw.choice((0, draw.uniform(1, 3000))),
        "slow": 10 ** draw.uniform(3.5, 5),
    }.get(name, 0.0)
    most = {"delay": 0.4, "slow": 0.3, "503": 0.2}.get(name, 0.12)
    after = draw.randint(0, NUM_CALM_REQUESTS)
    if name not in ("delay", "slow") and draw.random() < 0.4:
        return Fault(name=name, times=draw.randint(1, 4), value=value, after=after)
    return Fault(name=name, probability=draw.uniform(0.02, most), value=value, after=draw.choice((0, after)))


# The shards


def members(name: str, variant: int) -> dict[str, bytes]:
    """One shard, as it is at first (0) or later (1): three new pictures, one sample less, one label changed."""
    if name == "large":
        return shard_members(noise(NUM_LARGE, seed=99), 10_000)
    number = int(name)
    images = noise(PER_SHARD, seed=number)
    if variant:
        images = [*noise(3, seed=100 + number), *images[3:-1]]
    if number in BAD:
        images[4] = BAD[number](images[4])
    found = shard_members(images, number * PER_SHARD)
    if variant:
        found[f"{number * PER_SHARD + 6:05d}.cls"] = b"7"
    if number == 9:
        found[f"{number * PER_SHARD + 2:05d}.cls"] = b"a dog"
    return found


BAD: dict[int, Callable[[bytes], bytes]] = {
    2: lambda image: b"",
    5: lambda image: b"<html>not found</html>",
    7: lambda image: image[: len(image) // 2],
}
"""Shards with a bad image, and what became of it."""
