"""The defaults of config.model: the parts of an architecture, and its sizes."""


def defaults() -> dict:
  """Returns every field of config.model at its default."""
  # A part is chosen by its name in a table of architectures/parts/; a name that
  # is not there is refused with those that are.
  return dict(
      arch='gpt',  # a page of architectures/
      d_model=128,  # width of the residual stream
      num_layers=4,  # of the encoder, in encoder-decoders
      # Layers of the decoder in encoder-decoders; derived: num_layers.
      num_decoder_layers=0,
      num_heads=4,  # query heads
      num_kv_heads=0,  # key and value heads; derived: num_heads
      head_dim=0,  # size of a head; derived: d_model / num_heads
      d_ff=0,  # hidden units of the feed-forward network; derived: 4 d_model
      vocab_size=0,  # derived: the tokenizer's
      max_len=0,  # the length of the model; derived: data.length
      type_vocab_size=0,  # kinds of segments (BERT: 2); 0: none
      next_sentence=False,  # BERT's pooler, and its head of next sentences
      norm='layernorm',  # the norm of every layer
      norm_eps=1e-5,  # added to the variance or the mean square
      embed_norm=False,  # a norm right after the embedding
      position='learned',  # the position encoding
      position_offset=0,  # learned positions before the first token's
      sinusoid='interleaved',  # the order of sines and cosines
      learned_stretch=1.0,  # above 1: learned positions are interpolated
      rope=dict(  # of rotary positions
          theta=10000.0,  # the base of the frequencies
          fraction=1.0,  # the share of a head that is rotated
          interleaved=False,  # pairs are neighbours, not half a head apart
          scaling='none',  # how they stretch past original_len
          factor=1.0,  # how many times the original length
          original_len=0,  # where the scaling starts; derived: max_len
          low_freq_factor=1.0,  # of llama3
          high_freq_factor=4.0,  # of llama3
          beta_fast=32.0,  # of yarn
          beta_slow=1.0,  # of yarn
          # Of yarn, how much of its temperature is on turned features and, from
          # there, on all features of a head (DeepSeek-V2).
          mscale=1.0,
          mscale_all_dim=0.0,
          truncate=True,  # of yarn: its ramp is between whole frequencies
          short_factor=(),  # of longrope: what divides each frequency
          long_factor=(),  # the same in rows of more than original_len
          # Of longrope, on turned features; derived: of factor, original_len.
          attention_factor=0.0,
      ),
      relative=dict(  # of T5's bias
          buckets=32,  # buckets of distances
          max_distance=128,  # the last bucket has all larger distances
      ),
      # The feed-forward network; moe: a mixture of experts; none: layers end
      # before it.
      ffn='gelu',
      clamp=dict(  # of ffn=swiglu_clamped
          alpha=1.702,  # multiplies the gate in its sigmoid
          limit=7.0,  # the most that the gate and the other factor may be
      ),
      block='pre_norm',  # how norms, attention and networks are wired
      # What attention and networks read of what stands before them: plain, the
      # residual sum; hyper (hyper-connections) or mhc, a mixture of several
      # streams; or attention (attention residuals), a weighted mean.
      residual='plain',
      streams=dict(  # read where residual is not plain
          count=4,  # number of streams, for hyper and mhc
          # For hyper: whether the mixture depends on the token.
          dynamic=True,
          iterations=20,  # for mhc: rounds of Sinkhorn's algorithm
          # For attention: how many attentions and networks are summed before
          # they are attended to; 1: each stands for itself.
          block_size=1,
      ),
      # What mixes the tokens of a layer: attention; latent, whose keys and
      # values are made of a small vector a token; or a recurrence: deltanet,
      # mamba2, kda, gla or retnet.
      mixer='attention',
      latent=dict(  # of mixer=latent
          # Size of the vector that queries are made from; 0: the layer's input.
          q_rank=0,
          # Size of the vector that keys and values are made from; derived:
          # 4 head_dim.
          kv_rank=0,
          # Features of a head's query and key without positions; derived:
          # head_dim.
          nope_dim=0,
          # Features with positions, of a key that all heads share; derived:
          # half of head_dim.
          rope_dim=0,
          v_dim=0,  # size of a head's value; derived: head_dim
          # The factor of the scores; derived: (nope_dim + rope_dim) ** -0.5.
          scale=0.0,
          norm_eps=0.0,  # epsilon of the latents' norms; derived: norm_eps
      ),
      deltanet=dict(  # of mixer=deltanet
          key_heads=0,  # heads of queries and keys; derived: num_heads
          value_heads=0,  # a multiple of key_heads, which is the default
          key_dim=0,  # size of a head's query and key; derived: head_dim
          value_dim=0,  # size of a head's value; derived: head_dim
          conv=4,  # tokens that a convolution sees, the token itself included
          decay=True,  # the state decays (Gated DeltaNet), or not (DeltaNet)
          negative=False,  # rates up to 2, not 1: eigenvalues may be negative
      ),
      mamba2=dict(  # of mixer=mamba2
          heads=0,  # heads of x, each with a state; derived: 2 num_heads
          head_dim=0,  # features of a head; derived: head_dim
          groups=1,  # groups of heads, each of which shares one B and one C
          state=128,  # features of B and C
          conv=4,  # tokens that a convolution sees, the token itself included
          conv_bias=True,  # whether the convolutions have a bias
          norm_over='group',  # one norm is over the heads of a group, or all
          # Bounds of dt, the step from one token to the next; with most_step=0
          # there is no upper bound.
          least_step=0.0,
          most_step=0.0,
      ),
      kda=dict(  # of mixer=kda
          key_heads=0,  # heads of queries and keys; derived: num_heads
          value_heads=0,  # a multiple of key_heads, which is the default
          key_dim=0,  # size of a head's query and key; derived: head_dim
          value_dim=0,  # size of a head's value; derived: head_dim
          conv=4,  # tokens that a convolution sees; 0: no convolution
          rank=0,  # rank of the decays' and gate's product; derived: value_dim
          negative=False,  # rates up to 2, not 1: eigenvalues may be negative
      ),
      gla=dict(  # of mixer=gla
          heads=0,  # heads, each with a state; derived: num_heads
          key_dim=0,  # size of a head's query and key; derived: head_dim / 2
          value_dim=0,  # size of a head's value; derived: head_dim
          conv=0,  # tokens that a convolution sees; 0: no convolution
          rank=16,  # rank of the product for decays
          temperature=16.0,  # divides the logarithms of the decays
      ),
      retnet=dict(  # of mixer=retnet
          heads=0,  # heads, each with a state; derived: num_heads
          key_dim=0,  # size of a head's query and key; derived: head_dim
          value_dim=0,  # size of a head's value; derived: 2 head_dim
      ),
      attention='global',  # which keys a query sees
      # The kinds of layer, names of model.kinds, that are repeated over the
      # layers, such as local,local,global; empty: all are the model's own.
      pattern='',
      prefix='',  # the kinds of the layers before the first period, likewise
      suffix='',  # the kinds of the layers after the last period, likewise
      # What the layers of a kind have of their own, by its name: such as
      # dict(local=dict(window=512)). The fields of configs/kinds.py.
      kinds={},
      # What computes attention over whole sequences. auto: splash on TPU and
      # cudnn on GPU, where they can. Decoding with a cache is always xla.
      attention_kernel='auto',
      # The keys that a banded layer sees, that of the query included.
      sliding_window=0,
      attention_softcap=0.0,  # bounds the attention scores; 0: none
      qk_norm=False,  # a norm of queries and of keys
      qk_norm_over='head',  # what it is over: a head, or the whole projection
      attention_sinks=False,  # a learned term in the softmax's denominator
      attention_gate='none',  # of the heads' outputs: elementwise, headwise
      # Tokens that a convolution of queries, keys and values sees; 0: no
      # convolution.
      attention_conv=0,
      value_residual=False,  # the first layer's values are mixed into all
      value_embedding=False,  # a table of tokens is added to a layer's values
      # A layer reads the keys and values of one before it: of a kind of layer.
      kv_sharing=False,
      # The factor of the scores; derived: head_dim ** -0.5 (with mup: that of
      # the base).
      attention_scale=0.0,
      attention_bias=True,  # biases in the products of attention
      attention_out_bias=True,  # if so, in the product of its output too
      ffn_bias=True,  # biases in the feed-forward network
      tie_embeddings=True,  # the head is the embedding's transpose
      # Modules that predict a token further ahead each; read in training.
      mtp_depth=0,
      # The factor of the embedding; 0, derived: d_model ** 0.5 (with mup: that
      # of the base).
      embed_scale=1.0,
      # The factor of the logits; 0, derived: d_model ** -0.5 (with mup: that of
      # the base).
      logits_scale=1.0,
      logits_softcap=0.0,  # bounds the logits; 0: none
      logits_bias=False,  # a bias of the logits
      # What is read off the last layer: lm sequence tokens span vector
      # (architectures/parts/heads.py); derived: the objective's.
      head='',
      # Outputs of the head of a task; derived: of the training data's labels.
      num_labels=0,
      head_dropout=0.0,  # of what the head of a task is applied to
      # What the head of a row reads of an encoder's tokens: cls, the first one,
      # or mean, the mean of all that are not padding.
      pooling='cls',
      dropout=0.0,  # of the embedding and of what each part adds
      attention_dropout=0.0,  # of attention weights
      # Of hidden units of dense networks; those of experts: moe.expert_dropout.
      ffn_dropout=0.0,
      # How initial sizes and learning rates change with width: standard, or mup
      # (docs/mup.md), which equals standard at the base width.
      parametrization='standard',
      mup_base_width=0,  # the d_model of the base, which mup needs
      mup_base_head_dim=0,  # its head_dim; derived: it has as many heads
      init='scaled_normal',  # the distribution of the first weights
      init_stddev=0.02,  # of normal and scaled_normal
      init_scale=1.0,  # of fan_in: the variance is this / fan_in
      dtype='float32',  # of the computation: float32 bfloat16
      # Of the parameters: float32 bfloat16. What the optimiser keeps is float32
      # in any case.
      param_dtype='float32',
      scan_layers=True,  # one program for all layers, or one for each
      # What the backward pass computes again: nothing (none), all but products
      # (dots), or each layer from its input (full; with offload the inputs wait
      # in the host's memory).
      remat='none',
      # The products (of lora.targets below, with commas) whose weights, if they
      # are sharded over fsdp, stay whole from the forward to the backward pass.
      # none: all are gathered again, which sends more and keeps less.
      keep_gathered='none',
      lora=dict(  # low-rank adapters; all other parameters are frozen
          rank=0,  # of an adapter; 0: there is none
          # An adapter's product is multiplied by alpha / rank; derived: rank.
          alpha=0.0,
          # The products that get one, with commas: query key value output_gate
          # out up gate down, or all-linear. Those of experts get none.
          targets='query,value',
          dropout=0.0,  # of what goes into an adapter
      ),
      moe=dict(  # of ffn=moe
          num_experts=8,  # experts of a layer
          top_k=2,  # experts of a token (with expert_choice: on average)
          router='topk',  # which experts see a token
          logit_bias=False,  # a bias of the router's logits
          # Groups of experts, of which a token goes to the top_groups best: of
          # topk and sigmoid; 1: there are none.
          expert_groups=1,
          top_groups=1,  # groups that a token may go to
          # The network of an expert, and of the dense layers between.
          ffn='gelu',
          d_ff=0,  # hidden units of one expert; derived: model.d_ff
          # A dense network beside the experts, this many times as wide as one.
          shared_experts=0,
          # Whether a sigmoid of the layer's input multiplies the output of the
          # shared experts.
          shared_gate=False,
          # How tokens reach their experts. auto: sorted where a capacity pads
          # little, else dropless.
          dispatch='auto',
          # The product of dropless. auto: megablox on TPU, else xla.
          grouped_kernel='auto',
          # Room of an expert in training, over an even load; 0: dropless.
          capacity_factor=0.0,
          eval_capacity_factor=0.0,  # the same in evaluation
          # The gates of a token sum to 1: of topk, sigmoid and sinkhorn, from
          # top_k 2 on.
          normalize_gates=True,
          gate_scale=1.0,  # multiplies the gates, normalised or not
          # In training the router's input is multiplied by uniform(1 - j,
          # 1 + j).
          jitter=0.0,
          # Standard deviation of the noise on the router's logits in training.
          logit_noise=0.0,
          # What asks for even load: switch importance sequence none.
          balance_loss='switch',
          balance_weight=0.01,  # of the balance loss
          z_loss_weight=0.0,  # of log(Z)^2 of the router's logits
          expert_dropout=0.0,  # of the experts' hidden units
          # Tokens that share capacity; 0: all of a batch.
          group_size=0,
          # Of sigmoid: how far a step moves router_bias.
          bias_rate=0.001,
      ),
  )
