"""Manifests of Kubernetes, against the schemas that its API publishes.

The package kubernetes-validate carries the OpenAPI schemas of Kubernetes
itself, and refuses fields that they do not name, as `kubectl create` does. Of
JobSet no package carries any: JOBSET has, written down by hand, what the
launchers use of it, and $ARCHETYPE_JOBSET_CRD may name the whole definition,
config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of a release of
github.com/kubernetes-sigs/jobset.
"""

import os
import pathlib

import yaml

# The first release of Kubernetes whose Jobs have everything that is used here
# without a feature gate (backoffLimitPerIndex). The newest one that the package
# has is tried too.
OLDEST = '1.33'
CRD = 'ARCHETYPE_JOBSET_CRD'

# Of JobSet's definition, what is used of it, as 0.10.0 and 0.12.0 both have it:
# a tuple is a list of such, a set the words that a string may be, dict[str] any
# names. `template` is a Job's, which Kubernetes' own schema has.
JOBSET = dict(
    apiVersion={'jobset.x-k8s.io/v1alpha2'}, kind={'JobSet'},
    metadata=dict(name=str, namespace=str, labels={str: str},
                  annotations={str: str}),
    spec=dict(
        failurePolicy=dict(maxRestarts=int, rules=(dict(
            name=str, action={'FailJobSet', 'RestartJobSet',
                              'RestartJobSetAndIgnoreMaxRestarts'},
            onJobFailureReasons=(str,), onJobFailureMessagePatterns=(str,)),)),
        network=dict(enableDNSHostnames=bool, publishNotReadyAddresses=bool),
        replicatedJobs=(dict(name=str, replicas=int, template=dict),)))
# Of these, what must be there.
_REQUIRED = {'apiVersion', 'kind', 'metadata', 'spec', 'name', 'replicatedJobs',
             'template', 'action'}


def check(manifest: dict) -> None:
  """Asserts that the API of each version has what a Job or JobSet says."""
  if manifest['kind'] == 'Job':
    check_job(manifest)
    return
  check_jobset(manifest)
  for replicated in manifest['spec']['replicatedJobs']:
    check_job({'apiVersion': 'batch/v1', 'kind': 'Job',
               'metadata': {'name': 'one'}, **replicated['template']})
  if CRD in os.environ:
    check_definition(manifest, pathlib.Path(os.environ[CRD]))


def check_job(job: dict) -> None:
  """Raises the package's ValidationError for what batch/v1 does not have."""
  import kubernetes_validate
  for version in (OLDEST, kubernetes_validate.latest_version()):
    kubernetes_validate.validate(job, version, strict=True)


def check_jobset(value, schema=None, where='') -> None:
  """Asserts that `value` has the form of JOBSET."""
  schema = JOBSET if schema is None else schema
  if isinstance(schema, dict):
    assert isinstance(value, dict), where
    missing = (_REQUIRED & schema.keys()) - value.keys()
    assert not missing, f'{where} lacks {missing}'
    for key, inner in value.items():
      assert isinstance(key, str) and (key in schema or str in schema), (
          f'{where}.{key}')
      check_jobset(inner, schema.get(key, schema.get(str)), f'{where}.{key}')
  elif isinstance(schema, tuple):
    assert isinstance(value, list), where
    for i, inner in enumerate(value):
      check_jobset(inner, schema[0], f'{where}[{i}]')
  elif isinstance(schema, set):
    assert value in schema, f'{where}: {value!r}'
  else:
    assert type(value) is schema, f'{where}: {value!r}'


def check_definition(manifest: dict, path: pathlib.Path) -> None:
  """Raises jsonschema's ValidationError for what a custom resource's
  definition does not have."""
  import jsonschema
  jsonschema.Draft202012Validator(definition(path)).validate(manifest)


def definition(path: pathlib.Path) -> dict:
  """Returns the schema of the version that is served, refusing other fields."""
  found = yaml.load(path.read_text(), yaml.CSafeLoader)
  version, = (v for v in found['spec']['versions'] if v['served'])
  schema = version['schema']['openAPIV3Schema']
  # Every resource has these, which a definition leaves to Kubernetes.
  schema['properties'] |= {
      'metadata': {'type': 'object', 'properties': {
          'name': {'type': 'string'}, 'namespace': {'type': 'string'},
          **{name: {'type': 'object', 'additionalProperties': {
              'type': 'string'}} for name in ('labels', 'annotations')}}}}
  return _strict(schema)


def _strict(schema: dict) -> dict:
  if not isinstance(schema, dict):
    return schema
  result = {key: ([_strict(s) for s in value] if key in ('anyOf', 'allOf')
                  else value) for key, value in schema.items()}
  for key in ('items', 'additionalProperties'):
    if key in schema:
      result[key] = _strict(schema[key])
  if 'properties' in schema:
    result['properties'] = {name: _strict(inner)
                            for name, inner in schema['properties'].items()}
    if not schema.get('x-kubernetes-preserve-unknown-fields'):
      result.setdefault('additionalProperties', False)
  return result


def check_known(definition: dict, known=None, where: str = '') -> None:
  """Asserts that JOBSET names what a definition has, and of its types."""
  known = JOBSET if known is None else known
  kinds = {dict: 'object', tuple: 'array', set: 'string', str: 'string',
           int: 'integer', bool: 'boolean'}
  kind = known if isinstance(known, type) else type(known)
  assert definition['type'] == kinds[kind], where
  if isinstance(known, dict) and str not in known:
    for name, inner in known.items():
      assert name in definition['properties'], f'{where}.{name}'
      check_known(definition['properties'][name], inner, f'{where}.{name}')
  elif isinstance(known, tuple):
    check_known(definition['items'], known[0], f'{where}[]')
  elif isinstance(known, set) and 'enum' in definition:
    assert known <= set(definition['enum']), where
