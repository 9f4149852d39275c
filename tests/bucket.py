"""A bucket of image shards on the real S3 server, and configs that read and write there."""

from __future__ import annotations

import uuid
from typing import Any

import s3fs
from conftest import settings, shard_members, tar_bytes
from s3 import S3Server

from pipeline import config


class Bucket:
    """One source and one output, with names that no other test uses."""

    def __init__(self, server: S3Server, endpoint_url: str | None = None) -> None:
        self.server, self.name = server, f"b{uuid.uuid4().hex[:12]}"
        server.create_bucket(self.name)
        self.endpoint_url = endpoint_url or server.endpoint_url
        self.fs = s3fs.S3FileSystem(**server.s3fs_options(), skip_instance_cache=True, use_listings_cache=False)
        self.output = f"s3://{self.name}/out"

    @property
    def storage(self) -> dict[str, Any]:
        """The `storage` section of source and output."""
        options = {"key": self.server.access_key, "secret": self.server.secret_key}
        return {"endpoint_url": self.endpoint_url, "options": options}

    def config(self, **changes: Any) -> config.Config:
        """See `conftest.settings`."""
        both = {"source__storage": self.storage, "output__storage": self.storage}
        return settings(f"s3://{self.name}/shards/*.tar", self.output, **(both | changes))

    def put(self, shard: str, members: dict[str, bytes]) -> None:
        """Write one shard."""
        self.fs.pipe_file(f"{self.name}/shards/{shard}.tar", tar_bytes(members))

    def fill(self, images: list[bytes], per_shard: int) -> None:
        """Write images as shards 000, 001, …"""
        for start in range(0, len(images), per_shard):
            self.put(f"{start // per_shard:03d}", shard_members(images[start : start + per_shard], start))

    def remove(self, shard: str) -> None:
        """Delete one shard."""
        self.fs.rm_file(f"{self.name}/shards/{shard}.tar")
