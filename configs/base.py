"""Every default of a run, and how a config file parses its ':size' argument.

A config file under configs/ starts from `base()` and changes what its paper
says. Whatever a run does is printed by its config: no default hides in code.
0 or '' in a field that says 'derived' means: worked out from the other fields.
"""

import difflib
from typing import Any

import ml_collections

from configs import model
from configs.errors import RequestError

# No float of a config is larger: float32 ends at 3.4e38, and what is computed
# of it should be finite too.
MOST_FLOAT = 1e30


def base() -> ml_collections.ConfigDict:
  """Returns a config with every field of a run at its default."""
  # The comments are the notes of the documentation's table of fields.
  return ml_collections.ConfigDict(dict(
      seed=0,  # of the parameters, the order of the data, and dropout
      # The first parameters are drawn from both seeds, so that each value gives
      # others with the same data; 0: from seed alone.
      init_seed=0,
      # What is learned: causal, prefix, chat, mlm, mlm_nsp, masked_diffusion,
      # span, seq2seq, classification, regression, token_classification,
      # question_answering, probe, compression.
      objective='causal',
      # A Hugging Face folder or a workdir whose weights the run starts from.
      init_from='',
      # Load only the parameters whose names and shapes match; list the others.
      init_partial=False,
      span=dict(  # of the objective span
          noise_density=0.15,  # the share of tokens that is cut out
          mean_length=3.0,  # the mean length of a span in tokens
      ),
      probe=dict(  # of the objective probe
          # Difficulties, one a row; derived: what the task's paper has.
          levels=(),
          vocab=0,  # letters of the task; derived: as published
          examples=0,  # rows in one pass of training; derived: as published
          held_out=0,  # rows to evaluate on; derived: as published
      ),
      model=model.defaults(),
      data=dict(
          # sotu | text:GLOB | jsonl:GLOB:FIELD | parquet:GLOB:FIELD |
          # arrayrecord:GLOB | hf:NAME | tokens:FOLDER (of tools.tokenize) |
          # parallel:GLOB (for seq2seq) | alpaca:GLOB (for chat) |
          # labelled:GLOB[:FIELDS] (for classification and regression) |
          # conll:GLOB[:COLUMNS] (for token_classification) | squad:GLOB (for
          # question_answering) | probe:NAME (for probe, a task of
          # training/data/probes); several with weights: '0.7*A,0.3*B'.
          source='sotu',
          # Text to evaluate on, written like source. Empty: what is held out of
          # source. The loss of a mixture is the mean of its sources' losses,
          # weighted by the sources' weights.
          eval_source='',
          # n: every n-th document is held out of training; of a single text
          # file, its last n-th part. 0: nothing is held out.
          holdout_every=20,
          # bytes | bytes:N (in N ids) | a tokenizer.json | a folder | a .model
          tokenizer='bytes',
          length=256,  # tokens in a sequence (in the source, with seq2seq)
          target_length=0,  # tokens in the target of seq2seq; derived: length
          batch_size=32,  # sequences in a batch, over all devices
          # Smaller batches at first, STEP:ROWS with commas between: '100:8' has
          # 8 rows in a batch until step 100. Empty: all have batch_size.
          batch_ramp='',
          # Attention and positions stop at the ends of documents.
          document_mask=False,
          # Of tokens; empty: $ARCHETYPE_CACHE, or ~/.cache/archetype.
          cache_dir='',
          # How chat lays out a conversation. published: as Vicuna v1.1, or for
          # alpaca: as Alpaca. earlier: as runs did before this field existed.
          # Any other: by the chat template in a Jinja file or a Hugging Face
          # folder, of which the run keeps the text, or in 'jinja:TEXT'.
          chat_template='published',
          # The labels of classification, in the order of the model's scores;
          # derived: those of the training data.
          labels=(),
          # What a row counts in the training loss of classification. balanced:
          # each label the same in all; or a number for each label, with commas
          # between. Empty: all rows the same.
          class_weights='',
          # Batches of labelled data are padded to one of so many lengths, the
          # last of them data.length.
          length_buckets=8,
          # Tokens that neighbouring windows share, of a sentence or a paragraph
          # that is longer than a row; derived: length / 3, as in BERT.
          stride=0,
          # Separators between the two texts of a row; derived: those of the
          # model, 2 of roberta and 1 of others. Runs of roberta had 1 before
          # this field existed.
          pair_separators=0,
          mask_rate=0.15,  # the share of tokens that mlm and mlm_nsp mask
          whole_words=False,  # mask all tokens of a word, or none
          workers=0,  # processes that prepare batches; 0: threads
          tokenize_workers=0,  # processes that tokenise; 0: one per CPU core
      ),
      train=dict(
          steps=1000,  # the last step of the run
          # A batch is processed in so many parts, one after another.
          grad_accumulation=1,
          # Steps in a row with a loss that is not finite before the run ends.
          max_bad_steps=10,
          z_loss=0.0,  # the weight of log(Z)^2 of the logits in the loss
          label_smoothing=0.0,  # the share of the target given to all tokens
          # Of the mean loss of the modules of model.mtp_depth, in the loss.
          mtp_weight=0.3,
          # Tokens whose logits are held at once; 0: chosen by size.
          loss_chunk=0,
      ),
      optim=dict(
          name='adamw',  # adamw adafactor lion muon normuon soap sgd
          lr=1e-3,  # the highest learning rate
          schedule='cosine',  # cosine linear rsqrt wsd constant
          warmup_steps=100,  # steps in which the learning rate rises to lr
          # The learning rate at the end of the schedule, as a share of lr.
          final_fraction=0.1,
          # cosine and linear end at this step; 0: at train.steps.
          decay_steps=0,
          decay_fraction=0.2,  # of wsd: the share of steps that decay
          weight_decay=0.1,  # times lr, taken from a parameter in each step
          # Patterns over parameter paths. The first that matches says whether
          # the parameter decays: 1, or not: 0. Empty: matrices decay;
          # embeddings, norms and biases do not.
          decay_mask=(),
          # Patterns over parameter paths, with commas between: what matches is
          # not trained. A path may have block_B, as in the tree, or the number
          # of a layer: embed/.*,decoder/layers/[0-3]/.*
          freeze='',
          # What the learning rate is multiplied by from a layer to the one
          # below it; 1: all have the same.
          layer_decay=1.0,
          # The gradient's largest norm, to which it is scaled down; 0: none.
          clip_norm=1.0,
          b1=0.9,  # of adamw, lion, muon, normuon and soap
          b2=0.95,  # of the same
          eps=1e-8,  # of adamw, muon, normuon and soap
          momentum=0.9,  # of sgd, muon and normuon
          # Of soap: steps between two updates of its bases.
          precondition_every=10,
          # Of soap: the longest side of a matrix that has a preconditioner.
          precondition_max=10_000,
          # The decay of a moving average of the parameters, which is evaluated
          # and exported in their place, such as 0.999. 0: none is kept.
          ema=0.0,
      ),
      mesh=dict(  # the sizes of the axes multiply to the number of devices
          data=-1,  # splits the batch; -1: the devices that are left
          fsdp=1,  # splits the batch, and d_model of the weights
          expert=1,  # splits the batch, and the experts
          context=1,  # splits the length
          tensor=1,  # splits heads, feed-forward networks and the vocabulary
          rules='default',  # the table of configs/sharding.py
          # Groups of devices with a slow network between them, over which data
          # goes; 0: as the devices say.
          slices=0,
      ),
      checkpoint=dict(
          every_steps=500,  # steps between two checkpoints
          every_minutes=0.0,  # minutes between two checkpoints; 0: not by time
          keep=3,  # how many of the newest good checkpoints are kept
          keep_every=0,  # keep every n-th step too; 0: none
          # After the last step, the mean of the parameters of so many
          # checkpoints, the last ones by every_steps, is evaluated too, as
          # mean/loss. 0: none.
          average=0,
      ),
      eval=dict(
          every_steps=250,  # steps between two evaluations
          batches=16,  # batches of each source; 0: all of them
          # first or second: on one half of the documents that are held out, of
          # a probe on rows of its own. Empty: on all of them.
          part='',
          # Tasks of eval.py to do while training, such as 'loss,exact'. They
          # are done after the last step in any case.
          tasks='',
          tasks_every_steps=0,  # steps between two; 0: after the last one alone
          # A figure of these, such as loss or labels/f1: the checkpoint of the
          # best is kept. Empty: none.
          best='',
          # Which value of it is the best: least or largest; derived, where the
          # figure is known.
          best_is='',
          # The run ends after so many evaluations without a better one; 0: no.
          patience=0,
          # With optim.ema: evaluate the parameters too, as live/loss.
          live=False,
      ),
      log=dict(
          every_steps=10,  # steps between two lines of metrics
          tensorboard=False,  # write TensorBoard's files too
          wandb=False,  # log to Weights & Biases too
          wandb_project='archetype',  # the project in Weights & Biases
      ),
  ))


def sized(size: str, sizes: dict[str, Any]) -> dict[str, Any]:
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
