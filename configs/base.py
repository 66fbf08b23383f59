"""Every default of a run, and how a config file parses its ':size' argument.

A config file under configs/ starts from `base()` and changes what its paper
says. Whatever a run does is printed by its config: no default hides in code.
0 or '' in a field that says 'derived' means: worked out from the other fields.
"""

import difflib

import ml_collections

from configs.errors import RequestError

# No float of a config is larger: float32 ends at 3.4e38, and what is computed
# of it should be finite too.
MOST_FLOAT = 1e30


def base() -> ml_collections.ConfigDict:
  """Returns a config with every field of a run at its default."""
  return ml_collections.ConfigDict(dict(
      seed=0,
      # What is learned: causal, prefix, chat, mlm, mlm_nsp, span, seq2seq.
      objective='causal',
      # A Hugging Face folder or a workdir whose weights the run starts from.
      init_from='',
      init_partial=False,  # take what fits; list each skipped tensor
      # span: the share of tokens that is cut out, in spans of this mean.
      span=dict(noise_density=0.15, mean_length=3.0),
      model=_model(),
      data=dict(
          # sotu | text:GLOB | jsonl:GLOB:FIELD | parquet:GLOB:FIELD |
          # arrayrecord:GLOB | hf:NAME | parallel:GLOB (seq2seq) |
          # alpaca:GLOB (chat); several, weighted: '0.7*A,0.3*B'.
          source='sotu',
          # '': what is held out of `source`. The loss of a mixture is the mean
          # of its sources' own by weight.
          eval_source='',
          # n: every n-th document is held out of training; of a single text
          # file, its last n-th part. 0: nothing.
          holdout_every=20,
          # bytes | bytes:N (in N ids) | a tokenizer.json | a folder | a .model
          tokenizer='bytes',
          length=256,  # tokens a sequence (of the source, with seq2seq)
          target_length=0,  # seq2seq; derived: length
          batch_size=32,  # global, in sequences
          document_mask=False,  # attention and positions stop at documents
          cache_dir='',  # '': $ARCHETYPE_CACHE, else ~/.cache/archetype
          # Of chat. published: Vicuna's v1.1, of alpaca: Alpaca's. earlier:
          # as runs began before this field was there.
          chat_template='published',
          mask_rate=0.15,  # of the tokens that mlm and mlm_nsp mask
          whole_words=False,  # ... all tokens of a word, or none
          workers=0,  # processes that prepare batches; 0: threads
          tokenize_workers=0,  # 0: one per CPU core
      ),
      train=dict(
          steps=1000,
          grad_accumulation=1,
          max_bad_steps=10,  # non-finite steps in a row before the run ends
          z_loss=0.0,
          label_smoothing=0.0,
          loss_chunk=0,  # tokens whose logits are held at once; 0: by size
      ),
      optim=dict(
          name='adamw',  # adamw adafactor lion muon sgd
          lr=1e-3,
          schedule='cosine',  # cosine linear rsqrt wsd constant
          warmup_steps=100,
          final_fraction=0.1,  # of lr, at the end of the schedule
          decay_steps=0,  # cosine, linear: arrive there; 0: at train.steps
          decay_fraction=0.2,  # wsd: the share of steps that decay
          weight_decay=0.1,
          # Patterns over parameter paths, first match wins: 1 decays, 0 not.
          # Empty: matrices decay; embeddings, norms and biases do not.
          decay_mask=(),
          clip_norm=1.0,  # 0: no clipping
          b1=0.9,
          b2=0.95,
          eps=1e-8,
          momentum=0.9,  # sgd, muon
      ),
      mesh=dict(data=-1, fsdp=1, expert=1, context=1, tensor=1, rules='default',
                slices=0),  # over which `data` goes; 0: what the devices say
      checkpoint=dict(
          every_steps=500,
          every_minutes=0.0,  # 0: not by time
          keep=3,  # the newest k good ones (docs/pods.md)
          keep_every=0,  # and every n-th step; 0: none
      ),
      # Batches of each source; 0: all of them.
      eval=dict(every_steps=250, batches=16),
      log=dict(every_steps=10, tensorboard=False, wandb=False,
               wandb_project='archetype'),
  ))


def _model() -> dict:
  return dict(
      arch='gpt',
      d_model=128,
      num_layers=4,
      num_decoder_layers=0,  # encoder-decoders; derived: num_layers
      num_heads=4,
      num_kv_heads=0,  # derived: num_heads
      head_dim=0,  # derived: d_model / num_heads
      d_ff=0,  # derived: 4 d_model
      vocab_size=0,  # derived: the tokenizer's
      max_len=0,  # derived: data.length
      type_vocab_size=0,  # segment kinds (BERT: 2); 0: none
      norm='layernorm',  # layernorm rmsnorm
      norm_eps=1e-5,
      embed_norm=False,  # a norm right after the embedding
      position='learned',  # learned sinusoidal rope alibi relative none
      sinusoid='interleaved',  # interleaved halves fairseq
      learned_stretch=1.0,  # >1: interpolate learned positions past max_len
      rope=dict(
          theta=10000.0,
          fraction=1.0,  # of the head that is rotated
          scaling='none',  # none linear ntk llama3 yarn
          factor=1.0,
          original_len=0,  # derived: max_len
          low_freq_factor=1.0,  # llama3
          high_freq_factor=4.0,  # llama3
          beta_fast=32.0,  # yarn
          beta_slow=1.0,  # yarn
      ),
      relative=dict(buckets=32, max_distance=128),  # T5's bias
      ffn='gelu',  # relu gelu gelu_tanh silu geglu geglu_tanh swiglu moe
      block='pre_norm',  # pre_norm post_norm parallel sandwich
      # A pattern repeated over the layers, of: global banded.
      attention='global',
      # Of whole sequences; decoding with a cache is always xla. auto: splash on
      # TPU, cudnn on GPU, where they can. auto xla splash cudnn.
      attention_kernel='auto',
      sliding_window=0,  # keys a banded layer sees, itself included
      attention_softcap=0.0,  # 0: none
      qk_norm=False,
      attention_sinks=False,
      attention_scale=0.0,  # derived: head_dim ** -0.5
      attention_bias=True,
      ffn_bias=True,
      tie_embeddings=True,
      embed_scale=1.0,  # 0, derived: d_model ** 0.5 (mup: of the base)
      logits_scale=1.0,  # 0, derived: d_model ** -0.5 (mup: of the base)
      logits_softcap=0.0,
      logits_bias=False,
      dropout=0.0,  # of the embedding and of what a part adds
      attention_dropout=0.0,  # of attention weights
      ffn_dropout=0.0,  # of hidden units; those of experts: moe.expert_dropout
      # How sizes and rates change with width: standard, or mup (docs/mup.md),
      # which equals standard at the base width.
      parametrization='standard',
      mup_base_width=0,  # the d_model of the base; mup needs it
      mup_base_head_dim=0,  # derived: as many heads at the base
      init='scaled_normal',  # normal scaled_normal fan_in
      init_stddev=0.02,
      init_scale=1.0,  # fan_in: the variance is this / fan_in
      dtype='float32',  # of the computation: float32 bfloat16
      param_dtype='float32',  # bfloat16: what the optimiser keeps is float32
      scan_layers=True,
      remat='none',  # none full dots
      moe=dict(
          num_experts=8,
          top_k=2,  # experts of a token (expert_choice: on average)
          # topk switch gshard expert_choice sigmoid sinkhorn hash uniform
          router='topk',
          ffn='gelu',  # of the experts, and of the dense layers between
          every=1,  # 1: all layers have experts; 2: every other; ...
          d_ff=0,  # of one expert; derived: model.d_ff
          shared_experts=0,  # as a dense network, this many times moe.d_ff
          # auto (sorted where a capacity pads little, else dropless) einsum
          # sorted dropless
          dispatch='auto',
          # The product of dropless. auto: megablox on TPU. auto xla megablox.
          grouped_kernel='auto',
          capacity_factor=0.0,  # in training; 0: dropless
          eval_capacity_factor=0.0,  # 0: dropless
          normalize_gates=True,  # of topk, sigmoid, sinkhorn; from top_k 2 on
          jitter=0.0,  # the router's input times uniform(1 - j, 1 + j)
          logit_noise=0.0,  # standard deviation
          balance_loss='switch',  # switch importance none
          balance_weight=0.01,
          z_loss_weight=0.0,
          expert_dropout=0.0,  # on the experts' hidden units
          group_size=0,  # tokens that share capacity; 0: all of a batch
          bias_rate=0.001,  # sigmoid: how far a step moves router_bias
      ),
  )


def sized(size: str, sizes: dict[str, dict]) -> dict:
  """Returns the row of `sizes` that the ':size' argument names.

  Raises:
    ValueError: naming the size, the choices and the nearest of them.
  """
  size = size or 'tiny'
  if size not in sizes:
    near = difflib.get_close_matches(size, sizes, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise RequestError(
        f'unknown size {size!r}: choose from {", ".join(sizes)}.{hint}')
  return sizes[size]
