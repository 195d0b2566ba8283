"""Tokenizing a corpus of any size into a new store, against packing it in memory: tokens a second, and memory.

    python benchmarks/tokens.py --tokens 4000000 40000000

Every contestant and size runs in a process of its own; memory is the most that the process had resident, less what it had
before the first text. Texts are drawn from the words of Python's own documentation, and never stand in memory together.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

from measure import show

from pipeline.artefacts.storage import LocalStorage
from pipeline.extract import new_text
from pipeline.models.tiny import train_tokenizer
from pipeline.texts import packing, python

CONTEXT, WORDS = 128, 600


class Words:
    """Endless texts of WORDS words, as a corpus."""

    def __init__(self, words: list[str]):
        self.words = words

    def __iter__(self) -> Iterator[str]:
        generator = random.Random(0)
        while True:
            yield " ".join(generator.choices(self.words, k=WORDS))

    def place(self) -> dict[str, Any]:
        """Nowhere: this corpus is not resumed."""
        return {}


def resident() -> float:
    """The most megabytes that this process had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(contestant: str, tokens: int) -> None:
    """Tokenize once, and print seconds and megabytes as JSON."""
    texts = list(python.corpus_texts())[:2000]
    tokenizer = train_tokenizer(texts, 4096)
    words = Words([word for text in texts for word in text.split()][:20_000])
    next(iter(words))
    before, started = resident(), perf_counter()
    if contestant == "streamed":
        new_text.documents = lambda *_: words
        with tempfile.TemporaryDirectory() as folder:
            no_relatives: Any = SimpleNamespace(stores=[])
            text = new_text.NewText(LocalStorage(Path(folder)), no_relatives, tokenizer, CONTEXT, tokens)
            for _ in text.pack(SimpleNamespace()):  # type: ignore[arg-type]  # the corpus is ours
                pass
    else:
        packing.pack(words, tokenizer, context=CONTEXT, rows=tokens)
    print(json.dumps({"seconds": perf_counter() - started, "megabytes": resident() - before}))


def main() -> None:
    """Run every contestant at every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_000_000, 40_000_000])
    parser.add_argument("--one", choices=["streamed", "in memory"], help="run one contestant in this process")
    args = parser.parse_args()
    if args.one:
        one(args.one, args.tokens[0])
        return
    rows: list[list[str]] = []
    for contestant in ("in memory", "streamed"):
        for tokens in args.tokens:
            command = [sys.executable, __file__, "--one", contestant, "--tokens", str(tokens)]
            done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            speed, megabytes = f"{tokens / done['seconds']:,.0f}", f"{done['megabytes']:,.0f}"
            rows.append([contestant, f"{tokens:,}", speed, megabytes])
    show(f"tokenizing, context {CONTEXT}", ["", "tokens", "tokens/s", "MB"], rows)


if __name__ == "__main__":
    main()
