"""What a user sees when the store says no, and what must never be seen: a secret."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from bucket import Bucket
from commands import cli, last_line
from conftest import noise
from s3 import S3Server


@pytest.fixture
def bucket(s3: S3Server) -> Bucket:
    bucket = Bucket(s3)
    bucket.fill(noise(20), 10)
    return bucket


def written(folder: Path, bucket: Bucket, **changes: object) -> Path:
    """A config file whose store settings come from the environment."""
    raw = bucket.config(source__storage={}, output__storage={}, **changes).model_dump(mode="json")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def objects(bucket: Bucket) -> list[str]:
    return sorted(path for path in bucket.fs.find(bucket.name) if "/out/" in path)


def test_mistakes_with_the_store_are_one_line(s3: S3Server, bucket: Bucket, tmp_path: Path) -> None:
    good = s3.env()
    missing = {"source__url": "s3://no-such-bucket-here/*.tar"}
    cases = [
        ("wrong secret", {}, {**good, "AWS_SECRET_ACCESS_KEY": "wrong-secret"}, 2, bucket.name),
        ("unknown key", {}, {**good, "AWS_ACCESS_KEY_ID": "nobody"}, 2, bucket.name),
        ("missing bucket", missing, good, 2, "no-such-bucket-here"),
        ("missing output bucket", {"output__url": "s3://no-such-bucket-here/out"}, good, 2, "no-such-bucket-here"),
        ("read-only output", {}, s3.env(reader=True), 2, f"s3://{bucket.name}/out"),
        ("no server", {}, {**good, **_nowhere()}, 1, "s3://"),
        ("unknown protocol", {"source__url": "nostore://bucket/*.tar"}, good, 2, "nostore"),
    ]
    for name, changes, env, code, named in cases:
        finished = cli("run", written(tmp_path, bucket, **changes), "--json", env=env)
        said = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
        assert finished.returncode == code, (name, finished.stderr)
        assert len(said) == 1, (name, finished.stderr)
        assert named in said[0], (name, said)
        assert "Traceback" not in finished.stderr, (name, finished.stderr)
        assert last_line(finished)["error"], name
        assert not [path for path in objects(bucket) if "_delta_log" in path], name


def test_the_secret_is_nowhere(s3: S3Server, bucket: Bucket, tmp_path: Path) -> None:
    by_options = tmp_path / "options.yaml"
    by_options.write_text(yaml.safe_dump(bucket.config().model_dump(mode="json")))
    by_environment = written(tmp_path, bucket, output__url=f"{bucket.output}/env")
    broken = written(tmp_path / "..", bucket, output__url="s3://no-such-bucket-here/out")
    said = []
    ray_folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # Ray's sockets need a short path
    for path, env in ((by_options, {}), (by_environment, s3.env()), (broken, s3.env())):
        finished = cli("run", path, "--json", env={**env, "RAY_TMPDIR": str(ray_folder)})
        said.append(finished.stdout + finished.stderr)
    assert '"committed": true' in said[0]
    assert '"committed": true' in said[1]
    secret = s3.secret_key
    assert not [text for text in said if secret in text]
    for path in objects(bucket):
        assert secret.encode() not in bucket.fs.cat_file(path), path
    saved = [path for path in objects(bucket) if path.endswith("config.yaml")]
    assert saved
    assert b"(not saved)" in bucket.fs.cat_file(next(path for path in saved if "/env/" not in path))
    logs = [log for log in ray_folder.rglob("*") if log.is_file() and "logs" in log.parts]
    assert logs
    for log in logs:
        assert secret.encode() not in log.read_bytes(), log
    shutil.rmtree(ray_folder)


def _nowhere() -> dict[str, str]:
    """An endpoint that nobody listens on."""
    return {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
