"""The page of a model's insides, in a browser: it draws, and says weights."""

import pathlib
import shutil

import numpy as np
import pytest

import archetype
from tests.helpers import chromium, models
from training.evals.tasks import inspect
from training.insides import page as pages

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


def test_another_figure_is_chosen(page, found):
  page.evaluate('''(() => { const s = document.querySelector(
      "#maps-decoder select"); s.value = "previous token";
      s.dispatchEvent(new Event("change")); })()''')
  said = page.evaluate(
      '[...document.querySelectorAll("#maps-decoder .value")]'
      '.map(b => b.textContent)')
  assert said == [f'{x:.2f}' for x in
                  found.attention['decoder'].previous[:, 0].reshape(-1)]


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


def test_the_chosen_token_lists_what_it_looks_at(page, found):
  page.click('#maps-encoder tbody tr:nth-child(1) td:nth-child(3) button')
  page.click('#maps-encoder .strip .token:nth-child(5)')
  row = found.attention['encoder'].weights[0, 0, 1, 4]
  assert page.evaluate(
      'document.querySelector("#maps-encoder .side h3").textContent') == (
          f'From {TEXTS[4]} (token 4)')
  best = np.argsort(-row)[:8]
  assert page.evaluate(
      '[...document.querySelectorAll("#maps-encoder .side li")]'
      '.map(l => l.textContent)') == [
          f'{TEXTS[i]} (token {i}) {row[i]:.4f}' for i in best]


def test_a_cell_says_more_by_mouse_and_by_keyboard(page, found):
  page.evaluate('document.querySelector("#lens td").focus()')
  ids, probabilities = (x[-1, 0, 0] for x in found.lens)
  lines = [f'{p:.4f}  <{i}>' for i, p in zip(ids, probabilities)]
  assert _tip(page).splitlines() == [
      f'{TEXTS[0]} (token 0)', 'after layer 1', *lines]
  page.evaluate('''document.activeElement.dispatchEvent(new KeyboardEvent(
      "keydown", {key: "ArrowRight", bubbles: true}))''')
  assert _tip(page).splitlines()[0] == f'{TEXTS[1]} (token 1)'
  assert page.evaluate(
      '[...document.querySelectorAll("#lens td")].filter(c => c.tabIndex === 0)'
      '.length') == 1


def test_the_top_row_of_the_lens_is_the_last_layer(page, found):
  assert page.evaluate(
      '[...document.querySelectorAll("#lens tbody tr")].map(r => [r.cells[0]'
      '.textContent, r.cells[1].textContent])') == [
          ['1', f'<{found.lens.ids[2, 0, 0, 0]}>'],
          ['0', f'<{found.lens.ids[1, 0, 0, 0]}>'],
          ['embedding', f'<{found.lens.ids[0, 0, 0, 0]}>']]
