"""The Hugging Face hub: hf://ORG/NAME, or hf://ORG/NAME@REVISION, in the place
of a folder. huggingface_hub is imported where such a name is used; what its
cache holds is read without a network."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import tempfile
from typing import Any

from common.errors import EnvironmentFailure, RequestError, require

HUB_PREFIX = 'hf://'
MODEL_CARD_FILE = 'README.md'
# Only these files are downloaded: configs, tokenizers, chat templates; and
# weights.
TEXT_FILE_PATTERNS = ('*.json', '*.jinja', '*.txt', '*.model', '*.spm')
WEIGHT_FILE_PATTERNS = ('*.safetensors',)


def repository_of_name(name: str | os.PathLike) -> str:
  """Returns 'ORG/NAME' of hf://ORG/NAME, and '' of a path."""
  if not str(name).startswith(HUB_PREFIX):
    return ''
  return str(name).removeprefix(HUB_PREFIX)


def download_if_on_hub(name: str | os.PathLike,
                       weights: bool = True) -> str | os.PathLike:
  """Returns the folder to which a repository of the hub was downloaded, and a
  path as it is.

  Args:
    name: hf://ORG/NAME, or a path.
    weights: whether weights are wanted too.

  Raises:
    RequestError: there is no such repository, it is not open to this user, or
      there is no huggingface_hub.
    EnvironmentFailure: the hub does not answer, and the cache has none of it.
  """
  repo, _, revision = repository_of_name(name).partition('@')
  if not repo:
    return name
  with _use_hub(name) as hub:
    return hub.snapshot_download(
        repo, revision=revision or None,
        allow_patterns=[*TEXT_FILE_PATTERNS, *WEIGHT_FILE_PATTERNS * weights])


def check_exists(path: pathlib.Path) -> None:
  """Raises RequestError for a path where nothing is; one that may be the name
  of a repository is asked for as such."""
  may_be_one = re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', str(path))
  hint = ''
  if may_be_one:
    hint = (': a repository of the Hugging Face hub is written '
            f'{HUB_PREFIX}{path}')
  require(path.exists(), f'there is no folder or file {path}{hint}')


@contextlib.contextmanager
def open_destination(name: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives the folder to write to: the path `name` itself, or one whose files
  are uploaded in the end. A new repository is private, and the card of one that
  was there stays."""
  repo = repository_of_name(name)
  if not repo:
    yield pathlib.Path(name)
    return
  with _use_hub(name) as hub:
    api = hub.HfApi()
    api.whoami()  # before the work
  with tempfile.TemporaryDirectory() as folder:
    yield pathlib.Path(folder)
    with _use_hub(name):
      api.create_repo(repo, private=True, exist_ok=True)
      api.upload_folder(
          repo_id=repo, folder_path=folder,
          ignore_patterns=[MODEL_CARD_FILE] * api.file_exists(repo,
                                                              MODEL_CARD_FILE))
  print(f'uploaded: {name}')


@contextlib.contextmanager
def _use_hub(name: str | os.PathLike) -> Iterator[Any]:
  """Gives huggingface_hub, whose errors become sentences."""
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError as error:
    raise RequestError(f'{name} is of the Hugging Face hub, and the package '
                       'huggingface_hub is not installed: run pip install '
                       'huggingface_hub, or name a folder on disk') from error
  try:
    yield huggingface_hub
  except (errors.HFValidationError, errors.LocalTokenNotFoundError,
          errors.RepositoryNotFoundError, errors.RevisionNotFoundError
          ) as error:
    raise RequestError(f'the Hugging Face hub refuses {name}: '
                       f'{_describe_error(error)}'
                       ) from error
  except Exception as error:  # of its HTTP client, which may be another
    raise EnvironmentFailure(f'the Hugging Face hub did not do what {name} '
                             f'needs: {_describe_error(error)}') from error


def _describe_error(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
