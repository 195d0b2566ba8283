"""Writes and reads SAEs in SAELens' format: `cfg.json` and `sae_weights.safetensors`."""

import glob
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from safetensors.torch import load_file, save  # pyright: ignore[reportUnknownVariableType] - takes a bare PathLike

from pipeline.artefacts.storage import explained, fsync, write_atomically
from pipeline.errors import BadInputError, CorruptArtefactError, in_one_line
from pipeline.sae.activations import ACTIVATIONS
from pipeline.sae.gated import Gated
from pipeline.sae.sae import SAE

SAELENS_FORMAT = "6.0.0"
"""The SAELens release whose configuration format is written; without it SAELens assumes an older one, without metadata."""
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
CARD = "README.md"
SHAPED = ("W_enc", "b_enc", "W_dec", "b_dec")
"""Tensors that belong to no activation."""


def write_sae(sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write the two files into a folder, which `sae_lens.SAE.load_from_disk` reads if SAELens knows the architecture.

    Each is on the disk when this returns. Raises StorageError, which names the file, when the disk does not take it.
    """
    config = {
        "architecture": sae.activation.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_FORMAT, **metadata},
        **sae.activation.config(),
    }
    bias = sae.activation.bias_tensor
    tensors = {"W_enc": sae.W_enc_DF, bias: sae.b_enc_F, "W_dec": sae.W_dec_FD, "b_dec": sae.b_dec_D}
    tensors |= sae.activation.tensors()
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    write_atomically(folder / WEIGHTS, weights)
    write_atomically(folder / CONFIG, json.dumps(config, indent=1).encode())


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `cfg.json`. Raises CorruptArtefactError for one that `write_sae` did not write."""
    path = folder / CONFIG
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptArtefactError(f"{path} cannot be read: {in_one_line(error)}") from None
    if not isinstance(config, dict) or not isinstance(cast("dict[str, Any]", config).get("metadata"), dict):
        raise CorruptArtefactError(f"{path} is not the configuration of an SAE")
    return cast("dict[str, Any]", config)


def read_sae(folder: Path) -> SAE:
    """The SAE that `write_sae` wrote.

    Raises CorruptArtefactError for an architecture that no activation has, and for weights that are not those of an SAE.
    """
    config = read_config(folder)
    architecture = config.get("architecture")
    readers = {known.architecture: known.read for known in ACTIVATIONS.values()} | {Gated.architecture: Gated.of}
    if architecture not in readers:
        raise CorruptArtefactError(f"{folder / CONFIG}: architecture {architecture!r} is not one of {', '.join(readers)}")
    tensors = load_file(folder / WEIGHTS)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    d_in, d_sae = (*shapes.get("W_enc", ()), 0, 0)[:2]
    try:
        activation = readers[architecture](config, {name: tensor for name, tensor in tensors.items() if name not in SHAPED})
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptArtefactError(f"{folder} is no {architecture} SAE: {in_one_line(error)}") from None
    bias = activation.bias_tensor
    expected = {"W_enc": (d_in, d_sae), bias: (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if shapes != expected | dict.fromkeys(activation.tensors(), (d_sae,)):
        raise CorruptArtefactError(f"{folder / WEIGHTS} holds {shapes}, which is no SAE")
    return SAE(
        W_enc_DF=tensors["W_enc"],
        b_enc_F=tensors[bias],
        W_dec_FD=tensors["W_dec"],
        b_dec_D=tensors["b_dec"],
        activation=activation,
    )


def to_saelens(source: Path, target: Path, name: str, card: str | None = None) -> None:
    """Write the SAE in the folder `source` into `target`, for `sae_lens.SAE.load_from_disk`.

    `name` is the artefact's name, for the metadata. Raises what `place_sae` does, and BadInputError when SAELens has no
    architecture for the activation.
    """
    sae = read_sae(source)
    if not sae.activation.in_saelens:
        raise BadInputError(f"{source}: SAELens does not know the architecture {sae.activation.architecture}")
    metadata = read_config(source)["metadata"] | {"artefact": name}
    if "model_name" in metadata and Path(metadata["model_name"]).is_absolute():
        metadata["model_name"] = Path(metadata["model_name"]).name  # a path means nothing to others
    place_sae(sae, target, metadata, card)


def place_sae(sae: SAE, target: Path, metadata: Mapping[str, Any], card: str | None = None) -> None:
    """Write an SAE into a folder of somebody's own, with a card as its README.md.

    A new folder appears whole. In an empty one that is there, the configuration comes last: without it, nothing is loaded.
    Raises BadInputError when `target` exists and is not an empty folder.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadInputError(f"{target} exists and is not an empty folder; name another one")
    if target.exists():  # a mount point, or the folder in which somebody works, cannot be replaced
        _write_with_card(sae, target, metadata, card)
        return
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".export-{target.name}-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):  # of an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=target.parent, prefix=prefix) as temporary:
        folder = Path(temporary) / "sae"
        folder.mkdir()
        _write_with_card(sae, folder, metadata, card)
        fsync(folder)
        folder.replace(target)
    fsync(target.parent)


def _write_with_card(sae: SAE, folder: Path, metadata: Mapping[str, Any], card: str | None) -> None:
    if card is not None:
        write_atomically(folder / CARD, card.encode())
    write_sae(sae, folder, metadata)
