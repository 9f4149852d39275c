"""What others deliver from a tar of hostile images with good ones between them. A command of its own.

    /path/to/env/python tests/chaos/peers_hostile.py [--good 200] [--only ours,dataloader…]

The environment is that of the extra `bench`. Each competitor runs in a process of its own over the same eight tars, the first
of which holds what is hostile, and writes keys and embeddings of the same model as Parquet:

`ours`            this program with `run.max_failed: 1`
`ray`             Ray Data as documented: read_webdataset(decoder=None), map with PIL, map_batches, write_parquet
`ray-errors`      the same with `DataContext.max_errored_blocks = -1`, its own way to go on
`ray-try`         the same with `except Exception: return []` around the decoding, in flat_map
`ray-truncated`   that with `PIL.ImageFile.LOAD_TRUNCATED_IMAGES`, the usual advice
`dataloader`      a torch DataLoader over tars as tutorials write it
`dataloader-try`  the same with `except Exception: continue` around the decoding
`dataloader-truncated`  that with `LOAD_TRUNCATED_IMAGES`

Columns: whether the job ended well; how many of the good photographs it delivered; how many of the odd but good images; how
many of the damaged ones it delivered as if nothing were wrong; seconds. The second table has only good photographs, and a
process of the job that decodes or embeds is sent SIGKILL once the first rows are embedded (with `ours`: the first shard).
Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
PEERS = TESTS / "benchmarks" / "peers"
sys.path[:0] = [str(path) for path in (TESTS, TESTS.parent, PEERS) if str(path) not in sys.path]

NAMES = ["ours", "ray", "ray-errors", "ray-try", "ray-truncated", "dataloader", "dataloader-try", "dataloader-truncated"]
KILLED = ["ours", "ray", "dataloader"]
COSTLY = {
    "jpeg-of-many-comments", "jpeg-of-many-exif-segments", "jpeg-of-repeated-scans", "png-profile-bomb", "png-text-bomb",
    "tiff-of-many-channels", "tiff-of-many-strips", "tiff-strips-on-top-of-each-other",
}  # fmt: skip
"""We refuse these for what they would cost, or for how odd they are; their pictures are not wrong."""
LIMIT_S = 300.0
BATCH_SIZE = 16
NUM_TARS = 8
WORKERS = {"ours": "ray::Extractor", "ray": "ray::MapWorker", "dataloader": "pt_data_worker"}
"""How a process is called that decodes or embeds."""


# The competitors, each in a process of its own


def main_of_peer(name: str, tars: Path, out: Path) -> None:
    kind, _, way = name.partition("-")
    {"ours": ours, "ray": ray_data, "dataloader": dataloader}[kind](tars, out, way)


def preset() -> Any:
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

    return Compose([Resize(256), CenterCrop(224), ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])


def model() -> Any:
    """Some work, so that a job lasts for a moment: the same for all."""
    import torch
    from models import tiny

    torch.manual_seed(0)
    torch.set_num_threads(1)
    return tiny().eval()


def picture(data: bytes) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def tolerate(way: str) -> None:
    if way == "truncated":
        from PIL import ImageFile

        ImageFile.LOAD_TRUNCATED_IMAGES = True


def mark(out: Path, count: int) -> None:
    """Note that rows were embedded."""
    with open(f"{out}.stamps", "a") as file:
        file.write(f"{count}\n")


def ours(tars: Path, out: Path, way: str) -> None:
    import ray

    from pipeline import config, driver

    class Watch:
        def started(self, run_id: str) -> None: ...

        def planned(self, plan: Any) -> None:
            pass

        def finished(self, result: Any, num_actors: int) -> None:
            mark(out, 1)

        def note(self, text: str) -> None:
            pass

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    settings = {
        "source": {"url": f"{tars}/*.tar"},
        "backbone": {"model": "python/models:tiny", "weights": "seed:0", "nodes": {"embedding": {"node": "flatten"}}},
        "run": {"max_failed": 1, "batch_size": BATCH_SIZE},
        "output": {"url": str(out)},
    }
    driver.run(config.parse(settings), observer=Watch())


def ray_data(tars: Path, out: Path, way: str) -> None:
    import ray
    import torch

    class Embed:
        def __init__(self) -> None:
            self._model = model()

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            with torch.inference_mode():
                embeddings = self._model(torch.as_tensor(batch["image"])).numpy()
            mark(out, len(embeddings))
            return {"key": batch["key"], "embedding": embeddings}

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        data = next(value for value in row.values() if isinstance(value, bytes))  # the others are columns of other rows
        return {"key": row["__key__"], "image": preset()(picture(data)).numpy()}

    def decode_or_nothing(row: dict[str, Any]) -> list[dict[str, Any]]:
        tolerate(way)
        try:
            return [decode(row)]
        except Exception:
            return []

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if way == "errors":
        context.max_errored_blocks = -1
    dataset = ray.data.read_webdataset(str(tars), decoder=None)
    dataset = dataset.flat_map(decode_or_nothing) if way in ("try", "truncated") else dataset.map(decode)
    actors = ray.data.ActorPoolStrategy(size=2)
    dataset.map_batches(Embed, batch_size=BATCH_SIZE, compute=actors, num_cpus=0.5).write_parquet(str(out))


def dataloader(tars: Path, out: Path, way: str) -> None:
    import tarfile

    import common
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class Tars(IterableDataset[tuple[str, torch.Tensor]]):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            tolerate(way)
            transform, worker = preset(), get_worker_info()
            assert worker is not None
            for path in sorted(tars.glob("*.tar"))[worker.id :: worker.num_workers]:
                with tarfile.open(path) as tar:
                    for member in tar:
                        file = tar.extractfile(member)
                        assert file is not None
                        try:
                            image = transform(picture(file.read()))
                        except Exception:
                            if not way:
                                raise
                            continue
                        yield member.name.rpartition(".")[0], image

    network, keys, embeddings = model(), list[str](), []
    for names, images_BCHW in DataLoader(Tars(), batch_size=BATCH_SIZE, num_workers=2):
        with torch.inference_mode():
            embeddings.append(network(images_BCHW).numpy())
        keys.extend(names)
        mark(out, len(names))
    common.write(out, keys, embeddings)


# What they are given, and what they did with it


def write_tars(folder: Path, num_good: int, *, hostile: bool) -> dict[str, bytes]:
    """Fill a folder; the good photographs by key."""
    from conftest import crops
    from hostile import IMAGES
    from images import tar

    folder.mkdir(parents=True)
    good = {f"good-{number:04}": data for number, data in enumerate(crops(num_good, size=(500, 375)))}
    members = [(f"{name}.jpg", data) for name, data in good.items()]
    size = -(-num_good // NUM_TARS)
    for number in range(NUM_TARS):
        mine = members[number * size : (number + 1) * size]
        if hostile and number == 0:
            odd = [(f"{name}.{image.extension}", image.data) for name, image in IMAGES.items()]
            step = -(-len(odd) // len(mine))
            mine = [each for at, member in enumerate(mine) for each in [*odd[at * step : (at + 1) * step], member]]
        (folder / f"{number}.tar").write_bytes(tar(mine))
    return good


def delivered(name: str, out: Path) -> dict[str, Any]:
    """Embeddings by key, of whatever lies there."""
    import pyarrow.parquet as pq

    if name == "ours":
        import pipeline

        with contextlib.suppress(Exception):
            dataset = pipeline.open_dataset(str(out))
            return dict(zip(dataset.keys(), dataset.to_numpy(), strict=True))
        return {}
    found: dict[str, Any] = {}
    for path in out.rglob("*.parquet"):
        table = pq.read_table(path, columns=["key", "embedding"])
        found |= dict(zip(table.column("key").to_pylist(), table.column("embedding").to_pylist(), strict=True))
    return {key.rpartition("/")[2]: row for key, row in found.items()}


def run_peer(name: str, tars: Path, out: Path, *, kill: bool) -> dict[str, Any]:
    """One job; what it said at its end, and the process that was killed."""
    command = [sys.executable, __file__, "--peer", name, "--tars", str(tars), "--out", str(out)]
    # So that its workers find what this file imports.
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), str(PEERS)])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("RAY_ADDRESS", None)
    start, killed = time.monotonic(), list[str]()
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        striker = threading.Thread(target=strike, args=(name, process, Path(f"{out}.stamps"), killed), daemon=True)
        if kill:
            striker.start()
        try:
            code: int | None = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            end(process)
            code = None
    said = Path(f"{out}.log").read_text(errors="replace").strip().splitlines()
    return {
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        "said": said[-1:] and said[-1][:200],
        "killed": killed,
    }


def strike(name: str, process: subprocess.Popen[bytes], stamps: Path, killed: list[str]) -> None:
    """Once a batch is done, kill one process that decodes: a descendant of this job."""
    import psutil

    job = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            children = job.children(recursive=True)
            if stamps.exists() and stamps.stat().st_size > 0:
                victims = [each for each in children if each.name().startswith(WORKERS[name])]
                if victims:
                    killed.append(victims[0].name())
                    victims[0].kill()
                    return
        time.sleep(0.02)


def end(process: subprocess.Popen[bytes]) -> None:
    """A job and all that it started."""
    import psutil

    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in family:
        with contextlib.suppress(psutil.Error):
            each.kill()


def compare(names: list[str], num_good: int, folder: Path) -> list[dict[str, Any]]:
    from hostile import IMAGES, Refused, Row

    good = write_tars(folder / "hostile", num_good, hostile=True)
    plain = write_tars(folder / "good", num_good, hostile=False)
    odd = {name for name, image in IMAGES.items() if isinstance(image.expected, Row)}
    refusals = {name: image.expected for name, image in IMAGES.items() if isinstance(image.expected, Refused)}
    bad = {name for name, refused in refusals.items() if refused.error in ("Truncated", "Corrupt")} - COSTLY
    results = []
    for name in names:
        out = folder / f"out-{name}"
        result = {"peer": name, "case": "hostile", **run_peer(name, folder / "hostile", out, kill=False)}
        keys = delivered(name, out).keys()
        result |= {
            "good": len(keys & good.keys()), "of_good": len(good), "odd": len(keys & odd), "of_odd": len(odd),
            "bad_as_rows": sorted(keys & bad), "of_bad": len(bad),
        }  # fmt: skip
        results.append(result)
        print(row_of(result), file=sys.stderr, flush=True)
    for name in [each for each in KILLED if each in names]:
        out = folder / f"killed-{name}"
        result = {"peer": name, "case": "killed", **run_peer(name, folder / "good", out, kill=True)}
        result |= {"good": len(delivered(name, out).keys() & plain.keys()), "of_good": len(plain)}
        results.append(result)
        print(row_of(result), file=sys.stderr, flush=True)
    return results


def row_of(result: dict[str, Any]) -> str:
    """A row of Markdown."""
    ended = {0: "well", None: "not at all"}.get(result["exit_code"], "with an error")
    cells = [result["peer"], ended, f"{result['good']} of {result['of_good']}"]
    if result["case"] == "hostile":
        cells += [f"{result['odd']} of {result['of_odd']}", f"{len(result['bad_as_rows'])} of {result['of_bad']}"]
    else:
        cells += [", ".join(result["killed"]) or "nothing"]
    return f"| {' | '.join([*cells, str(result['seconds'])])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--good", type=int, default=200, help="good photographs")
    parser.add_argument("--only", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--peer", help="be this competitor")
    parser.add_argument("--tars", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.peer:
        main_of_peer(arguments.peer, arguments.tars, arguments.out)
        return
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        results = compare(arguments.only.split(","), arguments.good, Path(folder))
    print("| | the job ended | good photographs | odd but good | damaged ones as rows | seconds |\n|---|---|---|---|---|---|")
    print("\n".join(row_of(result) for result in results if result["case"] == "hostile"))
    print("\n| a decoding process killed | the job ended | good photographs | killed | seconds |\n|---|---|---|---|---|")
    print("\n".join(row_of(result) for result in results if result["case"] == "killed"))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
