"""Reads a probe store: a store whose rows lie in document order, with a label and a split for each document."""

from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import CorruptArtefactError
from pipeline.store.reader import ActivationStore
from pipeline.store.text_arrays import REMEDY

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")


@dataclass(frozen=True)
class Documents:
    """The documents of a probe data set at one layer."""

    store: ActivationStore
    layer: int

    def padded(self, split: Split, at_once: int) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The documents of a split with their class, at most `at_once` of one class at a time: [S, L, D], store's dtype.

        Raises CorruptArtefactError for documents that do not fit the rows.

        Zeros stand where sae-bench masks: at the first position, which is the BOS's, and as padding on the right.
        """
        offsets = self.store.whole("row_offsets")
        label, in_split = self.store.whole("label"), self.store.whole("split") == SPLITS.index(split)
        length = self.store.whole("tokens").shape[1]
        rows = np.diff(offsets)
        fit = len(rows) == len(label) == len(in_split) and offsets[0] == 0 and offsets[-1] == self.store.rows
        if not (fit and rows.min() > 0 and rows.max() < length):
            raise CorruptArtefactError(f"{self.store.storage}: its documents do not fit its rows; {REMEDY}")
        for index, name in enumerate(self.store.layout.classes):
            of_class = np.flatnonzero(in_split & (label == index))
            if not len(of_class) or np.ptp(of_class) >= len(of_class):  # one class of one split lies together
                raise CorruptArtefactError(f"{self.store.storage}: documents of class {name!r} are amiss; {REMEDY}")
            first, stop = int(of_class[0]), int(of_class[-1]) + 1
            for start in range(first, stop, at_once):
                yield name, self._padded(offsets[start : min(start + at_once, stop) + 1], length)

    def _padded(self, offsets: npt.NDArray[np.int64], length: int) -> torch.Tensor:
        """The documents whose rows lie between neighbouring offsets."""
        rows_RD = self.store.read(self.layer, int(offsets[0]), int(offsets[-1]))
        padded_SLD = torch.zeros(len(offsets) - 1, length, self.store.layout.d_in, dtype=rows_RD.dtype)
        for document, (first, stop) in enumerate(pairwise((offsets - offsets[0]).tolist())):
            padded_SLD[document, 1 : 1 + stop - first] = rows_RD[first:stop]
        return padded_SLD
