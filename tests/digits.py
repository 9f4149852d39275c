"""A small embedded dataset of digits with labels, groups and parts, for what reads one."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import settings, tar_bytes
from images import encode
from PIL import Image
from sklearn.datasets import load_digits

from pipeline import driver

NUM_PICTURES, NUM_COPIES = 240, 20


def embed(folder: Path) -> str:
    """URL of a dataset below `folder`: 240 digits in nodes of 32 and 64 values, and the first 20 again under other keys.

    `label` is the digit; `patient` has ten consecutive pictures, but null for the last 40; `part` is test for each fourth
    row and for the copies, else train.
    """
    digits = load_digits()
    members: dict[str, bytes] = {}
    for row in range(NUM_PICTURES + NUM_COPIES):
        number = row % NUM_PICTURES
        picture = Image.fromarray((digits.images[number] * (255 / 16)).round().astype("uint8")).resize((32, 32))
        patient = f"patient {row // 10}" if row < NUM_PICTURES - 40 else None
        part = "test" if row % 4 == 0 or row >= NUM_PICTURES else "train"
        members[f"{row:05d}.png"] = encode(picture, "PNG")
        members[f"{row:05d}.cls"] = str(digits.target[number]).encode()
        members[f"{row:05d}.json"] = json.dumps({"patient": patient, "part": part}).encode()
    names = list(members)
    for shard in range(2):  # the copies lie in the second
        some = names[: 3 * 200] if shard == 0 else names[3 * 200 :]
        Path(folder, f"{shard}.tar").write_bytes(tar_bytes({name: members[name] for name in some}))
    nodes = {
        "small": {"node": "features.0", "pool": "mean"},
        "large": {"node": "features.2", "pool": "mean", "normalize": "l2"},
    }
    wanted = settings(
        f"{folder}/*.tar",
        folder / "out",
        source__columns=["json.patient", "json.part"],
        backbone={
            "model": "python/models:two_layers",
            "weights": "seed:0",
            "nodes": nodes,
            "preprocess": {"resize": 32, "crop": 32},
        },
    )
    driver.run(wanted)
    return str(folder / "out")
