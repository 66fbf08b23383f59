"""One tensor of Hugging Face's that holds several parameters of ours."""

import numpy as np

from architectures.parts.hf import tensor_map


def test_parts_of_other_sizes_follow_one_another():
  """Grouped heads in one matrix, as Phi-3 has them: four of queries, then two
  of keys, then two of values, of three features each."""
  shapes = {f'layers/{name}': (2, 5, heads, 3) for name, heads in (
      ('query', 4), ('key', 2), ('value', 2))}
  row = ('layers/query|key|value', 'LDHK|LDJK|LDJK', 'qkv', 'L HK+JK+JK D')
  tensor, = tensor_map.expand([row], shapes)
  assert tensor.shape == (2, 24, 5)
  theirs = np.arange(240).reshape(tensor.shape)
  ranges = [{a: (0, tensor.sizes[a]) for a in axes} for axes in tensor.ours]
  ours = [tensor.part(lambda at: theirs[at], i, ranges[i]) for i in range(3)]
  assert [x.shape for x in ours] == [shapes[path] for path in tensor.paths]
  assert ours[1][1, 4, 1, 2] == theirs[1, 12 + 3 + 2, 4]
  assert ours[2][0, 3, 0, 1] == theirs[0, 18 + 1, 3]
  np.testing.assert_array_equal(tensor.join(ours), theirs)
  # Of one key head and some of D, only its rows and columns are asked for.
  asked = []
  def cut(at):
    asked.append(at)
    return theirs[at]
  np.testing.assert_array_equal(
      tensor.part(cut, 1, ranges[1] | dict(J=(1, 2), D=(2, 5))),
      ours[1][:, 2:, 1:])
  assert asked == [(slice(0, 2), slice(15, 18), slice(2, 5))]


def test_a_dimension_of_one_is_theirs_alone():
  """The filters of several parameters as torch.nn.Conv1d has them."""
  shapes = {'layers/value_conv': (2, 4, 3, 5), 'layers/key_conv': (2, 4, 1, 2)}
  row = ('layers/value_conv|key_conv', 'LWHK|LWJU', 'conv1d', 'L HK+JU 1 W')
  tensor, = tensor_map.expand([row], shapes)
  assert tensor.shape == (2, 17, 1, 4)
  theirs = np.arange(136).reshape(tensor.shape)
  ranges = [{a: (0, tensor.sizes[a]) for a in axes} for axes in tensor.ours]
  ours = [tensor.part(lambda at: theirs[at], i, ranges[i]) for i in range(2)]
  assert [x.shape for x in ours] == [shapes[path] for path in tensor.paths]
  assert ours[0][1, 3, 2, 4] == theirs[1, 14, 0, 3]
  assert ours[1][1, 2, 0, 1] == theirs[1, 16, 0, 2]
  np.testing.assert_array_equal(tensor.join(ours), theirs)


def test_dimensions_of_one_may_be_several():
  """As Kimi Linear has those of the decays of heads, [1, 1, H, 1]."""
  tensor, = tensor_map.expand([('a', 'HK', 'A_log', '1 1 K 1 H')],
                              {'a': (4, 3)})
  assert tensor.shape == (1, 1, 3, 1, 4)
  theirs = np.arange(12).reshape(tensor.shape)
  x = tensor.part(lambda at: theirs[at], 0, dict(H=(1, 3), K=(0, 3)))
  np.testing.assert_array_equal(x, theirs[0, 0, :, 0, 1:3].T)
  whole = tensor.part(lambda at: theirs[at], 0, dict(H=(0, 4), K=(0, 3)))
  np.testing.assert_array_equal(tensor.join([whole]), theirs)


def test_groups_of_heads_stand_in_one_matrix():
  """As Qwen3-Next has it: of each of two heads of keys its query, its key, and
  its three heads of values, of three and of two features."""
  shapes = {name: (5, heads, size) for name, heads, size in (
      ('query', 2, 3), ('key', 2, 3), ('value', 6, 2))}
  tensor, = tensor_map.expand(
      [('query|key|value', 'DJK|DJK|DHU', 'qkv', 'J(K+K+RU) D')], shapes)
  assert tensor.shape == (24, 5)
  theirs = np.arange(120).reshape(tensor.shape)
  asked = []
  def cut(at):
    asked.append(at)
    return theirs[at]
  whole = [dict(zip(axes, ((0, n) for n in shapes[path])))
           for axes, path in zip(tensor.ours, tensor.paths)]
  ours = [tensor.part(cut, i, whole[i]) for i in range(3)]
  assert [x.shape for x in ours] == [*shapes.values()]
  assert ours[1][4, 1, 2] == theirs[12 + 3 + 2, 4]
  assert ours[2][3, 5, 1] == theirs[12 + 6 + 2 * 2 + 1, 3]
  np.testing.assert_array_equal(tensor.join(ours), theirs)
  # Of heads, and of some of D, their groups and its columns are asked for.
  for heads, rows in (((4, 6), (12, 24)), ((2, 4), (0, 24))):
    del asked[:]
    np.testing.assert_array_equal(
        tensor.part(cut, 2, whole[2] | dict(H=heads, D=(1, 3))),
        ours[2][1:3, slice(*heads)])
    assert asked == [(slice(*rows), slice(1, 3))]
