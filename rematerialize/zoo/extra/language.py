"""Language models of transformers, in train mode with their default dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rematerialize.zoo.spec import Made, Scale

LAYERS = {"test": 4, "bench": 8}
WIDTH = {"test": 128, "bench": 256}
BATCH = {"test": 2, "bench": 4}
TOKENS = {"test": 128, "bench": 256}
VOCABULARY = 512
HEADS = 4


def _ready(model: nn.Module, scale: Scale, **more: Any) -> Made:
    """Put the model into train mode and give it text with labels."""
    tokens = torch.randint(VOCABULARY, (BATCH[scale], TOKENS[scale]))
    return model.train(), {"input_ids": tokens, "labels": tokens.clone(), **more}


def llama(scale: Scale = "test") -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH[scale],
        intermediate_size=3 * WIDTH[scale],
        num_hidden_layers=LAYERS[scale],
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=TOKENS[scale],
        use_cache=False,
    )
    return _ready(LlamaForCausalLM(config), scale)


def gpt2(scale: Scale = "test") -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=TOKENS[scale],
        n_embd=WIDTH[scale],
        n_layer=LAYERS[scale],
        n_head=HEADS,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return _ready(GPT2LMHeadModel(config), scale)


def bert_mlm(scale: Scale = "test") -> Made:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH[scale] // 2,
        num_hidden_layers=LAYERS[scale],
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH[scale],
        max_position_embeddings=TOKENS[scale],
    )
    mask = torch.ones(BATCH[scale], TOKENS[scale], dtype=torch.long)
    mask[0, -TOKENS[scale] // 4 :] = 0
    return _ready(BertForMaskedLM(config), scale, attention_mask=mask)


def t5(scale: Scale = "test") -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH[scale] // 2,
        d_kv=WIDTH[scale] // 8,
        d_ff=2 * WIDTH[scale],
        num_layers=LAYERS[scale] // 2,
        num_heads=HEADS,
        use_cache=False,
    )
    config.decoder_start_token_id = 0
    return _ready(T5ForConditionalGeneration(config), scale)


def mixtral(scale: Scale = "test") -> Made:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH[scale] // 2,
        intermediate_size=WIDTH[scale],
        num_hidden_layers=LAYERS[scale] // 2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        num_local_experts=4,
        max_position_embeddings=TOKENS[scale],
        use_cache=False,
    )
    return _ready(MixtralForCausalLM(config), scale)


def mamba(scale: Scale = "test") -> Made:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH[scale] // 2,
        state_size=8,
        num_hidden_layers=LAYERS[scale] // 2,
        use_cache=False,
    )
    # The plain-torch scan runs token by token: shorter text keeps its graph at some hundred ops.
    tokens = torch.randint(VOCABULARY, (BATCH[scale], TOKENS[scale] // 4))
    return MambaForCausalLM(config).train(), {"input_ids": tokens, "labels": tokens.clone()}
