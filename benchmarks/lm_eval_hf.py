"""The other side of benchmarks.lm_eval: lm_eval's Hugging Face backend."""

from benchmarks import lm_eval
from benchmarks.lm_eval_ours import seconds


def jobs(request: dict) -> dict:
  """Returns what a worker can be asked to do, by name."""
  import transformers
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  from lm_eval.models import huggingface
  model = huggingface.HFLM(request['folder'], device='cpu', dtype='float32',
                           batch_size=lm_eval.BATCHES[0])
  asked = lm_eval.instances(request['pairs'])

  def run() -> list[float]:
    return [x for x, _ in model.loglikelihood(asked, disable_tqdm=True)]

  def answers() -> list[float]:
    # What its cache of logits answers is not always the answer: see
    # tools/verify/harness.py. It is timed with it, as users have it.
    model.logits_cache = False
    found = run()
    model.logits_cache = True
    return found

  def sized(size: int):
    def timed() -> float:
      model.batch_size_per_gpu = size
      return seconds(run)
    return timed

  return dict(answers=answers, timed=lambda: seconds(run)) | {
      f'batch {size}': sized(size) for size in lm_eval.BATCHES}
