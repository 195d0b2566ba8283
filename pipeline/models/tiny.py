"""Trains a small language model of Gemma-2's architecture, for studies that must not download anything."""

import math
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from pipeline.errors import BadInputError

# From there, because that module hides a broken torchvision before it imports transformers.
from pipeline.models.language import quiet_transformers, transformers
from pipeline.models.model_section import TinyModel
from pipeline.runtime.progress import progress
from pipeline.texts.packing import pack

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
"""Ids 0 to 3, as in Gemma's own tokenizer."""
PAD, EOS, BOS, UNK = range(4)

SHORTEST_CONTEXT = 128
"""Least number of positions of a model, even if it is trained on shorter sequences."""
HELDOUT = 0.02
"""Fraction of the sequences, the last ones, that the model is never trained on."""
WARMUP = 0.05
"""Fraction of the steps, the first ones, over which the learning rate rises from 0."""
AVERAGED_STEPS = 20
"""Steps over which the reported last loss is averaged."""


def train_tiny_model(config: TinyModel, texts: Iterable[str], context: int, folder: Path) -> dict[str, Any]:
    """Train a tokenizer and a model on the CPU and save both in `folder`, for `from_pretrained`.

    Equal arguments give equal files. The texts are packed as for extraction (`pipeline.texts.packing.pack`). Returns facts
    for the manifest, losses in nats per token. Raises BadInputError when the texts do not fill one batch.
    """
    started = time.monotonic()
    texts = list(texts)
    tokenizer = train_tokenizer(texts, config.vocabulary)
    wanted = config.steps * config.batch_size * context
    sequences_SL = torch.from_numpy(pack(texts, tokenizer, context=context, rows=wanted).tokens_SL).long()
    n_heldout = math.ceil(HELDOUT * len(sequences_SL))
    training_SL, heldout_SL = sequences_SL[:-n_heldout], sequences_SL[-n_heldout:]
    if len(training_SL) < config.batch_size:
        raise BadInputError(
            f"the corpus fills {len(training_SL)} training sequences of {context} tokens, "
            f"model.batch_size {config.batch_size} needs at least as many"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: transformers.Gemma2ForCausalLM = cast("Any", transformers.AutoModelForCausalLM).from_config(
            architecture(config, context), attn_implementation="eager"
        )
    losses = _optimize(model, training_SL, config)
    facts = {
        "parameters": model.num_parameters(),
        "tokens_seen": config.steps * config.batch_size * context,
        "first_loss": losses[0],
        "last_loss": statistics.fmean(losses[-AVERAGED_STEPS:]),
        "heldout_loss": _heldout_loss(model, heldout_SL, config.batch_size),
        "unigram_entropy": unigram_entropy(training_SL),
    }
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return facts | {"seconds": round(time.monotonic() - started, 1)}


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` entries that puts BOS before a text, as Gemma's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIALS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, BOS)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS[PAD],
        eos_token=SPECIALS[EOS],
        bos_token=SPECIALS[BOS],
        unk_token=SPECIALS[UNK],
        padding_side="right",
    )


def architecture(config: TinyModel, context: int) -> transformers.Gemma2Config:
    """A small Gemma-2: alternating sliding and full attention, grouped queries, both soft-caps, tied embeddings."""
    head_dim = config.d_in // 4
    return transformers.Gemma2Config(
        vocab_size=config.vocabulary,
        hidden_size=config.d_in,
        intermediate_size=3 * config.d_in,
        num_hidden_layers=config.depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=max(context, SHORTEST_CONTEXT),
        sliding_window=max(context, SHORTEST_CONTEXT) // 2,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        use_cache=False,
    )


def unigram_entropy(sequences_SL: Tensor) -> float:
    """Entropy of the tokens' frequencies in nats, without BOS: the loss of a model that knows only them."""
    counts = torch.bincount(sequences_SL[:, 1:].flatten()).double()
    frequencies = counts[counts > 0] / counts.sum()
    return -(frequencies * frequencies.log()).sum().item()


def _optimize(model: transformers.Gemma2ForCausalLM, training_SL: Tensor, config: TinyModel) -> list[float]:
    """Train in place; returns the loss of every step. Batches are drawn without replacement within an epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, round(WARMUP * config.steps))

    def scale(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        return min(1.0, (step + 1) / warmup) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    generator = torch.Generator().manual_seed(config.seed)
    batches_per_epoch = len(training_SL) // config.batch_size
    order = torch.empty(0, dtype=torch.long)
    losses: list[float] = []
    model.train()
    with progress("training the model", config.steps, "steps") as advance:
        for step in range(config.steps):
            batch = step % batches_per_epoch
            if batch == 0:
                order = torch.randperm(len(training_SL), generator=generator)
            rows = order[batch * config.batch_size : (batch + 1) * config.batch_size]
            loss = _loss(model, training_SL[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            advance(remark=f"loss {losses[-1]:.2f}")
    return losses


def _loss(model: transformers.Gemma2ForCausalLM, tokens_SL: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    logits_SLV = model(tokens_SL, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_SLV[:, :-1].flatten(0, 1), tokens_SL[:, 1:].flatten())


@torch.no_grad()
def _heldout_loss(model: transformers.Gemma2ForCausalLM, heldout_SL: Tensor, batch_size: int) -> float:
    model.eval()
    batches = torch.split(heldout_SL, batch_size)
    return sum(_loss(model, batch).item() * len(batch) for batch in batches) / len(heldout_SL)
