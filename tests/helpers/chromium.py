"""A headless Chromium, driven through its devtools protocol over a pipe."""

import json
import os
import select
import shutil
import subprocess
import sys
import time

PROGRAM = shutil.which('chromium') or shutil.which('chromium-browser')
SECONDS = 60
# Puts the pipes where Chromium looks for them; copies first, should one of
# them be the other's place.
_START = ('import os, sys; a, b = (os.dup(os.dup(os.dup(int(x)))) for x in '
          'sys.argv[1:3]); os.dup2(a, 3); os.dup2(b, 4); '
          'os.execv(sys.argv[3], sys.argv[3:])')


class Page:
  """One tab. What it logs as an error, or throws, is in `errors`; what it
  asks for beyond its own file, in `requests`."""

  def __init__(self, url: str, profile, size=(1280, 900)):
    # Chromium reads commands from descriptor 3 and writes answers to 4.
    theirs_in, self._write = os.pipe()
    self._read, theirs_out = os.pipe()
    self._process = subprocess.Popen(
        [sys.executable, '-ISc', _START, str(theirs_in), str(theirs_out),
         PROGRAM, '--headless', '--no-sandbox', '--disable-gpu',
         '--no-first-run', f'--user-data-dir={profile}',
         '--remote-debugging-pipe', f'--window-size={size[0]},{size[1]}',
         'about:blank'],
        pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(theirs_in)
    os.close(theirs_out)
    self._buffer, self._id, self._session = b'', 0, None
    self.errors, self.requests, self._loaded = [], [], False
    targets = self._ask('Target.getTargets')['targetInfos']
    target = next(t['targetId'] for t in targets if t['type'] == 'page')
    self._session = self._ask('Target.attachToTarget', targetId=target,
                              flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self._ask(f'{domain}.enable')
    self._ask('Page.navigate', url=url)
    while not self._loaded:
      self._message()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._session = None
    self._ask('Browser.close')
    try:
      self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    os.close(self._read)
    os.close(self._write)

  def evaluate(self, expression: str):
    """Returns the value of a JavaScript expression, as JSON has it."""
    result = self._ask('Runtime.evaluate', expression=expression,
                       returnByValue=True)
    assert 'exceptionDetails' not in result, result
    return result['result'].get('value')

  def move(self, x: float, y: float) -> None:
    """Moves the mouse."""
    self._ask('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

  def click(self, selector: str) -> None:
    """Presses the mouse on the middle of an element."""
    x, y = self.evaluate(
        f'''(() => {{ const e = document.querySelector({selector!r});
        e.scrollIntoView({{block: "center"}});
        const b = e.getBoundingClientRect();
        return [b.x + b.width / 2, b.y + b.height / 2]; }})()''')
    for kind in ('mousePressed', 'mouseReleased'):
      self._ask('Input.dispatchMouseEvent', type=kind, x=x, y=y,
                button='left', clickCount=1)

  def _ask(self, method: str, **params):
    self._id += 1
    message = {'id': self._id, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._message()
      if answer.get('id') == self._id:
        assert 'error' not in answer, answer
        return answer['result']

  def _message(self) -> dict:
    end = time.monotonic() + SECONDS
    while b'\0' not in self._buffer:
      ready, _, _ = select.select([self._read], [], [], end - time.monotonic())
      assert ready, f'chromium said nothing for {SECONDS} seconds'
      self._buffer += os.read(self._read, 1 << 16)
    head, _, self._buffer = self._buffer.partition(b'\0')
    message = json.loads(head)
    method, params = message.get('method'), message.get('params', {})
    if method == 'Page.loadEventFired':
      self._loaded = True
    elif method == 'Network.requestWillBeSent':
      self.requests.append(params['request']['url'])
    elif method == 'Runtime.exceptionThrown':
      self.errors.append(str(params['exceptionDetails']))
    elif method == 'Log.entryAdded' and params['entry']['level'] == 'error':
      self.errors.append(params['entry']['text'])
    elif method == 'Runtime.consoleAPICalled' and params['type'] == 'error':
      self.errors.append(str(params['args']))
    return message
