"""Reads and writes files in a local folder or a prefix of an object store, by one small set of operations.

Names are relative, with forward slashes. A write is atomic, and durable when it returns.
"""

import os
import re
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from pipeline.errors import BadInputError, PipelineError, StorageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Buffers = list[npt.NDArray[np.uint8]]
    """Memory to fill, one buffer after the other."""

SCHEME = "s3://"
# obstore's default is to retry for three minutes before it reports an error.
RETRIES: Any = {
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2},
    "retry_timeout": timedelta(seconds=60),
}

NO_CREDENTIALS = "there are no credentials"
LASTING = {"NoSuchBucket", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", NO_CREDENTIALS}
"""Errors of an object store that a retry does not overcome."""


class Storage(Protocol):
    """The operations that LocalStorage and ObjectStorage share."""

    parallel_reads: int
    """Number of parallel reads that gives the best throughput."""

    def read(self, name: str) -> bytes:
        """All of a file. Raises FileNotFoundError."""
        ...

    def read_into(self, name: str, offset: int, buffers: "Buffers") -> None:
        """Fill the buffers from `offset` on. Raises FileNotFoundError, and EOFError for a file that is too short."""
        ...

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, replacing what was there."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless it exists; returns False when it does, and leaves it as it is."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file if it exists."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every complete file below a folder, by name."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of one file, None when there is none."""
        ...

    def sweep(self) -> None:
        """Remove temporary files of killed writers. Call it only while nobody else writes."""
        ...

    def zarr_store(self) -> Any:
        """This storage as a read-only store of zarr-python."""
        ...


def open_storage(place: "str | Path | Storage") -> Storage:
    """The storage at a path or an `s3://bucket/prefix` URL."""
    if isinstance(place, str):
        return ObjectStorage(place) if place.startswith(SCHEME) else LocalStorage(Path(place))
    return LocalStorage(place) if isinstance(place, Path) else place


def cache_folder() -> Path:
    """The user's cache folder, for what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dasae"


def read_many(storage: Storage, names: Iterable[str]) -> list[bytes]:
    """The content of several small files, read in parallel."""
    with ThreadPoolExecutor(storage.parallel_reads) as pool:
        return list(pool.map(storage.read, names))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: a temporary file beside it, synced, then renamed over it."""
    LocalStorage(path.parent).write(path.name, content)


class LocalStorage:
    """A folder of a local or shared file system."""

    parallel_reads = 2

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: str) -> bytes:
        """All of a file. Raises FileNotFoundError."""
        return (self.root / name).read_bytes()

    def read_into(self, name: str, offset: int, buffers: "Buffers") -> None:
        """Fill the buffers by one `preadv`, which copies straight from the page cache and needs no file position."""
        descriptor = os.open(self.root / name, os.O_RDONLY)
        try:
            wanted = sum(buffer.nbytes for buffer in buffers)
            if os.preadv(descriptor, [buffer.data for buffer in buffers], offset) != wanted:
                raise EOFError(f"{self.root / name} ends before byte {offset + wanted}")
        finally:
            os.close(descriptor)

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a temporary file beside the final one, sync it, and rename it over the final one."""
        final = self.root / name
        with explained(final), _temporary(final, content) as temporary:
            temporary.replace(final)
            fsync(final.parent)

    def create(self, name: str, content: bytes) -> bool:
        """Like `write`, but by `link`, which never replaces a file: of two writers the first wins."""
        final = self.root / name
        with explained(final), _temporary(final, content) as temporary:
            try:
                os.link(temporary, final)
            except FileExistsError:
                return False
            fsync(final.parent)
        return True

    def delete(self, name: str) -> None:
        """Remove a file if it exists."""
        (self.root / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove the temporary files of killed writers."""
        for partial in self.root.rglob(".*.partial"):
            partial.unlink()

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every file below a folder, by name, without temporary files."""
        files = (Path(parent, name) for parent, _, names in os.walk(self.root / prefix) for name in names)
        names = [path.relative_to(self.root).as_posix() for path in files if path.suffix != ".partial"]
        # Another process may have removed a file since, such as a checkpoint that a later one replaced.
        return {name: size for name in names if (size := self.size(name)) is not None}

    def size(self, name: str) -> int | None:
        """Bytes of one file, None when there is none."""
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def zarr_store(self) -> Any:
        """The folder as a read-only store of zarr-python."""
        from zarr.storage import LocalStore

        return LocalStore(self.root, read_only=True)


@contextmanager
def _temporary(final: Path, content: bytes | memoryview) -> Generator[Path]:
    """A synced temporary file beside `final` with this content; removed at the end unless it was renamed."""
    _make_folder(final.parent)
    temporary = final.with_name(f".{final.name}.{uuid4().hex}.partial")
    try:
        temporary.write_bytes(content)
        fsync(temporary)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Like mkdir with parents, but durable: new folders survive a power failure."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


@contextmanager
def explained(path: Path) -> Generator[None]:
    """Turn an OSError into one line that says why a file could not be written, such as a full disk."""
    try:
        yield
    except OSError as error:
        lasting = isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError)
        raise (PipelineError if lasting else StorageError)(
            f"{path} cannot be written: {error.strerror}; solve that, then run the same command again"
        ) from error


class ObjectStorage:
    """A prefix of an S3-compatible object store. Credentials, region and endpoint come from the `AWS_...` variables."""

    parallel_reads = 12

    def __init__(self, url: str):
        try:
            import obstore.store
        except ImportError:
            raise BadInputError(
                f"{url}: object stores need the package obstore: pip install 'direction-aware-sae[s3]'"
            ) from None
        self.url = SCHEME + url.removeprefix(SCHEME).strip("/")
        if self.url == SCHEME:
            raise BadInputError(f"{url} names no bucket; give s3://bucket or s3://bucket/prefix")
        with self._explained():
            self.store = obstore.store.from_url(self.url, retry_config=RETRIES)

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes:
        """All of an object by one GET. Raises FileNotFoundError."""
        import obstore

        with self._explained():
            return obstore.get(self.store, name).bytes().to_bytes()

    def read_into(self, name: str, offset: int, buffers: "Buffers") -> None:
        """Fill the buffers by one ranged GET."""
        import numpy as np
        import obstore

        wanted = sum(buffer.nbytes for buffer in buffers)
        with self._explained():
            content = np.frombuffer(memoryview(obstore.get_range(self.store, name, start=offset, length=wanted)), np.uint8)
        if len(content) != wanted:
            raise EOFError(f"{self.url}/{name} ends before byte {offset + wanted}")
        for buffer in buffers:
            buffer[:], content = content[: buffer.nbytes], content[buffer.nbytes :]

    def write(self, name: str, content: bytes | memoryview) -> None:
        """PUT an object, in several parts when it is large. It appears when all parts have arrived."""
        import obstore

        with self._explained():
            obstore.put(self.store, name, content)

    def create(self, name: str, content: bytes) -> bool:
        """PUT with `If-None-Match: *`: of two writers the first wins."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._explained():
            try:
                obstore.put(self.store, name, content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def delete(self, name: str) -> None:
        """Remove an object if it exists."""
        import obstore

        with self._explained():
            obstore.delete(self.store, name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object below a prefix, by name."""
        import obstore

        with self._explained():
            pages = obstore.list(self.store, prefix, chunk_size=1000)
            return {meta["path"]: meta["size"] for page in pages for meta in page}

    def size(self, name: str) -> int | None:
        """Bytes of one object, None when there is none."""
        import obstore

        with self._explained():
            try:
                return obstore.head(self.store, name)["size"]
            except FileNotFoundError:
                return None

    def sweep(self) -> None:
        """Nothing to do: an unfinished upload leaves no object."""

    def zarr_store(self) -> Any:
        """The prefix as a read-only store of zarr-python."""
        from zarr.storage import ObjectStore

        return ObjectStore(self.store, read_only=True)

    @contextmanager
    def _explained(self) -> Generator[None]:
        """Turn an error of the object store into one line, without the request, which may carry credentials."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            reason = _reason(str(error))
            if isinstance(error, FileNotFoundError) and reason != "NoSuchBucket":
                raise
            raise (PipelineError if reason in LASTING else StorageError)(
                f"{self.url}: {reason}; check the URL, AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and "
                f"AWS_SECRET_ACCESS_KEY, then run the same command again"
            ) from None


def _reason(message: str) -> str:
    """The cause of an object store's error, in a few words."""
    if code := re.search(r"<Code>(\w+)</Code>", message):
        return code[1]
    if (
        "/latest/api/token" in message or "/latest/meta-data" in message
    ):  # the URLs where a machine in AWS asks for its credentials
        return NO_CREDENTIALS
    if "error sending request" in message:
        return "the object store cannot be reached"
    return message.split("\n", 1)[0].rpartition(" - ")[2]


def fsync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
