"""Opens a study's language model as the HookedTransformer of TransformerLens, which sae-bench's evaluations run on."""

import warnings
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.errors import BadInputError
from pipeline.models.language import DTYPES, LanguageModel, load_tokenizer


def hooked_model(model: str, *, revision: str | None, dtype: str, device: torch.device) -> Any:
    """The model with the weights of its files, nothing folded or centred.

    `model` is a folder or a repository of the Hub. Raises ModelAccessError for one that cannot be loaded, and BadInputError
    for one that TransformerLens has no form for.
    """
    theirs = LanguageModel(model, revision=revision, dtype=dtype, device=torch.device("cpu")).model
    tokenizer = load_tokenizer(model, revision)
    form = _gemma_2 if theirs.config.model_type == "gemma2" else _by_name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # sae-bench is written for this class
        return form(model, theirs, tokenizer, dtype, device)


def _by_name(model: str, theirs: Any, tokenizer: Any, dtype: str, device: torch.device) -> Any:
    """A model of another architecture. TransformerLens takes its form from its name."""
    from transformer_lens import HookedTransformer  # late: it takes seconds to import, and only some studies use it
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        get_official_model_name(model)
    except ValueError:  # its text lists every name
        raise BadInputError(
            f"TransformerLens has no form for {model}, and sae-bench needs one: "
            "use a Gemma-2, or a model that it knows by name"
        ) from None
    return HookedTransformer.from_pretrained_no_processing(
        model, hf_model=theirs, tokenizer=tokenizer, dtype=DTYPES[dtype], device=device
    )


def _gemma_2(model: str, theirs: Any, tokenizer: Any, dtype: str, device: torch.device) -> Any:
    """A Gemma-2 of any size. TransformerLens knows this architecture by the names of Google's models alone."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import gemma

    config = theirs.config
    ours = HookedTransformerConfig(
        model_name=Path(model).name,
        original_architecture="Gemma2ForCausalLM",
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        act_fn=config.hidden_activation,
        normalization_type="RMS",
        final_rms=True,
        use_normalization_before_and_after=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_base=config.rope_parameters["rope_theta"],
        rotary_dim=config.head_dim,
        use_attn_scale=True,
        attn_scale=config.query_pre_attn_scalar**0.5,
        use_local_attn=True,
        window_size=config.sliding_window,
        attn_types=["local" if kind.startswith("sliding") else "global" for kind in config.layer_types],
        attn_scores_soft_cap=config.attn_logit_softcapping,
        output_logits_soft_cap=config.final_logit_softcapping,
        dtype=DTYPES[dtype],
        device=str(device),
        init_weights=False,
        default_prepend_bos=True,
    )
    hooked = HookedTransformer(ours, tokenizer=tokenizer)
    with torch.no_grad():
        weights = cast("Any", gemma).convert_gemma_weights(theirs, ours)
    as_they_are = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    hooked.load_and_process_state_dict(weights, refactor_factored_attn_matrices=False, **dict.fromkeys(as_they_are, False))
    return hooked.to(device).to(DTYPES[dtype]).eval()
