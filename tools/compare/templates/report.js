'use strict';
// Sorts the tables and draws the plots of the page. All figures stand in
// #data; nothing is fetched.

const WIDTH = 900, HEIGHT = 420;
const EDGE = {left: 76, right: 28, top: 12, bottom: 54};

function element(name, attributes, ...children) {
  const svg = ['svg', 'path', 'line', 'circle', 'text', 'g', 'rect'];
  const node = svg.includes(name)
    ? document.createElementNS('http://www.w3.org/2000/svg', name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

// Tables: a click on a heading sorts by it, another one turns the order round.
// Rows without a figure stay last.
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector('button')
    .addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      heads.forEach(other => other.setAttribute('aria-sort', 'none'));
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const key = row => row.cells[column].dataset.value;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === undefined || y === undefined) {
          return (x === undefined) - (y === undefined);
        }
        const order = x !== '' && y !== '' && !isNaN(x) && !isNaN(y)
          ? x - y : x.localeCompare(y);
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    }));
}

// Numbers as a reader wants them: 1.5M, 0.0003, 2.31.
function format(x) {
  if (x === 0) return '0';
  const size = Math.abs(x);
  if (size >= 1e15) return x.toExponential(2).replace('e+', 'e');
  for (const [unit, value] of [['T', 1e12], ['G', 1e9], ['M', 1e6],
                               ['k', 1e4]]) {
    if (size >= value) {
      const scale = unit === 'k' ? 1e3 : value;
      return +(x / scale).toPrecision(4) + unit;
    }
  }
  return String(+x.toPrecision(5));
}

// The numbers of an axis, with as many decimals each: 2.0, 2.5, 3.0.
function alike(ticks) {
  const texts = ticks.map(format);
  const plain = text => /^-?\d+(\.\d+)?$/.test(text);
  const decimals = Math.max(...texts.filter(plain).map(
    text => (text.split('.')[1] || '').length), 0);
  return texts.map(text => plain(text) ? (+text).toFixed(decimals) : text);
}

function scale(low, high, from, to, log) {
  const f = log ? Math.log10 : x => x;
  const span = f(high) - f(low) || 1;
  const map = x => from + (f(x) - f(low)) / span * (to - from);
  map.ticks = log ? logTicks(low, high) : linearTicks(low, high);
  return map;
}

function linearTicks(low, high) {
  const raw = (high - low) / 6 || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9;
       i++) {
    ticks.push(+(i * step).toPrecision(12));
  }
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let p = Math.floor(Math.log10(low)); 10 ** p <= high; p++) {
    for (const m of [1, 2, 5]) {
      const x = m * 10 ** p;
      if (x >= low && x <= high) ticks.push(x);
    }
  }
  if (ticks.length < 2) return linearTicks(low, high);
  return ticks.length <= 14 ? ticks  // more would stand in each other's way
    : ticks.filter(x => Number.isInteger(Math.log10(x)));
}

// The value of a line at x, between its points; null outside.
function at(line, x) {
  for (let i = 1; i < line.length; i++) {
    const [a, b] = [line[i - 1], line[i]];
    if (a.x <= x && x <= b.x) {
      return b.x === a.x ? b.y : a.y + (x - a.x) / (b.x - a.x) * (b.y - a.y);
    }
  }
  return null;
}

class Plot {
  constructor(figure, spec) {
    this.figure = figure;
    this.spec = spec;
    this.choice = {x: Object.keys(spec.x)[0], y: Object.keys(spec.y)[0],
                   log: spec.log, part: 'whole', minus: false, seeds: false};
    this.hidden = new Set();
    this.canvas = element('svg', {viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
                                  role: 'img', 'aria-label': spec.title});
    this.tip = element('div', {class: 'tip', hidden: ''});
    figure.prepend(this.controls(), this.canvas, this.legend(), this.tip);
    this.canvas.addEventListener('pointermove', event => this.point(event));
    this.canvas.addEventListener('pointerleave', () => {
      this.tip.hidden = true;
    });
    this.draw();
  }

  controls() {
    const box = element('div', {class: 'controls'});
    const radio = (field, title, options) => {
      if (Object.keys(options).length < 2) return;
      const set = element('fieldset', {}, element('legend', {}, title));
      for (const [value, label] of Object.entries(options)) {
        const input = element('input', {
          type: 'radio', name: `${this.spec.id}-${field}`, value});
        input.checked = this.choice[field] === value;
        input.addEventListener('change', () => this.set(field, value));
        set.append(element('label', {}, input, ' ', label));
      }
      box.append(set);
    };
    const tick = (field, label) => {
      const input = element('input', {type: 'checkbox',
                                      name: `${this.spec.id}-${field}`});
      input.checked = this.choice[field];
      input.addEventListener('change', () => this.set(field, input.checked));
      box.append(element('label', {}, input, ' ', label));
    };
    radio('y', 'show', this.spec.y);
    radio('x', 'by', this.spec.x);
    if (this.spec.curves) {
      radio('part', 'of', {whole: 'the whole run', half: 'its second half'});
      if (this.spec.series.some(s => s.base)) tick('minus', 'minus the base');
      if (this.spec.series.some(s => s.seeds)) tick('seeds', 'each seed');
    }
    tick('log', 'logarithmic');
    return box;
  }

  legend() {
    const box = element('div', {class: 'legend'});
    this.spec.series.forEach((series, i) => {
      const line = element('line', {x1: 0, y1: 6, x2: 30, y2: 6,
                                    class: `line ${series.look}`});
      const button = element(
        'button', {type: 'button', 'aria-pressed': 'true'},
        element('svg', {viewBox: '0 0 30 12'}, line), series.name);
      button.addEventListener('click', () => {
        const shown = this.hidden.delete(i);
        if (!shown) this.hidden.add(i);
        button.setAttribute('aria-pressed', String(shown));
        this.draw();
      });
      box.append(button);
    });
    return box;
  }

  set(field, value) {
    this.choice[field] = value;
    this.draw();
  }

  // The points of a line under the choices; a null (not finite) is left out.
  points(line, base) {
    const c = this.choice, values = line && line[c.y];
    if (!values || !values[c.x]) return [];
    const all = values[c.x].map((x, i) => ({
      x, y: values.y[i], low: values.low && values.low[i],
      high: values.high && values.high[i]}));
    const end = all.length && all[all.length - 1].x;
    return all.filter(p => p.x !== null && p.y !== null
                      && !(c.log && p.x <= 0)
                      && !(c.part === 'half' && p.x < end / 2))
      .map(p => {
        if (!base) return p;
        const y = at(base, p.x);
        return y === null ? null : {...p, y: p.y - y};
      }).filter(p => p !== null);
  }

  lines() {
    const found = [], c = this.choice;
    let base = null;
    if (c.minus) {
      const part = c.part;
      c.part = 'whole';
      base = this.points(this.spec.series.find(s => s.base).mean);
      c.part = part;
    }
    this.spec.series.forEach((series, i) => {
      if (this.hidden.has(i)) return;
      for (const [seed, line] of Object.entries(
        c.seeds && series.seeds || {})) {
        found.push({name: `${series.name}, seed ${seed}`, kind: 'seed',
                    look: series.look, points: this.points(line, base)});
      }
      found.push({name: series.name, kind: 'line', look: series.look,
                  points: this.points(series.mean, base)});
    });
    return found.filter(line => line.points.length);
  }

  draw() {
    const c = this.choice, lines = this.lines();
    this.canvas.replaceChildren();
    this.dots = [];
    const all = lines.flatMap(line => line.points);
    if (!all.length) {
      this.canvas.append(element('text', {x: WIDTH / 2, y: HEIGHT / 2,
        'text-anchor': 'middle'}, 'no figures for this choice'));
      return;
    }
    const xs = all.map(p => p.x);
    const ys = all.flatMap(p => [p.y, p.low ?? p.y, p.high ?? p.y]);
    const [low, high] = [Math.min(...ys), Math.max(...ys)];
    const room = (high - low) * 0.04 || 0.01;
    const x = scale(Math.min(...xs), Math.max(...xs), EDGE.left,
                    WIDTH - EDGE.right, c.log);
    const y = scale(low - room, high + room, HEIGHT - EDGE.bottom, EDGE.top);
    this.axes(x, y);
    for (const line of lines) this.line(line, x, y);
  }

  axes(x, y) {
    const {spec, choice: c} = this, bottom = HEIGHT - EDGE.bottom;
    const add = (name, attributes, ...text) =>
      this.canvas.append(element(name, attributes, ...text));
    x.ticks.forEach((t, i, all) => {
      add('line', {class: 'grid', x1: x(t), x2: x(t), y1: EDGE.top,
                   y2: bottom});
      add('text', {x: x(t), y: bottom + 20, 'text-anchor': 'middle'},
          c.log ? format(t) : alike(all)[i]);
    });
    y.ticks.forEach((t, i, all) => {
      add('line', {class: 'grid', x1: EDGE.left, x2: WIDTH - EDGE.right,
                   y1: y(t), y2: y(t)});
      add('text', {x: EDGE.left - 8, y: y(t) + 4, 'text-anchor': 'end'},
          alike(all)[i]);
    });
    add('text', {x: (WIDTH + EDGE.left) / 2, y: HEIGHT - 8,
                 'text-anchor': 'middle'}, spec.x[c.x]);
    const middle = (EDGE.top + bottom) / 2;
    add('text', {x: 14, y: middle, 'text-anchor': 'middle',
                 transform: `rotate(-90 14 ${middle})`},
        spec.y[c.y] + (c.minus ? ' minus the base' : ''));
  }

  line({name, kind, look, points}, x, y) {
    const d = points.map((p, i) => `${i ? 'L' : 'M'}${x(p.x).toFixed(1)} ${
      y(p.y).toFixed(1)}`).join('');
    this.canvas.append(element('path', {class: `${kind} ${look}`, d}));
    for (const p of points) {
      this.dots.push({name, ...p, px: x(p.x), py: y(p.y)});
      if (kind === 'seed') continue;
      if (p.low != null) {
        this.canvas.append(element('line', {
          class: `bar ${look}`, x1: x(p.x), x2: x(p.x), y1: y(p.low),
          y2: y(p.high)}));
      }
      this.canvas.append(element('circle', {
        class: `dot ${look}`, cx: x(p.x), cy: y(p.y),
        r: points.length > 60 ? 1.2 : 2.6}));
    }
  }

  // The nearest point within reach of the pointer, in words.
  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const px = (event.clientX - box.left) / box.width * WIDTH;
    const py = (event.clientY - box.top) / box.height * HEIGHT;
    const far = dot => Math.hypot(dot.px - px, dot.py - py);
    const near = this.dots.reduce(
      (a, b) => a && far(a) <= far(b) ? a : b, null);
    this.tip.hidden = !near || far(near) > 40;
    if (this.tip.hidden) return;
    const {x: axis, y: measure} = this.choice;
    this.tip.textContent = `${near.name}: ${near.y.toFixed(4)} at ${
      format(near.x)} ${this.spec.x[axis]}`;
    this.tip.title = this.spec.y[measure];
    const left = near.px / WIDTH * box.width;
    this.tip.style.left = `${Math.min(left + 12,
      box.width - this.tip.offsetWidth)}px`;
    this.tip.style.top = `${this.canvas.offsetTop
      + near.py / HEIGHT * box.height - 36}px`;
  }
}

document.querySelectorAll('table').forEach(sortable);
const data = JSON.parse(document.getElementById('data').textContent);
for (const spec of data) new Plot(document.getElementById(spec.id), spec);
