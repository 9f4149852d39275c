"""Bytes in and out of any fsspec URL: list, read while unchanged, publish whole or not at all.

A `Store` is only settings, so it can be sent to another process: the filesystem is made inside the process that uses it.
Listings are never cached. What is opened is checked against what was listed. Transient errors are tried again, everything
else becomes a `StorageError` that names the URL and holds no secret.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import io
import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from pipeline.ahead import ahead
from pipeline.config import Storage
from pipeline.errors import NotFound, PipelineError, ShardChanged, StorageError, StorageRefused, nearest
from pipeline.rawfile import Pieces, Ranges
from pipeline.recipe import digest

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

logger = logging.getLogger(__name__)

LOCAL_BLOCK_BYTES = 1 << 20
FILES_AHEAD, FILES_AHEAD_BYTES = 32, 32 << 20
"""Small objects that are read one after the other are requested so many ahead, up to so many bytes."""
ONE_PUT_BYTES = 64 << 20
"""Up to this size an object is published by one PUT, above it by a multipart upload."""
PARTS_OF_A_SIZE = 1000
"""Of a multipart upload to S3, which may have 10,000: growing by `ONE_PUT_BYTES`, they make 3.7 TB instead of 0.7."""
ATTEMPTS = 5
"""Of one request: 17 seconds of waiting at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStat:
    """One object as a listing saw it."""

    url: str
    num_bytes: int
    version: str
    """`etag:…` where the store gives one, else `stat:mtime_ns,ctime_ns,inode`: changes when the content may have."""
    modified: float = field(default=0.0, compare=False)
    """Seconds since the epoch; 0 where the store does not say."""

    @property
    def fingerprint(self) -> str:
        """32 hex digits over URL, size and version."""
        return digest(self.url, str(self.num_bytes), self.version)


class Store:
    """How to reach one place. Picklable; holds no connection until it is used."""

    def __init__(self, settings: Storage | None = None) -> None:
        self.settings = settings or Storage()
        self._filesystems: dict[str, AbstractFileSystem] = {}

    def __reduce__(self) -> tuple[type[Store], tuple[Storage]]:
        return Store, (self.settings,)

    def locate(self, url: str) -> tuple[AbstractFileSystem, str]:
        """The filesystem for `url`, made once in this process, and the path in it."""
        import fsspec

        protocol = fsspec.utils.get_protocol(url)
        if protocol not in self._filesystems:
            try:
                made = fsspec.filesystem(protocol, skip_instance_cache=True, **self._arguments(protocol))
                if _is_s3(made):
                    made.session = made.session or _s3_session(made.kwargs)
                    made.retries = 1  # `_retry` does it, with jitter: the two would multiply to minutes
            except Exception as error:  # every filesystem has its own way to refuse what it was given
                hint = nearest(protocol, fsspec.available_protocols(), 3) if "not known" in str(error) else ""
                raise StorageRefused(f"{url}: {self.redact(str(error))}" + (f"; {hint}" if hint else "")) from None
            self._filesystems[protocol] = made
        fs = self._filesystems[protocol]
        return fs, str(fs._strip_protocol(url))

    def _arguments(self, protocol: str) -> dict[str, Any]:
        settings, arguments = self.settings, dict(self.settings.options)
        if protocol in {"s3", "s3a"}:
            arguments["use_listings_cache"] = False
            arguments.setdefault("config_kwargs", {"retries": {"max_attempts": 0}, "connect_timeout": 10, "read_timeout": 60})
            if settings.endpoint_url:
                arguments["endpoint_url"] = settings.endpoint_url
            if settings.profile:
                arguments["profile"] = settings.profile
            if settings.anonymous:
                arguments["anon"] = True
        return arguments

    def absolute(self, url: str) -> str:
        """The one spelling of a URL that goes into the dataset, with its protocol."""
        fs, path = self.locate(url)
        return str(fs.unstrip_protocol(path))

    def delta_options(self, url: str) -> dict[str, str]:
        """The same settings as deltalake's own object store wants them."""
        import fsspec

        settings = self.settings
        if fsspec.utils.get_protocol(url) not in {"s3", "s3a"}:
            return {name: value for name, value in settings.options.items() if isinstance(value, str)}
        options = {}
        endpoint = settings.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options["aws_endpoint"] = endpoint
            options["aws_allow_http"] = str(endpoint.startswith("http://")).lower()
        if settings.anonymous:
            return options | {"aws_skip_signature": "true", "aws_region": "us-east-1"}
        # botocore finds what s3fs finds: environment, profile, web identity, instance. One way in for both.
        import botocore.session

        session = botocore.session.Session(profile=settings.profile)
        options["aws_region"] = session.get_config_variable("region") or "us-east-1"
        given = settings.options
        if "key" in given:
            found = (given["key"], given["secret"], given.get("token"))
        else:
            credentials = session.get_credentials()
            found = credentials.get_frozen_credentials()[:3] if credentials else (None, None, None)
        names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
        return options | {name: value for name, value in zip(names, found, strict=True) if value}

    def redact(self, text: str) -> str:
        """`text` without anything that was given as an option or stands in the environment as a credential."""
        secrets = [value for value in self.settings.options.values() if isinstance(value, str) and len(value) > 3]
        secrets += [value for name, value in os.environ.items() if re.search(r"SECRET|TOKEN|PASSWORD", name) and len(value) > 3]
        for secret in secrets:
            text = text.replace(secret, "***")
        return re.sub(r"\x1b\[[0-9;]*m", "", text)  # deltalake colours its errors

    # Listing

    def list(self, url: str, *, missing_ok: bool = False) -> Iterator[FileStat]:
        """Every file at `url`: the file itself, all files below a folder, or what a glob matches. Order is the store's.

        Raises:
            StorageRefused: nothing there, or no access.
        """
        fs, path = self.locate(url)
        found = False
        for name, info in _list_s3(fs, path, url) if _is_s3(fs) else _list_any(fs, path, url):
            found = True
            yield self._stat(fs, name, info)
        if not found and not missing_ok:
            raise NotFound(f"{url}: there is no such file or folder, or it is empty", url)

    def stat(self, url: str) -> FileStat:
        """Size and version of one file now.

        Raises:
            StorageError: it does not exist, or the store refused.
        """
        fs, path = self.locate(url)
        return self._stat(fs, path, _retry(lambda: fs.info(path), url))

    def exists(self, url: str) -> bool:
        """Whether there is a file or folder."""
        fs, path = self.locate(url)
        return bool(_retry(lambda: fs.exists(path), url))

    @staticmethod
    def _stat(fs: AbstractFileSystem, path: str, info: dict[str, Any]) -> FileStat:
        return FileStat(
            url=fs.unstrip_protocol(path),
            num_bytes=int(info["size"] or 0),
            version=_version(fs, path, info),
            modified=_modified(info),
        )

    # Reading

    def read(self, url: str) -> bytes:
        """The whole of a small object."""
        fs, path = self.locate(url)
        return cast(bytes, _retry(lambda: fs.cat_file(path), url))

    def read_range(self, url: str, start: int, num_bytes: int) -> bytes:
        """One ranged read.

        Raises:
            StorageError: the object has fewer bytes, is gone, or the store refused.
        """
        fs, path = self.locate(url)

        def read() -> bytes:
            payload = cast(bytes, fs.cat_file(path, start=start, end=start + num_bytes))
            # Cut on the way it would be asked for again; a shorter object gives no more the fifth time.
            if len(payload) < num_bytes and self.stat(url).num_bytes < start + num_bytes:
                raise StorageError(f"{url}: has no {num_bytes} bytes from byte {start} on")
            return payload

        return self._exactly(num_bytes, read, url)

    def open(self, file: FileStat) -> BinaryIO:
        """A seekable reader of the object that was listed; bounded pieces are read ahead of a sequential reader.

        Raises:
            ShardChanged: the object is no longer the one that was listed.
            StorageError: it is gone, or the store refused.
        """
        fs, path = self.locate(file.url)
        if _is_local(fs):
            return self._open_local(file, path)
        self._check_version(file)
        return cast(BinaryIO, io.BufferedReader(self._pieces(file), buffer_size=1 << 16))

    def open_ranges(self, url: str, num_bytes: int) -> BinaryIO:
        """An object of known size in which every read is one ranged request for just these bytes."""
        return cast(BinaryIO, Ranges(functools.partial(self.read_range, url), num_bytes))

    def local_path(self, url: str) -> str | None:
        """The path of a file on this machine, which can be mapped into memory; None for every other store."""
        fs, path = self.locate(url)
        return path if _is_local(fs) else None

    def blocks(self, file: FileStat, start: int = 0) -> Iterator[bytes]:
        """The object that was listed from byte `start` to its last, in large blocks that are read ahead of need.

        Raises:
            ShardChanged: the object is no longer the one that was listed.
            StorageError: it is gone, or the store refused.
        """
        fs, path = self.locate(file.url)
        if _is_local(fs):
            with self._open_local(file, path) as handle:
                handle.seek(start)
                while block := handle.read(LOCAL_BLOCK_BYTES):
                    yield block
            return
        self._check_version(file)
        with self._pieces(file) as pieces:
            yield from pieces.blocks(start)

    def read_files(self, files: Sequence[FileStat]) -> Iterator[bytes]:
        """The whole of small objects that were listed, in order, requested ahead of need.

        Raises:
            ShardChanged: one is no longer what was listed.
            StorageError: one is gone, or the store refused.
        """
        if not files or _is_local(self.locate(files[0].url)[0]):
            yield from map(self._read_file, files)
            return
        yield from ahead(self.readers, self._read_file, files, FILES_AHEAD, lambda file: file.num_bytes, FILES_AHEAD_BYTES)

    def _read_file(self, file: FileStat) -> bytes:
        fs, path = self.locate(file.url)
        if _is_local(fs):
            with self._open_local(file, path) as handle:
                return handle.read()
        self._check_version(file)
        return self._read_piece(file, 0, file.num_bytes) if file.num_bytes else b""

    def _pieces(self, file: FileStat) -> Pieces:
        return Pieces(functools.partial(self._read_piece, file), file.num_bytes, self.readers)

    def _check_version(self, file: FileStat) -> None:
        # S3 checks the version with every piece; other stores are asked once.
        if not _is_s3(self.locate(file.url)[0]) and self.stat(file.url).version != file.version:
            raise ShardChanged(f"{file.url}: was written anew since it was listed")

    def _read_piece(self, file: FileStat, start: int, num_bytes: int) -> bytes:
        """One ranged read of the version that was listed, and of no other."""
        fs, path = self.locate(file.url)
        if not _is_s3(fs):
            return self.read_range(file.url, start, num_bytes)
        bucket, key, _ = fs.split_path(path)
        condition = {"IfMatch": f'"{file.version.removeprefix("etag:")}"'} if file.version.startswith("etag:") else {}

        async def get() -> bytes:
            answer = await fs._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{start + num_bytes - 1}", **condition
            )
            async with answer["Body"] as body:
                return cast(bytes, await body.read())

        def attempt() -> bytes:
            import fsspec.asyn

            try:
                return cast(bytes, fsspec.asyn.sync(fs.loop, get))
            except OSError as error:
                # s3fs tells a failed condition by this code; a file that is gone is another error.
                if condition and error.errno == errno.EINVAL:
                    raise ShardChanged(f"{file.url}: was written anew since it was listed") from None
                raise

        return self._exactly(num_bytes, attempt, file.url)

    @staticmethod
    def _exactly(num_bytes: int, read: Callable[[], bytes], url: str) -> bytes:
        def attempt() -> bytes:
            payload = read()
            if len(payload) != num_bytes:
                raise ConnectionError(f"{len(payload)} bytes came instead of {num_bytes}")
            return payload

        return _retry(attempt, url)

    @staticmethod
    def _open_local(file: FileStat, path: str) -> BinaryIO:
        def opened() -> BinaryIO:
            # The system reads ahead by itself; 1 MiB keeps the number of calls low.
            return open(path, "rb", buffering=1 << 20)

        handle = _retry(opened, file.url)
        if _local_version(os.fstat(handle.fileno())) != file.version:
            handle.close()
            raise ShardChanged(f"{file.url}: was written anew since it was listed")
        return handle

    # Writing

    @contextlib.contextmanager
    def publish(self, url: str) -> Iterator[BinaryIO]:
        """A file to write that becomes visible whole when the block ends, and never when it raises.

        Locally a temporary file in the same folder is synced and renamed; elsewhere one PUT up to `ONE_PUT_BYTES`, beyond
        that a multipart upload that is aborted on error.
        """
        fs, path = self.locate(url)
        writer: _LocalUpload | _Upload = _LocalUpload(path, url) if _is_local(fs) else _Upload(fs, path, url)
        try:
            yield cast(BinaryIO, writer)
            writer.commit()
        except BaseException:
            writer.abort()
            raise

    def write(self, url: str, payload: bytes) -> None:
        """Publish a small object."""
        with self.publish(url) as file:
            file.write(payload)

    def delete(self, url: str) -> None:
        """Remove one object; that it is gone already is fine."""
        fs, path = self.locate(url)
        with contextlib.suppress(FileNotFoundError):
            _retry(lambda: fs.rm_file(path), url, missing_ok=True)

    @functools.cached_property
    def readers(self) -> ThreadPoolExecutor:
        """Threads that read pieces ahead, shared by the files that are open in this process."""
        return ThreadPoolExecutor(16, thread_name_prefix="read-ahead")


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL."""
    return "/".join([url.rstrip("/"), *parts])


class _LocalUpload(io.FileIO):
    """A temporary file beside its target."""

    def __init__(self, path: str, url: str) -> None:
        self._target, self._url = Path(path), url
        self._temporary = self._target.with_name(f"{self._target.name}.{uuid.uuid4().hex}.tmp")

        def create() -> None:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            super(_LocalUpload, self).__init__(self._temporary, "wb")

        _retry(create, url)

    def write(self, payload: Any) -> int:
        """All of it: a raw file may take less than it is given, and a disk that is full does."""
        left = view = memoryview(payload).cast("B")
        with naming(self._url):
            while left:
                left = left[super().write(left) :]
        return len(view)

    def commit(self) -> None:
        with naming(self._url):
            os.fsync(self.fileno())
            self.close()
            os.replace(self._temporary, self._target)

    def abort(self) -> None:
        self.close()
        self._temporary.unlink(missing_ok=True)


class _Upload(io.RawIOBase):
    """Collects one PUT; turns into a multipart upload when that grows too large."""

    def __init__(self, fs: AbstractFileSystem, path: str, url: str) -> None:
        self._fs, self._path, self._url = fs, path, url
        self._buffer, self._position = bytearray(), 0
        self._multipart: Any = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, payload: Any) -> int:
        view = memoryview(payload).cast("B")
        self._position += len(view)
        if self._multipart is None and self._position > ONE_PUT_BYTES:
            if _is_s3(self._fs):
                self._multipart = _S3Multipart(self._fs, self._path, self._url)
            else:
                # autocommit=False: closing uploads the parts, only commit() makes the object visible.
                self._multipart = self._fs.open(self._path, "wb", block_size=ONE_PUT_BYTES, autocommit=False)
            self._multipart.write(bytes(self._buffer))
            self._buffer.clear()
        if self._multipart is not None:
            self._multipart.write(view)
        else:
            self._buffer += view
        return len(view)

    def commit(self) -> None:
        if self._multipart is None:
            # Without its type a browser would save a page of a bucket in place of showing it.
            is_page = _is_s3(self._fs) and self._path.endswith(".html")
            kind = {"ContentType": "text/html; charset=utf-8"} if is_page else {}
            _retry(lambda: self._fs.pipe_file(self._path, bytes(self._buffer), **kind), self._url)
        else:
            self._multipart.close()
            _retry(self._multipart.commit, self._url)

    def abort(self) -> None:
        if self._multipart is not None:
            with contextlib.suppress(Exception):  # the error that led here is the one to report
                self._multipart.discard()
            self._multipart.closed = True  # or the destructor of fsspec's file would publish what there is


class _S3Multipart:
    """A multipart upload in which every request is tried again; s3fs's own file is lost with the first that fails."""

    def __init__(self, fs: AbstractFileSystem, path: str, url: str) -> None:
        self._fs, self._url = fs, url
        bucket, key, _ = fs.split_path(path)
        self._place = {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._parts: list[dict[str, Any]] = []
        start = time.monotonic()
        self._place["UploadId"] = _retry(lambda: self._call("create_multipart_upload"), url)["UploadId"]
        self._abort_lost(datetime.timedelta(seconds=time.monotonic() - start + 1))

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        import fsspec.asyn

        fs = self._fs
        answer = fsspec.asyn.sync(fs.loop, fs._call_s3, operation, fs.s3_additional_kwargs, **self._place, **arguments)
        return cast("dict[str, Any]", answer)

    def write(self, view: bytes | memoryview) -> None:
        self._buffer += view
        if len(self._buffer) >= ONE_PUT_BYTES * (1 + len(self._parts) // PARTS_OF_A_SIZE):
            self._send()

    def _send(self) -> None:
        number, body = len(self._parts) + 1, bytes(self._buffer)
        answer = _retry(lambda: self._call("upload_part", PartNumber=number, Body=body), self._url)
        proofs = {name: value for name, value in answer.items() if name == "ETag" or name.startswith("Checksum")}
        self._parts.append({"PartNumber": number, **proofs})
        self._buffer.clear()

    def close(self) -> None:
        if self._buffer:
            self._send()

    def commit(self) -> None:
        self._call("complete_multipart_upload", MultipartUpload={"Parts": self._parts})

    def discard(self) -> None:
        self._call("abort_multipart_upload")

    def _abort_lost(self, within: datetime.timedelta) -> None:
        """End uploads of this object that were begun so shortly before this one: by requests whose answers were lost, and which
        the layers below sent again without our knowing. Nobody would ever end them, and parts and all are paid for.
        """
        import fsspec

        fs, bucket, key = self._fs, self._place["Bucket"], self._place["Key"]
        # An upload goes on whatever becomes of these, and whoever may write it may not be allowed to list.
        with contextlib.suppress(Exception):
            page = fsspec.asyn.sync(fs.loop, fs._call_s3, "list_multipart_uploads", Bucket=bucket, Prefix=key)
            begun = {each["UploadId"]: each["Initiated"] for each in page["Uploads"] if each["Key"] == key}
            mine = begun.pop(self._place["UploadId"])
            for upload, at in begun.items():
                if mine - within <= at <= mine:
                    place = {"Bucket": bucket, "Key": key, "UploadId": upload}
                    fsspec.asyn.sync(fs.loop, fs._call_s3, "abort_multipart_upload", **place)


def _list_any(fs: AbstractFileSystem, path: str, url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import fsspec

    # `find` serves folder and file; asking `info` first would cost a request and see a folder as missing on many stores.
    listing = fs.glob if fsspec.core.has_magic(path) else fs.find
    for name, info in _retry(lambda: listing(path, detail=True), url).items():
        if info.get("islink"):
            if os.path.isdir(name):
                logger.warning("%s: links to folders are not followed", name)
                continue
            if not os.path.exists(name):
                raise StorageRefused(f"{name}: is a link to a file that is not there")
            info = fs.info(name)  # of the file behind it, which a listing does not tell
        if info.get("type") == "file":
            yield name, info


def _list_s3(fs: AbstractFileSystem, path: str, url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Page by page: a bucket of any size is listed in the memory of one page."""
    import fsspec
    from fsspec.utils import glob_translate

    fixed = re.split(r"[*?\[{]", path, maxsplit=1)[0] if fsspec.core.has_magic(path) else path
    matches = re.compile(glob_translate(path)).fullmatch if fixed != path else None
    bucket, _, prefix = fixed.partition("/")
    more: dict[str, str] = {}

    def get() -> dict[str, Any]:
        page = fsspec.asyn.sync(fs.loop, fs._call_s3, "list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        return cast("dict[str, Any]", page)

    while True:
        page = _retry(get, url)
        for info in page.get("Contents", []):
            name = f"{bucket}/{info['Key']}"
            below = name == path or name.startswith(f"{path.rstrip('/')}/")
            if not name.endswith("/") and (matches(name) if matches else below):
                yield name, {**info, "size": info["Size"], "type": "file"}
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _s3_session(arguments: dict[str, Any]) -> Any:
    """What s3fs would make for itself, but quick at times of day: dateutil takes 2/3 of the work of reading a listing."""
    import aiobotocore.session  # type: ignore[import-untyped]
    import botocore.utils

    def parse(value: Any) -> Any:
        if isinstance(value, str) and value.endswith("Z"):
            with contextlib.suppress(ValueError):
                return datetime.datetime.fromisoformat(value)
        return botocore.utils.parse_timestamp(value)

    session = aiobotocore.session.AioSession(**arguments)
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse)
    return session


def _is_s3(fs: AbstractFileSystem) -> bool:
    return type(fs).__module__.startswith("s3fs")


def _is_local(fs: AbstractFileSystem) -> bool:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "file" in protocols


def _local_version(stat: os.stat_result) -> str:
    return f"stat:{stat.st_mtime_ns},{stat.st_ctime_ns},{stat.st_ino}"


def _version(fs: AbstractFileSystem, path: str, info: dict[str, Any]) -> str:
    if _is_local(fs):
        return _local_version(os.stat(path))
    for name in ("ETag", "etag", "e_tag", "generation", "md5Hash", "content_md5"):
        if info.get(name):
            return f"etag:{str(info[name]).strip(chr(34))}"
    for name in ("mtime", "LastModified", "last_modified", "created", "updated"):
        if when := info.get(name):
            # A listing and a question for one file may give the same time as different types.
            return f"stat:{when.timestamp() if isinstance(when, datetime.datetime) else when}"
    return "stat:"


def _modified(info: dict[str, Any]) -> float:
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        when = info.get(name)
        if isinstance(when, datetime.datetime):
            return when.timestamp()
        if isinstance(when, (int, float)):
            return float(when)
    return 0.0


def _retry(attempt: Callable[[], T], url: str, missing_ok: bool = False) -> T:
    """Run `attempt`; try again with jitter where the error may pass, else raise a `StorageError` that names `url`."""
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except PipelineError:
            raise
        except FileNotFoundError as error:
            if missing_ok:
                raise
            if "bucket" in str(error).lower():
                where = "check its name, and storage.endpoint_url or --endpoint-url where the store is not AWS"
                raise NotFound(f"{url}: there is no such bucket; {where}", url) from None
            raise NotFound(f"{url}: there is no such file or folder", url) from None
        except _REFUSALS as error:
            raise StorageRefused(f"{url}: {_reason(error)}") from None
        except Exception as error:
            if type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
                raise StorageRefused(f"{url}: {error}") from None
            if isinstance(error, OSError) and error.errno in _FINAL:
                raise StorageRefused(f"{url}: {_reason(error)}") from None
            if number == ATTEMPTS - 1 or not _transient(error):
                raise StorageError(f"{url}: {type(error).__name__}: {error}") from None
        time.sleep(random.uniform(0.5, 1.0) * 0.2 * 4**number)
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def naming(url: str) -> Iterator[None]:
    """What the system refuses names `url`. Nothing is tried again: a second fsync would hide what the first has lost."""
    try:
        yield
    except OSError as error:
        is_final = isinstance(error, _REFUSALS) or error.errno in _FINAL
        raise (StorageRefused if is_final else StorageError)(f"{url}: {_reason(error)}") from None


_REFUSALS = (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_FINAL = {errno.EINVAL, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.EDQUOT}
"""Bad names, a full or read-only disk: the same tomorrow."""


def _reason(error: OSError) -> str:
    """What the store said: Python's text for a system error, the store's own for an answer of its."""
    if mend := _MENDS.get(error.errno or 0):
        return mend
    return str(error.args[1] if len(error.args) > 1 else error) or type(error).__name__


_MENDS = {
    errno.EISDIR: "is a folder; name a file",
    errno.ENOTDIR: "a part of this path is a file where a folder has to be; name another place",
    errno.EEXIST: "a part of this path is a file where a folder has to be; name another place",
}
"""What to do, where the system's own words do not say it. EEXIST: the folder of a file could not be made."""


def _transient(error: Exception) -> bool:
    """Whether the same request may succeed later: network trouble, throttling, a server's own failure."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in {
        "aiohttp",
        "botocore",
        "aiobotocore",
        "fsspec",
    }
