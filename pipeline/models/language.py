"""A language model of transformers: up to its deepest hook for extraction, or whole, with its residual stream replaced.

Shapes: S sequences, L tokens, D d_in, V entries of the vocabulary.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.errors import BadInputError, ModelAccessError
from pipeline.runtime.compatibility import avoid_broken_torchvision
from pipeline.runtime.devices import best_device

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

avoid_broken_torchvision()
import transformers  # noqa: E402


class ResidualStream:
    """A decoder-only model cut above its deepest hook. Call it with tokens, get the residual stream after each layer.

    Hooks stand on the layers themselves: transformers' `hidden_states` of a last layer is already normalised. Raises
    ModelAccessError for a model that cannot be loaded and BadInputError for one without these layers.
    """

    def __init__(self, model: str, *, revision: str | None = None, layers: tuple[int, ...], dtype: str):
        self.name, self.layers, self.device = model, layers, best_device()
        self.tokenizer = load_tokenizer(model, revision)
        config = _load_config(model, revision)
        self.depth: int = config.num_hidden_layers
        if max(layers) >= self.depth:
            raise BadInputError(f"store.layers: layer {max(layers)} does not exist, {model} has 0 to {self.depth - 1}")
        self.d_in: int = config.hidden_size
        cut = _cut(config, max(layers) + 1)
        self.model = _load_weights(transformers.AutoModel, model, revision, cut, DTYPES[dtype]).to(self.device)
        self._layers = _find_layers(self.model, model, max(layers) + 1)

    @torch.no_grad()
    def __call__(self, tokens_SL: torch.Tensor) -> dict[int, torch.Tensor]:
        """Residual stream [S, L, D] after each of the layers, on the model's device.

        Attention is causal, so padding on the right changes nothing to its left and needs no mask. Raises BadInputError
        for sequences longer than the model has positions.
        """
        self.check_context(tokens_SL.shape[1])
        outputs: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                # Some models' layers (GPT-J, BLOOM) return a tuple, the others a tensor, of which [0] would be one sequence.
                outputs[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self._layers[layer].register_forward_hook(keep(layer)) for layer in self.layers]
        try:
            self.model(input_ids=tokens_SL.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def check_context(self, context: int) -> None:
        """Raises BadInputError for sequences longer than the model has positions."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions and context > positions:
            raise BadInputError(
                f"{self.name} has {positions} positions, fewer than a context of {context}: "
                "lower store.context or probes.context"
            )


class LanguageModel:
    """A whole decoder-only model, whose residual stream can be replaced after one layer.

    Raises ModelAccessError for a model that cannot be loaded.
    """

    def __init__(self, model: str, *, revision: str | None = None, dtype: str):
        self.device = best_device()
        config = _load_config(model, revision)
        causal = transformers.AutoModelForCausalLM
        self.model = _load_weights(causal, model, revision, config, DTYPES[dtype]).to(self.device)
        self._layers = _find_layers(self.model, model, config.num_hidden_layers)

    @torch.no_grad()
    def next_token_loss(
        self, tokens_SL: torch.Tensor, layer: int, replace: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Cross-entropy [S, L - 1] of every token after the first, in nats, float32, on the CPU.

        `replace` gets the residual stream [S, L, D] after the layer and returns what the rest of the model reads instead.
        """
        tokens_SL = tokens_SL.to(self.device)

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return replace(output[0]), *output[1:]
            return replace(output)

        handle = self._layers[layer].register_forward_hook(hook)
        try:
            logits_SLV = self.model(input_ids=tokens_SL, use_cache=False).logits[:, :-1]
        finally:
            handle.remove()
        return torch.nn.functional.cross_entropy(
            logits_SLV.transpose(1, 2).float(), tokens_SL[:, 1:], reduction="none"
        ).cpu()


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The tokenizer of a model. Raises ModelAccessError when it cannot be loaded."""
    with _loading(f"the tokenizer of {model}"):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, revision=revision)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what some classes make of missing files
        raise ModelAccessError(f"the tokenizer of {model} has no vocabulary: its files are missing")
    # Texts are cut after they are tokenized; until then the tokenizer would warn of every long one.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def _cut(config: Any, depth: int) -> Any:
    """The configuration of a model of the first `depth` layers: what lies above is neither loaded nor run."""
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    return config


def _load_config(model: str, revision: str | None) -> Any:
    with _loading(f"the configuration of {model}"):
        config: Any = transformers.AutoConfig.from_pretrained(model, revision=revision)
    if not getattr(config, "num_hidden_layers", 0) or config.is_encoder_decoder:
        raise BadInputError(f"{model} ({config.model_type}) is not a decoder-only language model")
    return config


def _load_weights(kind: Any, model: str, revision: str | None, config: Any, dtype: torch.dtype) -> Any:
    with _loading(f"the weights of {model}"):
        loaded, report = kind.from_pretrained(
            model,
            revision=revision,
            config=config,
            dtype=dtype,
            # Gemma-2 caps its attention scores, which the fused kernels leave out.
            attn_implementation="eager" if getattr(config, "attn_logit_softcapping", None) else None,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report, which is more than the exception says
            output_loading_info=True,
        )
    # transformers fills such weights with random numbers.
    if unfit := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise ModelAccessError(
            f"the weights of {model} do not fit its configuration: {unfit[0]} is missing or has another shape"
            + (f", and so are {len(unfit) - 1} more" if len(unfit) > 1 else "")
        )
    return loaded.eval()


def _find_layers(module: torch.nn.Module, model: str, depth: int) -> torch.nn.ModuleList:
    """The one list of `depth` layers, under whatever name the architecture has for it."""
    found = [layers for layers in _outermost_lists(module) if len(layers) == depth]
    if len(found) != 1:
        raise BadInputError(f"{model} ({type(module).__name__}) has {len(found)} lists of layers where one was expected")
    return found[0]


def _outermost_lists(module: torch.nn.Module) -> Iterator[torch.nn.ModuleList]:
    """Module lists that lie in no other one, as the experts of a layer do."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Load something quietly, or say in one line that it cannot be loaded."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:  # tokenizers raises no narrower class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelAccessError(f"{what} cannot be loaded: {reason}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars and its report of weights that were left out on purpose."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
