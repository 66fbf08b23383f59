"""What a conversation needs of a run, or of a Hugging Face folder."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath
import flax.linen as nn
import ml_collections

import architectures
from configs.errors import RequestError, require
from training import objectives, parameters, runs, weights
from training.data import chat_templates, tokenizers
from training.data.tokenizers import Tokenizer
from training.hf import config as hf_config
from training.hf import generation as hf_generation
from training.objectives import causal, chat
from training.objectives.record import Prompts, Talk, known_ids, padded

# What to do instead, where a model cannot be talked with.
INSTEAD = {
    'encoder': 'an encoder has no conversation: eval.py has --tasks=fill_mask '
               'for one that learned mlm or mlm_nsp, --tasks=unmask for one '
               'that learned masked_diffusion, and --tasks=embed for each',
    'encoder-decoder': 'an encoder-decoder reads a source and writes its '
                       'target, without a conversation: pass the source to '
                       'eval.py as --prompt',
    'decoder': 'a prompt is not read from left to right, as a cache that is '
               'kept from turn to turn needs it: eval.py has --prompt'}


class Speaker(NamedTuple):
  """A model that can be talked with.

  Attributes:
    module, params: the model.
    tokenizer: its tokenizer.
    talk: how it is asked.
    options: what generation_config.json says of its draws; {}: nothing.
  """
  module: nn.Module
  params: Any
  tokenizer: Tokenizer
  talk: Talk
  options: dict[str, Any]


def of_run(workdir: epath.Path, step: int | str | None = None,
           template: str = '') -> Speaker:
  """Returns the model of a run.

  Args:
    workdir: its folder.
    step: which checkpoint; 'best'; None: the newest.
    template: a chat template, as data.chat_template names one; '': the run's.

  Raises:
    RequestError: for a model that cannot be talked with.
  """
  config = runs.config_of(workdir)
  row, model = objectives.of(config), runs.model_of(workdir, config)
  if row.talk is None:
    raise RequestError(f'objective {config.objective!r}: ' + (
        INSTEAD[architectures.stack(model)] if row.head == 'lm' else
        f'its model has the head {row.head!r}, which writes no text'))
  tokenizer = tokenizers.load(config.data.tokenizer)
  said = hf_generation.kept(workdir)
  module = architectures.build(model)
  found = parameters.on_one_device(workdir, module, step)
  talk = row.talk(config, tokenizer)
  if said is not None or template:
    talk = _talk(tokenizer, said, template, talk,
                 hf_generation.is_published(workdir, found.step))
  return Speaker(module, found.state, tokenizer, talk, _options(said))


def of_folder(folder: epath.Path, template: str = '') -> Speaker:
  """Returns the model of a Hugging Face folder; see `of_run`."""
  model = hf_config.read(hf_config.load_config_json(folder))
  stack = architectures.stack(model)
  require(stack == 'decoder', f'{folder}: {INSTEAD[stack]}')
  require(model.head == 'lm', f'{folder} holds a model with the head '
          f'{model.head!r}, which writes no text')
  require(bool(tokenizers.found_in(folder)),
          f'{folder} has no tokenizer that is read here: it needs '
          + ', or '.join(' + '.join(names) for names in tokenizers.FOLDERS))
  tokenizer = tokenizers.load(str(folder))
  said = hf_generation.of_folder(folder)
  talk = _talk(tokenizer, said, template, causal.goes_on(tokenizer), True)
  return Speaker(*weights.from_hf(folder), tokenizer, talk, _options(said))


def _talk(tokenizer: Tokenizer, said: hf_generation.Generation | None,
          template: str, usual: Talk, published: bool) -> Talk:
  """Returns how an imported model is talked with: by its chat template, and
  with the tokens of its generation_config.json.

  Args:
    tokenizer: the model's.
    said: what its folder says of generation.
    template: instead of the folder's own; '': that one, where it has one.
    usual: how the model is talked with where there is none.
    published: whether the weights are the folder's, not trained here; else a
      text begins with the separator, as in training.
  """
  ends = frozenset(ids(said).get('eos_token_id', ()))
  folder = epath.Path(tokenizer.name)
  if template or (chat_templates.in_folder(folder) is not None
                  and usual.plain):
    found = chat_templates.read(template or str(folder), tokenizer)
    return chat.templated(
        found, ends, '' if template else 'answers by its chat template')
  if usual.plain:
    return plain(tokenizer, said) if published else usual
  return usual._replace(ends=ends or usual.ends)


def plain(tokenizer: Tokenizer, said: hf_generation.Generation | None) -> Talk:
  """Returns how an imported model goes on from a text: after its folder's bos
  and up to its eos; where the folder names none, the separator."""
  named = ids(said)
  usual = causal.goes_on(tokenizer, next(iter(named.get('bos_token_id', ())),
                                         None))
  return usual._replace(
      ends=frozenset(named.get('eos_token_id', ())) or usual.ends)


def shown(texts: Sequence[str], config: ml_collections.ConfigDict,
          tokenizer: Tokenizer, said: hf_generation.Generation | None
          ) -> tuple[Prompts, tuple[int, ...]]:
  """Returns texts as a model that writes is shown them, and the ids with which
  it ends its own.

  Args:
    texts: one or more.
    config: the run's.
    tokenizer: the model's.
    said: what the folder says of which these are the weights; None: of none.
  """
  objective = objectives.of(config)
  talk = objective.talk and objective.talk(config, tokenizer)
  if said is not None and talk and talk.plain:
    talk = plain(tokenizer, said)
    return Prompts(*padded([talk.encode([dict(role='user', content=text)])
                            for text in texts])), tuple(sorted(talk.ends))
  assert objective.prompt is not None
  prompts = objective.prompt(texts, config, tokenizer)
  known_ids(prompts.tokens, config, tokenizer, 'the prompt')
  return prompts, objective.ends(config, tokenizer)


def ids(said: hf_generation.Generation | None) -> dict[str, list[int]]:
  """Returns the ids of special tokens that a folder names; the file of
  generation counts more than config.json, as for transformers."""
  if said is None:
    return {}
  found = {}
  for name, value in {**said.fields, **(said.options or {})}.items():
    if name.endswith('_token_id') and value is not None:
      found[name] = value if isinstance(value, list) else [value]
  return found


def _options(said: hf_generation.Generation | None) -> dict[str, Any]:
  return (said and said.options) or {}
