"""Prints findings, a line each, and returns them as rows for JSON."""

import sys


def worst(system: str, kind: str, findings) -> list[dict]:
  """Prints the worst of many findings, and each that is wrong."""
  rows, largest = [], None
  for finding in findings:
    rows.append(_row(system, kind, finding))
    if not finding.ok:
      one(system, kind, finding)
    if largest is None or not finding.error <= largest.error:
      largest = finding
  if largest is not None and largest.ok:
    one(system, kind, largest._replace(what=f'worst of {len(rows)}'))
  return rows


def one(system: str, case: str, finding) -> dict:
  """Prints a finding and returns its row."""
  print(f'{system:<12} {case:<16} {finding.what:<17} {finding.error:9.1e} '
        f'(limit {finding.limit:.0e}) {"ok" if finding.ok else "WRONG"}')
  sys.stdout.flush()
  return _row(system, case, finding)


def _row(system: str, case: str, finding) -> dict:
  return dict(system=system, case=case, what=finding.what,
              error=float(finding.error), limit=finding.limit,
              ok=bool(finding.ok))
