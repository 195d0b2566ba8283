"""Reads and writes objects below a prefix of an S3-compatible object store."""

import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pipeline.artefacts.local_files import is_temporary
from pipeline.errors import BadInputError, CorruptArtefactError, PipelineError, StorageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from obstore import ObjectMeta

SCHEME = "s3://"
# obstore's default is to retry for three minutes before it reports an error.
RETRIES: Any = {
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2},
    "retry_timeout": timedelta(seconds=60),
}

PUT_AT_ONCE = 5 * 10**9
"""Bytes that one PUT can carry, and so the most that a conditional one can."""

LINK_LASTS = timedelta(days=7)
"""The longest that S3 allows."""

CONFLICT_PAUSES = (0.2, 0.4, 0.8, 1.6, 3.2)
"""Seconds to wait after each conflict with another write."""

CONFLICT = "the object store still answers 409 Conflict; run the same command again"
NO_CREDENTIALS = "there are no credentials"
NO_CONDITION = "the object store does not support conditional writes (If-None-Match and If-Match)"
PLAIN_HTTP = "the URL of the object store cannot be used"
LASTING = {
    *("NoSuchBucket", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    *(NO_CREDENTIALS, NO_CONDITION, PLAIN_HTTP),
}
"""Errors of an object store that a retry does not overcome."""
CHECK_ACCOUNT = (
    "check the URL, AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, then run the same command again"
)
REMEDIES = {
    NO_CONDITION: "use one that does, or a folder as workspace",
    PLAIN_HTTP: "check AWS_ENDPOINT_URL; for one that begins with http:// set AWS_ALLOW_HTTP=true",
}


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing."""

    bytes: int
    e_tag: str


@dataclass(frozen=True)
class Seen:
    """An object as it was at one time."""

    content: bytes
    e_tag: str
    modified: datetime
    """By the object store's clock."""


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
            self.store = obstore.store.S3Store.from_url(self.url, retry_config=RETRIES)

    def __str__(self) -> str:
        return self.url

    def check(self, *, only_read: bool = False) -> None:
        """Raise PipelineError unless the place can be listed and, but for `only_read`, conditional writes replace nothing.

        Two processes that write one store depend on it. Who may only read passes.
        """
        import obstore
        from obstore.exceptions import PermissionDeniedError

        self.sizes("none")
        if only_read:
            return
        name = f".check.{uuid4().hex}.partial"
        try:
            with suppress(PermissionDeniedError), self._explained(passing=PermissionDeniedError):
                obstore.put(self.store, name, b"", mode="create", use_multipart=False)
                if self.create(name, b"") or self.swap(name, b"replaced", '"another"'):
                    raise PipelineError(f"{self.url}: {NO_CONDITION}; {REMEDIES[NO_CONDITION]}")
        finally:
            with suppress(PipelineError):
                self.delete(name)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """All of an object by one GET. Raises FileNotFoundError, and CorruptArtefactError beyond `limit` bytes."""
        import obstore

        with self._explained():
            found = obstore.get(self.store, name)
            size = found.meta["size"]
            if limit is not None and size > limit:
                raise CorruptArtefactError(
                    f"{self}/{name} has {size} bytes, where at most {limit} can be; it is another file"
                )
            return found.bytes().to_bytes()

    def read_into(self, name: str, offset: int, buffers: "list[npt.NDArray[np.uint8]]") -> None:
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

        # A browser would offer the page of a report for saving.
        attributes: Any = {"Content-Type": "text/html"} if name.endswith(".html") else None
        with self._explained():
            self._until_settled(lambda: obstore.put(self.store, name, content, attributes=attributes), lambda: False)

    def create(self, name: str, content: bytes | memoryview) -> bool:
        """PUT with `If-None-Match: *`: of two writers the first wins."""
        import obstore

        with self._explained():
            return self._until_settled(
                lambda: obstore.put(self.store, name, content, mode="create", use_multipart=False),
                lambda: self.size(name) is not None,
            )

    def swap(self, name: str, content: bytes, seen: str | None) -> str | None:
        """PUT an object if it still has the ETag `seen`, or, with None, does not exist. Returns its new ETag, else None.

        A write that arrived while its answer was lost is recognised by its content, so no two writers may write the same.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create" if seen is None else {"e_tag": seen}
        with self._explained():
            for pause in CONFLICT_PAUSES:
                with suppress(AlreadyExistsError, PreconditionError):
                    return obstore.put(self.store, name, content, mode=mode, use_multipart=False)["e_tag"]
                there = self.look(name)
                if there and there.content == content:
                    return there.e_tag
                if (there.e_tag if there else None) != seen:
                    return None
                time.sleep(pause)  # it is as it was: the answer was 409, a conflict with another write
        raise StorageError(f"{self.url}: {CONFLICT}")

    def e_tag(self, name: str) -> str | None:
        """The ETag of an object, None when there is none."""
        meta = self._head(name)
        return meta and meta["e_tag"]

    def look(self, name: str) -> Seen | None:
        """An object as it is now, None when there is none."""
        import obstore

        with self._explained():
            try:
                found = obstore.get(self.store, name)
                meta = found.meta
                return Seen(found.bytes().to_bytes(), meta["e_tag"] or "", meta["last_modified"])
            except FileNotFoundError:
                return None

    def share(self, name: str, source: object, source_name: str) -> bool:
        """Copy an object inside the object store. False where the source is in another bucket, or no object."""
        import obstore
        import obstore.store

        bucket, _, prefix = self.url.removeprefix(SCHEME).partition("/")
        if not isinstance(source, ObjectStorage) or not f"{source.url}/".startswith(f"{SCHEME}{bucket}/"):
            return False
        there = f"{source.url.removeprefix(f'{SCHEME}{bucket}')}/{source_name}".strip("/")
        with self._explained():
            whole = obstore.store.from_url(SCHEME + bucket, retry_config=RETRIES)
            self._until_settled(lambda: obstore.copy(whole, there, f"{prefix}/{name}".strip("/")), lambda: False)
        return True

    def delete(self, name: str) -> None:
        """Remove an object if it exists."""
        import obstore

        with self._explained():
            obstore.delete(self.store, name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object below a prefix, by name."""
        return {name: there.bytes for name, there in self.listed(prefix).items()}

    def listed(self, prefix: str = "") -> "dict[str, Listed]":
        """Every object below a prefix, by name. A request returns a thousand."""
        import obstore

        with self._explained():
            pages = obstore.list(self.store, prefix, chunk_size=1000)
            every = (meta for page in pages for meta in page if not is_temporary(meta["path"]))
            return {meta["path"]: Listed(meta["size"], meta["e_tag"] or "") for meta in every}

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders below a prefix."""
        import obstore

        with self._explained():
            found = obstore.list_with_delimiter(self.store, prefix)["common_prefixes"]
        return [folder.rstrip("/").rpartition("/")[2] for folder in found]

    def size(self, name: str) -> int | None:
        """Bytes of one object, None when there is none."""
        meta = self._head(name)
        return meta and meta["size"]

    def link(self, name: str) -> str:
        """A presigned URL, with which anybody can read the object for `LINK_LASTS`, if the credentials last as long."""
        import obstore

        with self._explained():
            return obstore.sign(self.store, "GET", name, LINK_LASTS)

    def sweep(self) -> None:
        """Nothing to do: an unfinished upload leaves no object."""

    def zarr_store(self) -> Any:
        """The prefix as a read-only store of zarr-python."""
        from zarr.storage import ObjectStore

        return ObjectStore(self.store, read_only=True)

    def _head(self, name: str) -> "ObjectMeta | None":
        import obstore

        with self._explained():
            try:
                return obstore.head(self.store, name)
            except FileNotFoundError:
                return None

    def _until_settled(self, put: Callable[[], object], exists: Callable[[], bool]) -> bool:
        """PUT, again while the object store answers 409, a conflict with another write; False if the object `exists`.

        obstore reports a 409 as it reports an object that exists, although none may be there.
        """
        from obstore.exceptions import AlreadyExistsError

        for pause in CONFLICT_PAUSES:
            try:
                put()
            except AlreadyExistsError:
                if exists():
                    return False
                time.sleep(pause)
            else:
                return True
        raise StorageError(f"{self.url}: {CONFLICT}")

    @contextmanager
    def _explained(self, passing: type[Exception] | tuple[()] = ()) -> Generator[None]:
        """Turn an error of the object store into one line, without the request, which may carry credentials."""
        from obstore.exceptions import BaseError

        try:
            yield
        except passing:
            raise
        except (BaseError, FileNotFoundError) as error:
            reason = _reason(str(error))
            if isinstance(error, FileNotFoundError) and reason != "NoSuchBucket":
                raise
            remedy = REMEDIES.get(reason, CHECK_ACCOUNT)
            raise (PipelineError if reason in LASTING else StorageError)(f"{self.url}: {reason}; {remedy}") from None


def _reason(message: str) -> str:
    """The cause of an object store's error, in a few words."""
    if "NotImplemented" in message or "501 Not Implemented" in message:
        return NO_CONDITION
    if code := re.search(r"<Code>(\w+)</Code>", message):
        return code[1]
    # The URLs where a machine in AWS asks for its credentials.
    if "/latest/api/token" in message or "/latest/meta-data" in message:
        return NO_CREDENTIALS
    if "builder error" in message:
        return PLAIN_HTTP
    if "error sending request" in message:
        return "the object store cannot be reached"
    return message.split("\n", 1)[0].rpartition(" - ")[2]
