"""The readers of compiled programs: collectives, their groups, runs and bytes.
Texts are cut from real programs."""


import numpy as np
import pytest

from tools.plan import collectives


@pytest.mark.parametrize('text, members', [
    ('replica_groups={{0,2},{1,3}}, x', [[0, 2], [1, 3]]),
    ('replica_groups=[2,2]<=[4], x', [[0, 1], [2, 3]]),
    ('replica_groups=[4,2]<=[2,2,2]T(2,1,0), x',
     [[0, 4], [2, 6], [1, 5], [3, 7]]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, use",
     [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=1,'b'=2,'c'=2] {'c','b'}", [[0, 2, 1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([4]<=[2,2]T(1,0)) {'b'}",
     [[0, 2], [1, 3]]),
    ('source_target_pairs={{0,1},{1,0}}', [[0, 1], [1, 0]]),
    ('channel_id=3', None)])
def test_groups_in_every_syntax(text, members):
  got = collectives.groups(text)
  assert (got.tolist() if got is not None else None) == members


def test_axes_are_those_along_which_a_group_differs():
  mesh = dict(data=1, fsdp=2, expert=2, tensor=2)
  axes = lambda *rows: collectives.axes_of(np.array(rows), mesh)
  assert axes([0, 4], [1, 5]) == ('fsdp',)
  assert axes([0, 2], [1, 3]) == ('expert',)
  assert axes([0, 1, 4, 5]) == ('fsdp', 'tensor')


# What libtpu 0.0.50 and XLA's CPU and GPU backends write, shortened.
PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1.clone (input.1: bf16[64,8]) -> bf16[16,8] {
  %input.1 = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input.1), \
replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %slice.1 = bf16[16,8]{1,0} dynamic-slice(%all-reduce.1), x={16,8}
}

%condition.7 (p: (s32[], bf16[16,8])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(4)
  %p = (s32[]{:T(128)}, bf16[16,8]{1,0}) parameter(0)
  %gte = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%gte, %constant.4), direction=LT, m={}
}

%body.7 (p.1: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %p.1 = (s32[]{:T(128)}, /*index=1*/bf16[16,8]{1,0:T(8,128)}) parameter(0)
  %ag = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%x), \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, metadata={op_name="go/on"}
  %agd = bf16[64,8]{1,0} all-gather-done(%ag)
  %ragged = bf16[80,2,8]{2,1,0:T(2,128)} ragged-all-to-all(%x, %y, %z), \
replica_groups=mesh['fsdp'=4,'tensor'=2] {'tensor'}, channel_id=1
  %rs = ((bf16[80,2,8]{2,1,0:T(2,128)(2,1)}, s32[4]{0}), \
bf16[80,2,8]{2,1,0:T(2,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
ragged-all-to-all-start(%x, %y), replica_groups=[2,4]<=[4,2]T(1,0)
  %fused = bf16[16,8]{1,0} fusion(%agd), kind=kCustom, \
calls=%all-reduce-scatter.1.clone
  %w = (s32[], f32[4]) while(%t), condition=%data.1, body=%inner.1
  ROOT %out = (s32[], bf16[16,8]) tuple(%i, %fused)
}

%data.1 (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[], f32[4]) parameter(0)
  ROOT %ne = pred[] compare(%a, %b), direction=NE
}

%inner.1 (r: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = (s32[], f32[4]) parameter(0)
  %permute = f32[4] collective-permute(%v), source_target_pairs={{0,1},{1,0}}
  ROOT %o = (s32[], f32[4]) tuple(%i, %permute)
}

ENTRY %main (arg: bf16[16,8]) -> f32[4] {
  %arg = bf16[16,8]{1,0} parameter(0)
  %while.1 = (s32[], bf16[16,8]) while(%t), condition=%condition.7, \
body=%body.7
  %while.2 = (s32[], f32[4]) while(%t), condition=%data.1, body=%inner.1, \
backend_config={"known_trip_count":{"n":"3"}}
  %both = (f32[4], f32[6]) all-reduce(%a, %b), replica_groups=[1,8]<=[8]
  %alone = f32[9] all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %gte = f32[4] get-tuple-element(%both), index=0
}
"""
MESH = dict(data=1, fsdp=4, expert=1, tensor=2)


def test_every_collective_is_read_with_its_runs_and_bytes():
  found = collectives.read(PROGRAM, MESH, host_of=np.zeros(8, int),
                           ragged_rows=20)
  rows = {(c.kind, c.axes, c.runs, c.known): c for c in found}
  assert len(rows) == len(found)
  sent = {key: c.sent for key, c in rows.items()}
  one = 64 * 8 * 2  # bytes of the whole bf16[64,8]
  assert sent == {
      ('all-gather', ('fsdp',), 4, True): one * 3 / 4,
      ('ragged-all-to-all', ('tensor',), 4, True): 20 * 16 * 2 / 2,
      ('ragged-all-to-all', ('fsdp',), 4, True): 20 * 16 * 2 * 3 / 4,
      ('reduce-scatter', ('fsdp',), 4, True): one * 3 / 4,
      ('collective-permute', ('tensor',), 4, False): 16,
      ('collective-permute', ('tensor',), 3, True): 16,
      ('all-reduce', ('fsdp', 'tensor'), 1, True): 2 * 7 / 8 * 40}
  assert next(c for c in found if c.kind == 'all-gather').source == 'go/on'
  told = collectives.read(PROGRAM, MESH, host_of=np.zeros(8, int), passes=6)
  assert all(c.known for c in told)
  assert {c.runs for c in told if c.kind == 'collective-permute'} == {24, 3}
  table = collectives.table(found)
  permutes = next(r for r in table if r['kind'] == 'collective-permute')
  assert permutes['runs_per_step'] == 7 and not permutes['exact']
  assert permutes['bytes_sent_per_device'] == 7 * 16


def test_bytes_between_hosts_are_at_best_those_of_rings_over_hosts():
  def one(kind, payload):
    return collectives.Collective(kind, ('fsdp',), 8, 2, 'f32', 1, payload, 1,
                                  True, '')
  # Two hosts of four: half of the result enters each, by four adapters.
  assert one('all-gather', 800).sent_outside == 800 / 2 / 4
  assert one('reduce-scatter', 100).sent_outside == 800 / 2 / 4
  assert one('all-reduce', 800).sent_outside == 2 * 800 / 2 / 4
  assert one('all-to-all', 800).sent_outside == 400
  assert one('all-gather', 800)._replace(hosts=1).sent_outside == 0


def test_a_gather_that_several_fusions_print_is_one():
  gather = ('  %g.{0} = bf16[8,4]{{1,0}} all-gather(bf16[1,4]{{1,0}} %p.{0}), '
            'channel_id={1}, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, '
            'dimensions={{0}}')
  fusion = '%fused_computation.{0} (p.{0}: bf16[1,4]) -> bf16[8,4] {{\n' + (
      gather + '\n}}\n')
  call = ('  %c.{0} = bf16[8,4]{{1,0}} fusion(bf16[1,4]{{1,0}} %x), kind=kLoop,'
          ' calls=%fused_computation.{0}')
  text = ''.join(fusion.format(i, channel) for i, channel in enumerate(
      (5, 5, 6))) + 'ENTRY %main (x: bf16[1,4]) -> bf16[8,4] {\n' + '\n'.join(
          call.format(i) for i in range(3)) + '\n}\n'
  found = collectives.read(text, dict(fsdp=8), host_of=np.zeros(8, int))
  assert [c.kind for c in found] == ['all-gather'] * 2
