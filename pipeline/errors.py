"""Defines all errors that are raised on purpose. A message is one line: what is wrong, and what to do about it."""

NO_MEMORY = "can't allocate memory"
"""What torch says of the CPU's memory, in a RuntimeError; of a GPU's it has an error of its own."""


class PipelineError(Exception):
    """Base of all errors here. `exit_code` is the exit status of the `dasae` command."""

    exit_code = 1


class BadInputError(PipelineError, ValueError):
    """A name, number or file from the user cannot be used."""

    exit_code = 2


class MissingArtefactError(PipelineError, FileNotFoundError):
    """An artefact that a stage reads does not exist yet."""

    exit_code = 2


class ModelAccessError(BadInputError):
    """A model cannot be loaded: not found, not logged in, licence not accepted, or files missing."""


class CorruptArtefactError(PipelineError, OSError):
    """A finished artefact differs from what its manifest says."""


class StorageError(PipelineError):
    """Reading or writing failed for a reason that may pass, such as a full disk or the network. A retry can help."""


class OutOfMemoryError(PipelineError):
    """Memory does not hold what is computed together. Less at a time can help."""


class DegenerateSAEError(PipelineError):
    """An SAE cannot be measured: its latents never fire, never differ or are not finite. Its scores would mean nothing."""


class EvaluationError(PipelineError):
    """An evaluation of an SAE failed in the code of others. The SAE's other evaluations and the other SAEs go on."""


class DivergedSAEError(PipelineError):
    """An SAE in training is no longer finite. It alone stops; the others of its cohort go on."""


class InterruptedRunError(PipelineError):
    """The process stopped on request and saved its work. The same command resumes it."""

    exit_code = 143


def in_one_line(error: BaseException) -> str:
    """The message of an error that others raise, without its line breaks."""
    return " ".join(str(error).split())
