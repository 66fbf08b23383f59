"""OLMo 2: LLaMA with norms on what is added, and on queries and keys (OLMo Team
2025, section 3.1).

  q, k = RMSNorm(W_q x), RMSNorm(W_k x)   over all heads, then turned
  a    = x + RMSNorm(Attention(x))
  x'   = a + RMSNorm(W_down (silu(W_gate a) * W_up a))
  logits = RMSNorm(x_N) W                 a matrix of its own; no bias anywhere

Nothing is normalised before attention or the network.
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder


class OLMo2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', norm='rmsnorm', block='out_norm',
               attention='global', attention_bias=False, qk_norm=True,
               qk_norm_over='projection', ffn='swiglu', ffn_bias=False,
               tie_embeddings=False)


def _read(reader: hf.Reader, fields: dict) -> dict:
  return dict(rope=rope_fields.read(reader))


def _write(c: ModelConfig) -> dict:
  return dict(rope_parameters=rope_fields.write(c))


# Those of OLMo 3 too.
NAMES = (
    ('embed/tokens', 'VD', 'model.embed_tokens.weight', 'V D'),
    *hf.under(
        'decoder/layers', 'model.layers.{n}', *llama.ATTENTION,
        ('attention/query_norm/scale', 'U', 'self_attn.q_norm.weight', 'U'),
        ('attention/key_norm/scale', 'U', 'self_attn.k_norm.weight', 'U'),
        ('attention_out_norm/scale', 'D', 'post_attention_layernorm.weight',
         'D'),
        ('ffn_out_norm/scale', 'D', 'post_feedforward_layernorm.weight', 'D')),
    *llama.FFN,
    ('decoder/final_norm/scale', 'D', 'model.norm.weight', 'D'),
    ('head/kernel', 'DV', 'lm_head.weight', 'V D'))

HF = hf.HuggingFace(
    'olmo2', 'Olmo2ForCausalLM', names=NAMES,
    fields={name: row for name, row in llama.HF.fields.items()
            if name != 'ffn_bias'} | {
        'vocab_size': ('vocab_size', 50304),
        'norm_eps': ('rms_norm_eps', 1e-5)},
    read=_read, write=_write, tied=llama.HF.tied, spellings=llama.HF.spellings,
    ignored=llama.HF.ignored,
    heads={'sequence': hf.TaskHead('Olmo2ForSequenceClassification', 'score')})
