"""Estimates how many SAEs can be trained together without running out of memory."""

import os

from pipeline.runtime.devices import block_rows, sae_device
from pipeline.runtime.memory import free_memory
from pipeline.study.experiment import Experiment
from pipeline.train.pair_kernels import LARGEST_TABLE

SHARE = 0.7
"""Fraction of the free memory that a cohort may use; batches, buffers and other programs need the rest."""
PAIR_MATRICES = 4
"""Similarities, masks, joint firing and products of them, float32."""
COPIES = 3
"""Weights and two Adam moments, float32. Gradients lie in buffers that the SAEs of a thread share."""


def cohort_size(experiment: Experiment) -> int:
    """SAEs that fit into the memory that is free now, at least 1."""
    free = free_memory(sae_device(experiment.run.device)) * SHARE - _shared_bytes(experiment)
    return max(1, int(free / _bytes_each(experiment)))


def _bytes_each(experiment: Experiment) -> int:
    return COPIES * 4 * 2 * experiment.model.d_in * experiment.train.d_sae


def _shared_bytes(experiment: Experiment) -> int:
    """Bytes of buffers: of each thread on a CPU, twice on a GPU, where recorded steps have buffers of their own.

    Gradients and the values of a forward and a backward pass, twice for bfloat16. For the contrast PAIR_MATRICES of F x F on
    a CPU if they are held there at all, of some rows of it on a GPU.
    """
    D, F, B = experiment.model.d_in, experiment.train.d_sae, experiment.train.batch_size
    on_cpu = sae_device(experiment.run.device).type == "cpu"
    pair_rows = (F if F <= LARGEST_TABLE else 0) if on_cpu else min(F, block_rows(F))
    copies = (os.cpu_count() or 1) if on_cpu else 2
    return copies * 4 * (2 * (2 * D * F + 2 * B * F + 2 * B * D) + PAIR_MATRICES * pair_rows * F)
