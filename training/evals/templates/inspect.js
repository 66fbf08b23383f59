// Draws the attention maps, and shows what stands behind a cell on hovering.
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const tip = document.querySelector('.tip');

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === 'style') made.style.cssText = value;
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.min(x + 14, innerWidth - box.width - 8) + 'px';
  tip.style.top = (y + 18 + box.height > innerHeight ?
      y - box.height - 10 : y + 18) + 'px';
}

function hideTip() { tip.hidden = true; }

// Cells of tables say more on hovering, and by keyboard: arrows move on.
document.addEventListener('mousemove', event => {
  const cell = event.target.closest && event.target.closest('[data-tip]');
  if (cell) showTip(cell.dataset.tip, event.clientX, event.clientY);
  else if (!event.target.matches || !event.target.matches('canvas.large'))
    hideTip();
});
document.addEventListener('focusin', event => {
  if (!event.target.dataset || !event.target.dataset.tip) return;
  const box = event.target.getBoundingClientRect();
  showTip(event.target.dataset.tip, box.right, box.bottom - 10);
});
document.addEventListener('focusout', hideTip);
document.addEventListener('wheel', hideTip, {passive: true});
document.addEventListener('keydown', event => {
  const cell = event.target;
  if (!cell.matches || !cell.matches('td[data-tip]')) return;
  const row = cell.parentElement, place = cell.cellIndex;
  const other = {ArrowLeft: cell.previousElementSibling,
                 ArrowRight: cell.nextElementSibling,
                 ArrowUp: row.previousElementSibling &&
                     row.previousElementSibling.cells[place],
                 ArrowDown: row.nextElementSibling &&
                     row.nextElementSibling.cells[place]}[event.key];
  if (!other || !other.matches('td[data-tip]')) return;
  event.preventDefault();
  cell.tabIndex = -1;
  other.tabIndex = 0;
  other.focus();
});

function colour(name) {  // [r, g, b] of a colour of the style sheet
  const canvas = element('canvas', {width: 1, height: 1});
  const context = canvas.getContext('2d');
  context.fillStyle = getComputedStyle(document.documentElement)
      .getPropertyValue(name).trim();
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}

// Weights are kept as two bytes, the low one first.
function weights(map) {
  const text = atob(map.weights), found = new Float32Array(text.length / 2);
  for (let i = 0; i < found.length; i++)
    found[i] = (text.charCodeAt(2 * i) + 256 * text.charCodeAt(2 * i + 1)) /
        65535;
  return found;
}

class Maps {
  constructor(map, root) {
    Object.assign(this, {map, root, layer: 0, head: 0, query: 0});
    [this.N, this.H, this.L, this.M] = map.shape;
    this.queries = data.tokens[map.queries];
    this.keys = data.tokens[map.keys];
    this.query = this.key = Math.min(this.L, this.M) - 1;
    this.all = weights(map);
    this.paper = colour('--paper');
    this.heat = colour('--heat');
    this.measure = root.querySelector('select.measure');
    for (const name of Object.keys(map.measures))
      this.measure.append(element('option', {value: name}, name));
    this.measure.addEventListener('change', () => this.label());
    this.grid();
    this.large = root.querySelector('canvas.large');
    this.side = root.querySelector('.side');
    this.strip = root.querySelector('.strip');
    this.listen();
    this.label();
    this.choose(0, 0);
  }

  at(layer, head) {
    const size = this.L * this.M, start = (layer * this.H + head) * size;
    return this.all.subarray(start, start + size);
  }

  image(context, map) {
    const image = context.createImageData(this.M, this.L);
    for (let i = 0; i < map.length; i++) {
      const v = Math.sqrt(map[i]);  // so that small weights are seen
      for (let c = 0; c < 3; c++)
        image.data[4 * i + c] =
            this.paper[c] + v * (this.heat[c] - this.paper[c]);
      image.data[4 * i + 3] = 255;
    }
    return image;
  }

  grid() {
    const size = this.H > 24 ? 28 : this.H > 12 ? 40 : 60;
    const table = this.root.querySelector('table.heads');
    const head = element('tr', {}, element('th', {scope: 'col'}, 'layer'));
    for (let h = 0; h < this.H; h++)
      head.append(element('th', {scope: 'col'}, `head ${h}`));
    table.append(element('thead', {}, head));
    const body = element('tbody');
    this.buttons = [];
    for (let n = 0; n < this.N; n++) {
      const row = element('tr', {}, element('th', {scope: 'row'}, `${n}`));
      this.buttons.push([]);
      for (let h = 0; h < this.H; h++) {
        const canvas = element('canvas', {
          width: this.M, height: this.L, 'aria-hidden': 'true',
          style: `width:${size}px;height:${size}px`});
        const context = canvas.getContext('2d');
        context.putImageData(this.image(context, this.at(n, h)), 0, 0);
        const button = element(
            'button', {type: 'button', 'aria-pressed': 'false'}, canvas,
            element('span', {className: 'value'}));
        button.addEventListener('click', () => this.choose(n, h));
        this.buttons[n].push(button);
        row.append(element('td', {}, button));
      }
      body.append(row);
    }
    table.append(body);
  }

  label() {  // the chosen measure below each head
    const name = this.measure.value, values = this.map.measures[name];
    const known = values.flat().filter(v => v !== null);
    const low = Math.min(...known), high = Math.max(...known);
    this.buttons.forEach((row, n) => row.forEach((button, h) => {
      const value = values[n][h], span = button.querySelector('.value');
      span.textContent = value === null ? 'n/a' : value.toFixed(2);
      span.style.setProperty('--v', value === null || high === low ? 0 :
          (value - low) / (high - low));
      button.setAttribute(
          'aria-label', `layer ${n}, head ${h}: ${name} ${span.textContent}`);
    }));
  }

  choose(layer, head) {
    this.buttons[this.layer][this.head].setAttribute('aria-pressed', 'false');
    this.buttons[layer][head].setAttribute('aria-pressed', 'true');
    Object.assign(this, {layer, head});
    const said = Object.entries(this.map.measures).map(([name, values]) => {
      const value = values[layer][head];
      return `${name} ${value === null ? 'n/a' : value.toFixed(3)}`;
    });
    this.root.querySelector('.chosen').textContent =
        `Layer ${layer}, head ${head}: ${said.join(', ')}`;
    this.large.setAttribute('aria-label',
        `Attention map of layer ${layer}, head ${head}. Rows are queries, ` +
        'columns are keys. The arrow keys move from cell to cell.');
    this.draw();
  }

  draw() {
    const cell = Math.max(5, Math.min(22, Math.floor(760 / this.M)));
    const named = cell >= 9, font = Math.min(12, cell);
    const context = this.large.getContext('2d');
    const style = `${font}px ui-monospace, monospace`;
    context.font = style;
    const wide = tokens => named ? Math.min(120, 8 + Math.max(
        ...tokens.map(t => context.measureText(t).width))) : 4;
    this.left = wide(this.queries);
    this.top = wide(this.keys);
    this.cell = cell;
    const width = this.left + cell * this.M + 1;
    const height = this.top + cell * this.L + 1;
    const scale = devicePixelRatio || 1;
    this.large.width = width * scale;
    this.large.height = height * scale;
    this.large.style.width = width + 'px';
    this.large.style.height = height + 'px';
    context.scale(scale, scale);
    const small = element('canvas', {width: this.M, height: this.L});
    small.getContext('2d').putImageData(
        this.image(context, this.at(this.layer, this.head)), 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, this.left, this.top, cell * this.M, cell * this.L);
    const css = getComputedStyle(document.documentElement);
    context.strokeStyle = css.getPropertyValue('--line');
    context.strokeRect(this.left + .5, this.top + .5, cell * this.M,
                       cell * this.L);
    context.fillStyle = css.getPropertyValue('--ink');
    context.font = style;
    context.textBaseline = 'middle';
    if (named) {
      context.textAlign = 'right';
      this.queries.forEach((token, i) => context.fillText(
          token, this.left - 4, this.top + (i + .5) * cell, this.left - 4));
      context.textAlign = 'left';
      this.keys.forEach((token, i) => {
        context.save();
        context.translate(this.left + (i + .5) * cell, this.top - 4);
        context.rotate(-Math.PI / 2);
        context.fillText(token, 0, 0, this.top - 4);
        context.restore();
      });
    }
    context.strokeStyle = css.getPropertyValue('--mark');
    context.strokeRect(this.left + .5, this.top + this.query * cell + .5,
                       cell * this.M, cell);
    this.list();
  }

  row() {
    return [...this.at(this.layer, this.head).subarray(
        this.query * this.M, (this.query + 1) * this.M)];
  }

  list() {  // what the chosen query looks at
    const row = this.row(), order = row.map((_, i) => i).sort(
        (a, b) => row[b] - row[a]).slice(0, 8).filter(i => row[i] > 0);
    this.side.replaceChildren(
        element('h3', {}, 'From ', element('span', {className: 'token'},
            this.queries[this.query]), ` (token ${this.query})`),
        element('ol', {}, ...order.map(i => element('li', {},
            element('span', {className: 'token'}, this.keys[i]),
            ` (token ${i}) ${row[i].toFixed(4)}`,
            element('span', {className: 'bar',
                             style: `width:${6 * row[i]}rem`})))));
    const rest = 1 - row.reduce((sum, v) => sum + v, 0);
    if (rest > 1e-3)
      this.side.append(`The learned sink has ${rest.toFixed(4)}.`);
    this.strip.replaceChildren(...this.keys.map((token, i) => {
      const same = this.map.queries === this.map.keys;
      const span = element('span', {
        className: 'token' + (same && i === this.query ? ' query' : ''),
        style: `--v:${Math.sqrt(row[i])}`,
        'data-tip': `${token} (token ${i}): weight ${row[i].toFixed(4)}`,
      }, token);
      if (same) span.addEventListener('click', () => this.from(i));
      return span;
    }));
  }

  from(query) {
    this.query = Math.max(0, Math.min(this.L - 1, query));
    this.draw();
  }

  say(query, key, x, y) {
    const weight = this.at(this.layer, this.head)[query * this.M + key];
    showTip(`from ${this.queries[query]} (token ${query})\n` +
            `to ${this.keys[key]} (token ${key})\n` +
            `weight ${weight.toFixed(4)}`, x, y);
  }

  listen() {
    const place = event => {
      const box = this.large.getBoundingClientRect();
      return [Math.floor((event.clientY - box.top - this.top) / this.cell),
              Math.floor((event.clientX - box.left - this.left) / this.cell)];
    };
    this.large.addEventListener('mousemove', event => {
      const [query, key] = place(event);
      if (query < 0 || key < 0 || query >= this.L || key >= this.M) hideTip();
      else this.say(query, key, event.clientX, event.clientY);
    });
    this.large.addEventListener('mouseleave', hideTip);
    this.large.addEventListener('click', event => {
      const [query] = place(event);
      if (query >= 0 && query < this.L) this.from(query);
    });
    this.large.addEventListener('keydown', event => {
      const [dq, dk] = {ArrowUp: [-1, 0], ArrowDown: [1, 0],
                        ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key] ||
          [0, 0];
      if (!dq && !dk) return;
      event.preventDefault();
      this.key = Math.max(0, Math.min(this.M - 1, this.key + dk));
      this.from(this.query + dq);
      const box = this.large.getBoundingClientRect();
      this.say(this.query, this.key,
               box.left + this.left + (this.key + .5) * this.cell,
               box.top + this.top + (this.query + .5) * this.cell);
    });
  }
}

for (const map of data.maps)
  new Maps(map, document.getElementById(`maps-${map.name}`));
