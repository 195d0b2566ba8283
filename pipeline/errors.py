"""Every error a user can cause or meet, one line each: what is wrong, and what to do about it."""


class PipelineError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the `dasae` command ends with."""

    exit_code = 1


class BadInputError(PipelineError, ValueError):
    """A name, a number or a file the user gave cannot be used."""

    exit_code = 2


class MissingArtefactError(PipelineError, FileNotFoundError):
    """A stage was asked to run before the artefact that it reads exists."""

    exit_code = 2


class ModelAccessError(BadInputError):
    """A model cannot be loaded: not logged in, licence not accepted, or not found."""


class CorruptArtefactError(PipelineError, OSError):
    """A finished artefact is not what its manifest says."""


class StorageError(PipelineError):
    """Files could not be read or written, for a reason that may pass: a full disk, a network. Trying again can help."""


class DegenerateSAEError(PipelineError):
    """An SAE whose features cannot be probed: its numbers would look like results and be none."""


class InterruptedRunError(PipelineError):
    """The process was asked to stop and did so at a point from which the same command goes on."""

    exit_code = 143
