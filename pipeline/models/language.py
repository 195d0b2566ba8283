"""Opens language models of transformers: cut above the deepest hook for extraction, or whole for measuring the loss."""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.errors import BadInputError, ModelAccessError, in_one_line
from pipeline.runtime.compatibility import avoid_broken_torchvision, errors_are_not_absence
from pipeline.runtime.devices import best_device

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

NOISE = 0.02
"""Share of the residual stream's norm that rounding may change: bfloat16 rounds to 1/256, experts differ in batch sizes."""

avoid_broken_torchvision()
import transformers  # noqa: E402


class ResidualStream:
    """A decoder-only model cut above its deepest hook. Calling it with tokens returns the residual stream after each layer.

    Hooks are on the layers themselves, because the last of transformers' `hidden_states` is already normalised. Raises
    ModelAccessError for a model that cannot be loaded and BadInputError for a model without these layers.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        layers: tuple[int, ...],
        dtype: str,
        device: torch.device | None = None,
    ):
        self.name, self.layers, self.device = model, layers, device or best_device()
        self.tokenizer = load_tokenizer(model, revision)
        config = _load_config(model, revision)
        self.depth: int = config.num_hidden_layers
        if max(layers) >= self.depth:
            raise BadInputError(f"store.layers: layer {max(layers)} does not exist, {model} has 0 to {self.depth - 1}")
        self.d_in: int = config.hidden_size
        cut = _cut(config, max(layers) + 1)
        self.model = _load_weights(transformers.AutoModel, model, revision, cut, DTYPES[dtype]).to(self.device)
        self._layers = _find_layers(self.model, model, max(layers) + 1)
        self._check_causal()

    @torch.no_grad()
    def __call__(self, tokens_SL: torch.Tensor) -> dict[int, torch.Tensor]:
        """Residual stream [S, L, D] after each of the layers, on the model's device.

        Padding on the right needs no mask, because attention is causal. Raises BadInputError for sequences longer than the
        model has positions.
        """
        self.check_context(tokens_SL.shape[1])
        outputs: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                # The layers of some models (GPT-J, OpenAI-GPT) return a tuple or list that begins with the residual stream.
                outputs[layer] = output[0] if isinstance(output, tuple | list) else output

            return hook

        handles = [self._layers[layer].register_forward_hook(keep(layer)) for layer in self.layers]
        try:
            self.model(input_ids=tokens_SL.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def _check_causal(self) -> None:
        """Raise BadInputError if a later token changes what the model makes of an earlier one, as in an encoder."""
        try:
            one, other = (self(torch.tensor([[1, 2, 3, last]])) for last in (4, 5))
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
            # Architectures differ in what they take and in what their layers return.
            raise BadInputError(f"{self.name} cannot be read layer by layer: {in_one_line(error)}") from error
        for layer in self.layers:
            before, after = one[layer][:, :3].float(), other[layer][:, :3].float()
            if (before - after).norm() > NOISE * before.norm():
                raise BadInputError(f"{self.name} is not a decoder-only language model: its layers look at later tokens")

    def check_context(self, context: int) -> None:
        """Raise BadInputError for sequences longer than the model has positions."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions and context > positions:
            raise BadInputError(
                f"{self.name} has {positions} positions, fewer than a context of {context}: "
                "lower store.context or probes.context"
            )


class LanguageModel:
    """A whole decoder-only model whose residual stream can be replaced after one layer.

    Raises ModelAccessError for a model that cannot be loaded.
    """

    def __init__(self, model: str, *, revision: str | None = None, dtype: str, device: torch.device | None = None):
        self.device = device or best_device()
        config = _load_config(model, revision)
        causal = transformers.AutoModelForCausalLM
        self.model = _load_weights(causal, model, revision, config, DTYPES[dtype]).to(self.device)
        self._layers = _find_layers(self.model, model, config.num_hidden_layers)

    @torch.no_grad()
    def next_token_loss(
        self, tokens_SL: torch.Tensor, layer: int, replace: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Cross-entropy [S, L - 1] in nats of every token after the first, float32, on the CPU.

        `replace` maps the residual stream [S, L, D] after the layer to what the rest of the model reads instead.
        """
        tokens_SL = tokens_SL.to(self.device)

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return replace(output)
            return replace(output[0]), *output[1:]

        handle = self._layers[layer].register_forward_hook(hook)
        try:
            logits_SLV = self.model(input_ids=tokens_SL, use_cache=False).logits[:, :-1]
        finally:
            handle.remove()
        return torch.nn.functional.cross_entropy(
            logits_SLV.transpose(1, 2).float(), tokens_SL[:, 1:], reduction="none"
        ).cpu()


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The tokenizer of a model. Raises ModelAccessError if it cannot be loaded."""
    with _loading(f"the tokenizer of {model}"):
        tokenizer = _from_pretrained(transformers.AutoTokenizer, model, revision=revision)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # some classes load without their files
        raise ModelAccessError(f"the tokenizer of {model} has no vocabulary: its files are missing")
    # Texts are cut after they are tokenized; with a limit, the tokenizer would warn of every long text.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def _cut(config: Any, depth: int) -> Any:
    """The configuration, changed to the first `depth` layers: the layers above are neither loaded nor run."""
    try:
        config.num_hidden_layers = depth
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:depth]
    except AttributeError:  # recurrent and mixed models derive the kinds of their layers
        raise BadInputError(f"a {config.model_type} model cannot be cut after a layer; use a transformer") from None
    return config


def _load_config(model: str, revision: str | None) -> Any:
    with _loading(f"the configuration of {model}"):
        config = _from_pretrained(transformers.AutoConfig, model, revision=revision)
    if not getattr(config, "num_hidden_layers", 0) or config.is_encoder_decoder:
        raise BadInputError(f"{model} ({config.model_type}) is not a decoder-only language model")
    return config


def _load_weights(kind: Any, model: str, revision: str | None, config: Any, dtype: torch.dtype) -> Any:
    with _loading(f"the weights of {model}"):
        loaded, report = _from_pretrained(
            kind,
            model,
            revision=revision,
            config=config,
            dtype=dtype,
            # Gemma-2 caps its attention scores; the fused kernels do not.
            attn_implementation="eager" if getattr(config, "attn_logit_softcapping", None) else None,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # the report names them, the exception would not
            output_loading_info=True,
        )
    # transformers fills missing weights with random numbers.
    if unfit := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise ModelAccessError(
            f"the weights of {model} do not fit its configuration: {unfit[0]} is missing or has another shape"
            + (f", and so are {len(unfit) - 1} more" if len(unfit) > 1 else "")
        )
    return loaded.eval()


def _from_pretrained(kind: Any, model: str, **options: Any) -> Any:
    """Call an auto class of transformers, whose results have no static type."""
    return kind.from_pretrained(model, **options)


def _find_layers(module: torch.nn.Module, model: str, depth: int) -> torch.nn.ModuleList:
    """The model's list of `depth` layers, which every architecture names differently."""
    found = [layers for layers in _outermost_lists(module) if len(layers) == depth]
    if len(found) != 1:
        raise BadInputError(f"{model} ({type(module).__name__}) has {len(found)} lists of layers where one was expected")
    return found[0]


def _outermost_lists(module: torch.nn.Module) -> Iterator[torch.nn.ModuleList]:
    """Module lists that are not inside another one, unlike the list of a layer's experts."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


@contextmanager
def _loading(what: str) -> Generator[None]:
    """Load quietly; raise ModelAccessError, in one line, for whatever goes wrong."""
    try:
        with quiet_transformers(), errors_are_not_absence():
            yield
    except Exception as error:  # tokenizers raises plain Exception
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelAccessError(f"{what} cannot be loaded: {reason}") from error


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Silence transformers' progress bars and its report of weights that were left out on purpose."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
