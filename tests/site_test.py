"""The built site, as a reader uses it: the words that people type into its
search lead to the page that answers them. `make docs-test` builds it first."""

import functools
import http.server
import json
import pathlib
import threading
import time
import urllib.parse

import pytest

from tests.helpers import chromium

SITE = pathlib.Path(__file__).parents[1] / 'site'
SECONDS_OF_SEARCH = 60
# The addresses of the results of a search, best first.
RESULTS = '''JSON.stringify(
    [...document.querySelectorAll('.md-search-result__link')]
    .map(link => new URL(link.href).pathname.slice(1)))'''


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
  """Serves files, and logs nothing."""

  def log_message(self, *_):
    pass


@pytest.fixture(scope='module')
def address():
  """The address of a server of the site: the search runs in a worker of the
  browser, which does not start for a file."""
  handler = functools.partial(_QuietHandler, directory=SITE)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/index.html'
    server.shutdown()


def _search(address, words, profile):
  """Returns the pages that the site's search finds for some words, the best
  one first."""
  query = urllib.parse.quote(words)
  end = time.monotonic() + SECONDS_OF_SEARCH
  with chromium.Page(f'{address}?q={query}', profile) as page:
    pages = []
    while not pages and time.monotonic() < end:
      time.sleep(.2)
      pages = json.loads(page.evaluate(RESULTS))
  return pages


@pytest.mark.docs
@pytest.mark.skipif(not chromium.PROGRAM, reason='there is no chromium here')
@pytest.mark.parametrize('words, page', [
    ('MoE', 'architectures.html'),
    ('Muon', 'optimizers.html'),
    ('optimizer', 'optimizers.html'),
    ('memory', 'howto/memory.html'),
    ('out of memory', 'howto/memory.html'),
    ('save best', 'howto/bad_loss.html'),
    ('early stopping', 'howto/bad_loss.html'),
    ('4 GPUs', 'pods.html'),
    ('distributed', 'pods.html'),
    ('TPU', 'install.html'),
    ('predict', 'howto/finetune.html'),
    ('fine-tune', 'howto/finetune.html'),
    ('dataset', 'howto/own_data.html'),
    ('own model', 'howto/add_a_system.html'),
    ('generate text', 'howto/evaluate.html'),
    ('resume', 'howto/resume.html'),
    ('checkpoint', 'howto/resume.html'),
    ('export', 'tutorials/import_weights.html'),
    ('learning rate', 'mup.html'),
    ('tokenizer', 'howto/tokenize.html'),
    ('Hugging Face', 'tutorials/import_weights.html'),
    ('LoRA', 'howto/instruct.html'),
    ('RoPE', 'architectures.html'),
    ('flash attention', 'performance.html'),
    ('attention maps', 'howto/look_inside.html'),
    ('plot', 'howto/curves.html'),
    ('wandb', 'howto/curves.html'),
    ('freeze layers', 'howto/bad_loss.html'),
    ('profile', 'howto/bad_loss.html'),
    ('NaN', 'howto/bad_loss.html'),
    ('chat', 'howto/chat.html'),
    ('slurm', 'pods.html'),
    ('sweep', 'sweeps.html'),
    ('install', 'install.html'),
    ('evaluate', 'howto/evaluate.html')])
def test_a_search_finds_the_page_first(words, page, address, tmp_path):
  pages = _search(address, words, tmp_path)
  assert pages[:1] == [page]
