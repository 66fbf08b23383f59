"""The page of a model in a browser: it draws, and says weights."""

import pathlib
import shutil

import pytest

import archetype
from tests.helpers import chromium, models
from training.evals.tasks import inspect
from training.inspect import page as pages

pytestmark = pytest.mark.slow

TEXTS = ['</script>', '<b>', '␣', 'é', '\\xc3', 'a', "'", '"', '&amp;']


@pytest.fixture(scope='module')
def found():
  model = archetype.Model(*models.make('switch', num_heads=4))
  return model.inspect(models.tokens(1, len(TEXTS)))


@pytest.fixture(scope='module')
def page(found, tmp_path_factory):
  if chromium.PROGRAM is None:
    pytest.skip('no chromium on the path (Debian package chromium)')
  file = pathlib.Path(tmp_path_factory.mktemp('page'), 'page.html')
  file.write_text(pages.page(found, pages.Shown(
      'a <title>', ['about & all'], dict(encoder=TEXTS, decoder=TEXTS),
      lambda i: f'<{i}>', inspect.by_head(found, None))))
  profile = tmp_path_factory.mktemp('profile')
  with chromium.Page(file.as_uri(), profile) as page:
    yield page
  shutil.rmtree(profile, ignore_errors=True)


def _tip(page):
  return page.evaluate(
      'document.querySelector(".tip").hidden ? null : '
      'document.querySelector(".tip").textContent')


def test_every_section_is_there_and_nothing_is_fetched(page):
  assert page.evaluate(
      '[...document.querySelectorAll("section")].map(s => s.id)') == [
          'maps-encoder', 'maps-decoder', 'maps-cross', 'stream-encoder',
          'stream-decoder', 'lens', 'experts-encoder', 'experts-decoder']
  assert page.evaluate('document.querySelector("h1").textContent') == (
      'a <title>')
  assert len(page.requests) == 1 and not page.errors
  assert page.evaluate(
      '[...document.querySelectorAll("#lens thead th")].slice(1)'
      '.map(h => h.textContent)') == TEXTS


def test_each_head_is_a_button_that_says_its_figure(page, found):
  labels = page.evaluate(
      '[...document.querySelectorAll("#maps-cross .heads button")]'
      '.map(b => b.getAttribute("aria-label"))')
  entropy = found.attention['cross'].entropy.mean(-1)[:, 0]
  assert labels == [f'layer {n}, head {h}: entropy {entropy[n, h]:.2f}'
                    for n in range(2) for h in range(4)]
  assert page.evaluate(
      '[...document.querySelectorAll("canvas.large")]'
      '.every(c => c.getAttribute("aria-label").includes("layer 0, head 0"))')


@pytest.mark.parametrize('query, key', [(7, 2), (0, 0), (3, 3)])
def test_hovering_over_a_map_says_the_weight(page, found, query, key):
  page.click('#maps-decoder tbody tr:nth-child(2) td:nth-child(4) button')
  x, y = page.evaluate(f'''(() => {{
      const c = document.querySelector("#maps-decoder canvas.large");
      c.scrollIntoView({{block: "center"}});
      const b = c.getBoundingClientRect(), cell = 22, n = {len(TEXTS)};
      return [b.right - 1 - ({len(TEXTS)} - {key} - .5) * cell,
              b.bottom - 1 - ({len(TEXTS)} - {query} - .5) * cell]; }})()''')
  page.move(x, y)
  weight = found.attention['decoder'].weights[1, 0, 2, query, key]
  assert _tip(page) == (f'from {TEXTS[query]} (token {query})\nto {TEXTS[key]} '
                        f'(token {key})\nweight {weight:.4f}')
