"""Reads SAEs that SAELens and `dictionary_learning` wrote, as the same functions in our form."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.errors import BadInputError, ModelAccessError, in_one_line
from pipeline.models.access import reaching
from pipeline.runtime.compatibility import files_of_commit, importing_sae_bench
from pipeline.runtime.linalg import vector_norm
from pipeline.sae.activation import Activation
from pipeline.sae.activations import RELU
from pipeline.sae.formats import CONFIG, WEIGHTS
from pipeline.sae.gated import Gated
from pipeline.sae.jumprelu import JumpReLU
from pipeline.sae.sae import SAE
from pipeline.sae.topk import TopK

READ = ("standard", "topk", "jumprelu", "gated")
"""SAELens' architectures that have a form here. BatchTopK and Matryoshka SAEs are finished as jumprelu."""
HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_post")
UNIT = 1e-3
"""How far from 1 decoder norms may be for an SAE whose selection depends on them."""

Tensors = Mapping[str, torch.Tensor]


def check_place(metadata: Mapping[str, Any], folder: Path | str, layer: int, model: str) -> None:
    """Raise BadInputError where an SAE's metadata name another place than the residual stream after `layer` of `model`."""
    hook, trained_on = metadata.get("hook_name"), metadata.get("model_name")
    found = HOOK.fullmatch(str(hook))
    if hook and not found:
        raise BadInputError(f"{folder} reads {hook}, not the residual stream after a layer; remove it")
    if found and int(found[1]) != layer:
        raise BadInputError(f"{folder} was trained on layer {found[1]}, not on layer {layer}; set layer = {found[1]}")
    if trained_on and Path(str(trained_on)).name.lower() != Path(model).name.lower():
        raise BadInputError(f"{folder} was trained on {trained_on}, the study's model is {model}; remove it")


def from_saelens(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """The SAE in a folder of SAELens' format, by SAELens' own loader, and its metadata.

    Raises BadInputError for one that cannot be read, or whose architecture has no form here.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise BadInputError(f"{folder} has no {name}: it is no SAE in SAELens' format")
    with importing_sae_bench():
        import sae_lens
    try:
        theirs = cast("Any", sae_lens.SAE).load_from_disk(str(folder), device="cpu", dtype="float32")
    except Exception as error:  # whatever SAELens, safetensors or a configuration come up with
        raise BadInputError(f"{folder} cannot be read by SAELens: {type(error).__name__}: {in_one_line(error)}") from None
    return _from(theirs, str(folder))


def from_registry(release: str, sae_id: str, revision: str) -> tuple[SAE, dict[str, Any]]:
    """An SAE that SAELens knows by name, from that commit of its repository, and its metadata.

    Raises ModelAccessError, which says why it cannot be had, and what `from_saelens` does.
    """
    with importing_sae_bench():
        import sae_lens
        from sae_lens.loading import pretrained_sae_loaders
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    where, repository = f"{release}/{sae_id}", get_pretrained_saes_directory()[release].repo_id
    try:
        with reaching(repository, revision, "SAE"), files_of_commit(pretrained_sae_loaders, revision):
            theirs = cast("Any", sae_lens.SAE).from_pretrained(release, sae_id, device="cpu", dtype="float32")
    except ModelAccessError:
        raise
    except Exception as error:
        raise BadInputError(f"{where} cannot be read by SAELens: {type(error).__name__}: {in_one_line(error)}") from None
    return _from(theirs, where)


def _from(theirs: Any, where: str) -> tuple[SAE, dict[str, Any]]:
    """An SAE of SAELens in our form, and its metadata."""
    config = theirs.cfg
    for field in ("normalize_activations", "reshape_activations"):
        if getattr(config, field) != "none":
            raise BadInputError(
                f"{where}: {field} {getattr(config, field)!r} changes rows before they are encoded; remove it"
            )
    architecture = str(config.architecture())
    tensors = {name: tensor.detach() for name, tensor in theirs.named_parameters()}
    if architecture not in READ:
        raise BadInputError(f"{where}: no form for the architecture {architecture!r}; {', '.join(READ)} have one")
    activation: Activation = RELU
    if architecture == "topk":
        activation = TopK(int(config.k))
        if not config.rescale_acts_by_decoder_norm:
            _check_norms(tensors["W_dec"], where)
    if architecture == "jumprelu":
        activation = JumpReLU(tensors["threshold"])
    centred = bool(config.apply_b_dec_to_input)
    if architecture == "gated":
        shift_F = 0.0 if centred else tensors["b_dec"] @ tensors["W_enc"]
        tensors["b_enc"] = tensors["b_gate"]
        magnitude_F = tensors["b_mag"] + shift_F * tensors["r_mag"].exp()
        activation = Gated(tensors["b_gate"] + shift_F, tensors["r_mag"], magnitude_F)
    metadata = {name: value for name, value in config.metadata.to_dict().items() if isinstance(value, str | int | float)}
    return _folded(tensors, activation, centred=centred), metadata


def from_dictionary_learning(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """The SAE in a folder with `ae.pt`, of which only tensors are unpickled, and `config.json`; and metadata of its place.

    Raises BadInputError for what is no such folder, and for dictionaries that have no form here.
    """
    config = _trainer_config(folder)
    kind = str(config.get("dict_class"))
    if kind not in KINDS:
        raise BadInputError(f"{folder}: no form for the dictionary {kind!r}; {', '.join(KINDS)} have one")
    try:
        state: Any = torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)
        found = {OURS.get(name, name): tensor for name, tensor in cast("dict[str, torch.Tensor]", state).items()}
        tensors = {name: tensor.detach().float() for name, tensor in found.items()}
        if "encoder.weight" in state:  # of torch.nn.Linear, which has outputs first
            tensors |= {name: tensors[name].T.contiguous() for name in ("W_enc", "W_dec")}
        sae = KINDS[kind](tensors, folder)
    except BadInputError:
        raise
    except Exception as error:  # torch names no class for what it refuses to unpickle
        raise BadInputError(
            f"{folder / 'ae.pt'} is not the state of {kind} in tensors alone: {in_one_line(error)}"
        ) from None
    metadata = {"model_name": config["lm_name"]} if config.get("lm_name") else {}
    if "resid_post" in str(config.get("submodule_name")):
        metadata["hook_name"] = f"blocks.{config['layer']}.hook_resid_post"
    return sae, metadata


def _trainer_config(folder: Path) -> dict[str, Any]:
    for name in ("ae.pt", "config.json"):
        if not (folder / name).is_file():
            raise BadInputError(f"{folder} has no {name}: it is no dictionary of dictionary_learning")
    try:
        return cast("dict[str, Any]", json.loads((folder / "config.json").read_text(encoding="utf-8"))["trainer"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{folder / 'config.json'} says nothing of a trainer: {in_one_line(error)}") from None


def _vanilla(tensors: Tensors, _: Path) -> SAE:
    return _folded(tensors, RELU, centred=True)


def _topk(tensors: Tensors, folder: Path) -> SAE:
    _check_norms(tensors["W_dec"], folder)
    return _folded(tensors, TopK(int(tensors["k"])), centred=True)


def _batchtopk(tensors: Tensors, folder: Path) -> SAE:
    if float(tensors["threshold"]) < 0:
        raise BadInputError(f"{folder} has no threshold yet: it was trained for too few steps")
    return _folded(tensors, JumpReLU(tensors["threshold"].expand(len(tensors["W_dec"])).clone()), centred=True)


def _jumprelu(tensors: Tensors, _: Path) -> SAE:
    return _folded(tensors, JumpReLU(tensors["threshold"]), centred=False)


OURS = {
    "bias": "b_dec",
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
}
"""Names of the tensors of dictionaries that are made of linear layers."""
KINDS: dict[str, Callable[[Tensors, Path], SAE]] = {
    "AutoEncoder": _vanilla,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _batchtopk,
    "JumpReluAutoEncoder": _jumprelu,
}
"""By the name of `dictionary_learning`'s class."""


def _check_norms(W_dec_FD: torch.Tensor, folder: Path | str) -> None:
    """Raise BadInputError where folding decoder norms would change which latents are selected."""
    off = float((vector_norm(W_dec_FD, dim=1) - 1).abs().max())
    if off > UNIT:
        raise BadInputError(
            f"{folder}: TopK selects by latents, and decoder norms are up to {off:.2g} off 1; it has no form here"
        )


def _folded(tensors: Tensors, activation: Activation, *, centred: bool) -> SAE:
    """With decoder rows of norm 1. `centred`: b_dec is subtracted before the encoder, as ours is."""
    W_enc_DF, b_enc_F = tensors["W_enc"], tensors["b_enc"]
    return SAE.folded(
        W_enc_DF=W_enc_DF,
        b_enc_F=b_enc_F if centred else b_enc_F + tensors["b_dec"] @ W_enc_DF,
        W_dec_FD=tensors["W_dec"],
        b_dec_D=tensors["b_dec"],
        scale=1.0,
        activation=activation,
    )
