"""The fields of a mixture of experts: config.model.moe."""

import dataclasses

from architectures.parts.config import ModelConfig
from configs.fields import field, FUNCTION, RECIPE, REGULARISATION, RUN, SAFE
from configs.fields import Resume, SAME, SHAPES


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Of ffn moe: the experts and their router."""
  num_experts: int = field(8, 'experts of a layer', above=0, resume=SHAPES)
  top_k: int = field(
      2, 'experts of a token (with expert_choice: on average)', above=0,
      resume=FUNCTION)
  router: str = field('topk', 'which experts see a token')
  logit_bias: bool = field(False, "a bias of the router's logits")
  expert_groups: int = field(
      1, 'Groups of experts, of which a token goes to the top_groups best; 1: '
      'there are none.', above=0, resume=FUNCTION)
  top_groups: int = field(
      1, 'groups that a token may go to', above=0, resume=FUNCTION,
      read_by='moe.expert_groups>1')
  ffn: str = field(
      'gelu', 'the network of an expert, and of the dense layers between')
  d_ff: int = field(0, 'hidden units of one expert; derived: model.d_ff',
                    resume=SHAPES)
  shared_experts: int = field(
      0, 'A dense network beside the experts, this many times as wide as one.')
  shared_gate: bool = field(
      False, "Whether a sigmoid of the layer's input multiplies the output of "
      'the shared experts.', read_by='moe.shared_experts')
  dispatch: str = field(
      'auto', 'How tokens reach their experts. auto: sorted where a capacity '
      'pads little, else dropless.', resume=FUNCTION, about=RUN)
  grouped_kernel: str = field(
      'auto', 'The product of dropless. auto: megablox on TPU, else xla.',
      resume=SAME, about=RUN, read_by='moe.dispatch=auto,dropless')
  capacity_factor: float = field(
      0.0, 'room of an expert in training, over an even load; 0: dropless',
      least=0, resume=FUNCTION, about=RECIPE)
  eval_capacity_factor: float = field(
      0.0, 'the same in evaluation', least=0,
      resume=Resume(SAFE, 'only evaluation'), about=RECIPE)
  normalize_gates: bool = field(
      True, 'The gates of a token sum to 1: of topk, sigmoid and sinkhorn, '
      'from top_k 2 on.', resume=FUNCTION)
  gate_scale: float = field(
      1.0, 'multiplies the gates, normalised or not', above=0,
      resume=FUNCTION)
  jitter: float = field(
      0.0, "In training the router's input is multiplied by uniform(1 - j, "
      '1 + j).', least=0, below=1, resume=REGULARISATION, about=RECIPE)
  logit_noise: float = field(
      0.0, "Standard deviation of the noise on the router's logits in "
      'training.', least=0, resume=REGULARISATION, about=RECIPE)
  balance_loss: str = field('switch', 'what asks for even load',
                            resume=REGULARISATION, about=RECIPE)
  balance_weight: float = field(0.01, 'of the balance loss', least=0,
                                resume=REGULARISATION, about=RECIPE)
  z_loss_weight: float = field(
      0.0, "of log(Z)^2 of the router's logits", least=0,
      resume=REGULARISATION, about=RECIPE)
  expert_dropout: float = field(
      0.0, "of the experts' hidden units", least=0, below=1,
      resume=REGULARISATION, about=RECIPE)
  group_size: int = field(
      0, 'Tokens that share capacity; 0: all of a batch.', resume=FUNCTION,
      about=RECIPE)
  bias_rate: float = field(
      0.001, 'of sigmoid: how far a step moves router_bias', least=0,
      resume=REGULARISATION)

  def derived(self, c: ModelConfig) -> 'MoEConfig':
    return dataclasses.replace(self, d_ff=self.d_ff or c.d_ff)
