"""Estimates how many SAEs can be trained together without running out of memory."""

import os

from pipeline.runtime.devices import training_device
from pipeline.runtime.memory import free_memory
from pipeline.study.experiment import Experiment

SHARE = 0.7
"""Fraction of the free memory that a cohort may use; batches, buffers and other programs need the rest."""
COPIES = 3
"""Weights and two Adam moments, float32. Gradients lie in buffers that the SAEs of a thread share."""


def cohort_size(experiment: Experiment) -> int:
    """SAEs that fit into the memory that is free now, at least 1."""
    free = free_memory(training_device(experiment.run.device)) * SHARE - _shared_bytes(experiment)
    return max(1, int(free / _bytes_each(experiment)))


def _bytes_each(experiment: Experiment) -> int:
    return COPIES * 4 * 2 * experiment.model.d_in * experiment.train.d_sae


def _shared_bytes(experiment: Experiment) -> int:
    """Bytes of all threads' buffers: gradients and the values of a forward and a backward pass, twice for bfloat16."""
    D, F, B = experiment.model.d_in, experiment.train.d_sae, experiment.train.batch_size
    threads = (os.cpu_count() or 1) if training_device(experiment.run.device).type == "cpu" else 1
    return threads * 2 * 4 * (2 * D * F + 2 * B * F + 2 * B * D)
