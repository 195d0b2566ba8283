"""The language model up to its deepest hook: residual-stream activations of several layers in one forward pass.

Shapes: S sequences, L tokens, D d_in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.compatibility import avoid_broken_torchvision
from pipeline.errors import BadInputError, ModelAccessError
from pipeline.experiment import HuggingFaceModel

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


avoid_broken_torchvision()
import transformers  # noqa: E402


class ResidualStream:
    """A decoder-only model cut above its deepest hook. Call it with tokens, get the residual stream after each layer.

    Hooks stand on the layers themselves: transformers' `hidden_states` of a last layer is already normalised.
    """

    def __init__(self, model: str, *, revision: str | None = None, layers: tuple[int, ...], dtype: str):
        self.layers = layers
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with quiet_transformers():
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, revision=revision)
            config = transformers.AutoConfig.from_pretrained(model, revision=revision)
            self.depth: int = config.num_hidden_layers
            if max(layers) >= self.depth:
                raise BadInputError(f"store.layers: layer {max(layers)} does not exist, {model} has 0 to {self.depth - 1}")
            # Layers above the deepest hook are neither loaded nor run.
            config.num_hidden_layers = max(layers) + 1
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[: config.num_hidden_layers]
            self.model: Any = transformers.AutoModel.from_pretrained(
                model,
                revision=revision,
                config=config,
                dtype=DTYPES[dtype],
                # Gemma-2 caps its attention scores, which transformers' fused kernels leave out.
                attn_implementation="eager",
            )
        self.model.eval().to(self.device)
        self.d_in: int = config.hidden_size

    @torch.no_grad()
    def __call__(self, tokens_SL: torch.Tensor) -> dict[int, torch.Tensor]:
        """Residual stream [S, L, D] after each of the layers, on the model's device.

        Attention is causal, so padding on the right changes nothing to its left and needs no mask.
        """
        outputs: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                # transformers 4 returns a tuple, 5 the tensor itself, of which [0] would be the first sequence.
                outputs[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.model.layers[layer].register_forward_hook(keep(layer)) for layer in self.layers]
        try:
            self.model(input_ids=tokens_SL.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return outputs


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars and its report of weights that were left out on purpose."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def open_model(config: HuggingFaceModel, layers: tuple[int, ...]) -> ResidualStream:
    """Load a model from the Hub or a folder, up to its deepest layer wanted.

    Raises ModelAccessError, which tells a missing login from a licence that was not accepted, and BadInputError when the
    model is not as the experiment declares it.
    """
    if not Path(config.name).is_dir():
        check_access(config.name, config.revision)
    model = ResidualStream(config.name, revision=config.revision, layers=layers, dtype=config.dtype)
    if (model.d_in, model.depth) != (config.d_in, config.depth):
        raise BadInputError(
            f"model: {config.name} has d_in {model.d_in} and depth {model.depth}, "
            f"the experiment declares d_in {config.d_in} and depth {config.depth}"
        )
    return model


def check_access(name: str, revision: str | None) -> None:
    """Fetch the model's config.json, and say in one line why that is not possible."""
    from huggingface_hub import errors as hub
    from huggingface_hub import get_token, hf_hub_download

    try:
        hf_hub_download(name, "config.json", revision=revision)
    except hub.GatedRepoError as error:
        if error.response.status_code == 401:  # nobody, or a token that the Hub does not know; 403 is a known account
            who = "the Hugging Face token is not valid" if get_token() else "not logged in to Hugging Face"
            problem = f"{who}, and {name} is gated: run `hf auth login`, or set HF_TOKEN"
        else:
            problem = (
                f"logged in, but this account has not accepted the licence of {name}: accept it on the model's page "
                f"(huggingface.co/{name}) and run the same command again"
            )
        raise ModelAccessError(problem) from None
    except hub.RevisionNotFoundError:
        raise ModelAccessError(f"model {name} has no revision {revision!r}") from None
    except hub.RepositoryNotFoundError:
        raise ModelAccessError(f"model {name!r} is neither a folder nor a repository that this account can see") from None
    except hub.HFValidationError:
        raise ModelAccessError(f"model {name!r} is neither a folder nor a repository name") from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        raise ModelAccessError(
            f"model {name} is not in the local cache, and the Hugging Face Hub cannot be reached"
        ) from None
