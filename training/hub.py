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
  """Returns the name of a repository on the Hugging Face hub, ORG/NAME, given
  hf://ORG/NAME; '' given a path."""
  if not str(name).startswith(HUB_PREFIX):
    return ''
  return str(name).removeprefix(HUB_PREFIX)


def download_if_on_hub(name: str | os.PathLike, weights: bool = True
                       ) -> str | os.PathLike:
  """Downloads a repository of the Hugging Face hub, if the name is of the form
  hf://ORG/NAME. Any other name is taken for a path and returned as it is.

  Args:
    name: hf://ORG/NAME, hf://ORG/NAME@REVISION, or a path.
    weights: whether to download the weights too.

  Returns:
    The folder with the files.

  Raises:
    RequestError: for a repository that does not exist or is not open to this
      user, and if huggingface_hub is not installed.
    EnvironmentFailure: if the hub does not answer, and the cache does not have
      the files.
  """
  repository, _, revision = repository_of_name(name).partition('@')
  if not repository:
    return name
  file_patterns = list(TEXT_FILE_PATTERNS)
  if weights:
    file_patterns += WEIGHT_FILE_PATTERNS
  with _use_hub(name) as hub:
    return hub.snapshot_download(
        repository, revision=revision or None, allow_patterns=file_patterns)


def check_exists(path: pathlib.Path) -> None:
  """Raises RequestError for a path where nothing is. Where the path may be the
  name of a repository on the hub, the message says how that is written."""
  may_be_repository = re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', str(path))
  hint = ''
  if may_be_repository:
    hint = (': a repository of the Hugging Face hub is written '
            f'{HUB_PREFIX}{path}')
  require(path.exists(), f'there is no folder or file {path}{hint}')


@contextlib.contextmanager
def open_destination(name: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Provides a folder to write to, as a context manager. For hf://ORG/NAME it
  is a temporary folder, which is uploaded to the Hugging Face hub at the end.

  A new repository is private. The model card of an existing one is not
  replaced.

  Args:
    name: a path, or hf://ORG/NAME.
  """
  repository = repository_of_name(name)
  if not repository:
    yield pathlib.Path(name)
    return
  # Check that the user is logged in before the work in the `with` block begins.
  with _use_hub(name) as hub:
    api = hub.HfApi()
    api.whoami()
  with tempfile.TemporaryDirectory() as folder:
    yield pathlib.Path(folder)
    with _use_hub(name):
      api.create_repo(repository, private=True, exist_ok=True)
      ignored_files = []
      if api.file_exists(repository, MODEL_CARD_FILE):
        ignored_files.append(MODEL_CARD_FILE)
      api.upload_folder(repo_id=repository, folder_path=folder,
                        ignore_patterns=ignored_files)
  print(f'uploaded: {name}')


@contextlib.contextmanager
def _use_hub(name: str | os.PathLike) -> Iterator[Any]:
  """Provides the package huggingface_hub, as a context manager, and turns
  errors of the hub into sentences for the user.

  Args:
    name: hf://ORG/NAME, for the message.

  Raises:
    RequestError: if the hub refuses the request, or the package is not
      installed.
    EnvironmentFailure: if the hub cannot be reached, or fails.
  """
  try:
    # The package is an optional one.
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError as error:
    raise RequestError(f'{name} is of the Hugging Face hub, and the package '
                       'huggingface_hub is not installed: run pip install '
                       'huggingface_hub, or name a folder on disk') from error
  try:
    # The `with` block runs here. The user can mend a name that the hub does not
    # know or allow. All other failures are of the network or the hub.
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
  """Returns the type and the message of an error in one line."""
  return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
