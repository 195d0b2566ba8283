"""Reading a probe store: the same format, rows in document order, a label and a split for every document.

Shapes: R rows, N documents, L tokens per document, D d_in.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.store.reader import ActivationStore

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Documents:
    """The documents of one probe data set at one layer."""

    store: ActivationStore
    layer: int

    def padded(self, split: str, at_once: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The documents of a split, class by class and at most `at_once` of them: [N, L, D] in the store's dtype.

        Zeros stand where sae-bench masks: in the first place, which is the BOS's, and as padding on the right.
        """
        offsets = self.store.whole("row_offsets")
        label, in_split = self.store.whole("label"), self.store.whole("split") == SPLITS.index(split)
        length = self.store.whole("tokens").shape[1]
        for index, name in enumerate(self.store.layout.classes):
            of_class = np.flatnonzero(in_split & (label == index))
            first, stop = int(of_class[0]), int(of_class[-1]) + 1  # documents of one class and split lie together
            for start in range(first, stop, at_once):
                yield name, self._padded(offsets[start : min(start + at_once, stop) + 1], length)

    def _padded(self, offsets: np.ndarray, length: int) -> torch.Tensor:
        """Documents whose rows lie between neighbouring offsets."""
        rows_RD = self.store.read(self.layer, offsets[0], offsets[-1])
        padded_NLD = torch.zeros(len(offsets) - 1, length, self.store.layout.d_in, dtype=rows_RD.dtype)
        for document_LD, document_rows_RD in zip(padded_NLD, rows_RD.split(np.diff(offsets).tolist()), strict=True):
            document_LD[1 : 1 + len(document_rows_RD)] = document_rows_RD
        return padded_NLD
