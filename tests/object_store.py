"""Object stores for tests: a moto server on the loopback interface, and one in memory whose answers can be lost."""

import hashlib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pipeline.artefacts.object_storage import Seen
from pipeline.errors import StorageError

SECRET = "a-secret-that-nobody-may-see"


@contextmanager
def serving() -> Iterator[str]:
    """URL of a server with an empty bucket called `bucket`."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    url = "http://{}:{}".format(*moto.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
    yield url
    moto.stop()


def account(server: str, cache: Path) -> dict[str, str]:
    """The environment of a client: a machine is who has a cache folder of its own."""
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "XDG_CACHE_HOME": str(cache),
    }


class InMemory:
    """The part of ObjectStorage that locks use. With `lost`, the next conditional write arrives and its answer does not."""

    def __init__(self) -> None:
        self.objects: dict[str, Seen] = {}
        self.lost = False

    def __str__(self) -> str:
        return "s3://memory"

    def swap(self, name: str, content: bytes, seen: str | None) -> str | None:
        there = self.objects.get(name)
        if there and there.content == content:
            return there.e_tag
        if (there.e_tag if there else None) != seen:
            return None
        e_tag = hashlib.md5(content).hexdigest()
        self.objects[name] = Seen(content, e_tag, datetime.now(UTC))
        if self.lost:
            self.lost = False
            raise StorageError("the answer was lost")
        return e_tag

    def e_tag(self, name: str) -> str | None:
        there = self.objects.get(name)
        return there.e_tag if there else None

    def look(self, name: str) -> Seen | None:
        return self.objects.get(name)

    def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    def sizes(self, prefix: str) -> dict[str, int]:
        return {name: len(seen.content) for name, seen in self.objects.items() if name.startswith(f"{prefix}/")}
