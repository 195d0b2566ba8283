"""Reading a probe store: the same format, rows in document order, a label and a split for every document.

Shapes: R rows, N documents, L tokens per document, D d_in.
"""

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

    def padded(self, split: str) -> dict[str, torch.Tensor]:
        """For every class, its documents of a split as [N, L, D] in the store's dtype.

        Zeros stand where sae-bench masks: in the first place, which is the BOS's, and as padding on the right.
        """
        offsets = self.store.whole("row_offsets")
        label, in_split = self.store.whole("label"), self.store.whole("split") == SPLITS.index(split)
        length = self.store.whole("tokens").shape[1]
        activations: dict[str, torch.Tensor] = {}
        for index, name in enumerate(self.store.layout.classes):
            documents = np.flatnonzero(in_split & (label == index))
            first, last = documents[0], documents[-1] + 1  # documents of one class and split lie together
            rows_RD = self.store.read(self.layer, offsets[first], offsets[last])
            padded_NLD = torch.zeros(len(documents), length, self.store.layout.d_in, dtype=rows_RD.dtype)
            counts = np.diff(offsets[first : last + 1])
            for document, document_rows_RD in zip(padded_NLD, rows_RD.split(counts.tolist()), strict=True):
                document[1 : 1 + len(document_rows_RD)] = document_rows_RD
            activations[name] = padded_NLD
        return activations
