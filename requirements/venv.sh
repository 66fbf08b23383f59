#!/bin/sh
# venv.sh PYTHON DIR GOAL: makes the virtual environment DIR, or says in a
# sentence what is missing for it and exits 2.
set -eu
python=$1 dir=$2 goal=$3

refuse() {
  echo "error: $1" >&2
  exit 2
}

# A shim of pyenv's is there without a Python behind it.
"$python" -c '' 2>/dev/null || refuse \
  "there is no '$python' here that starts: name a Python, as in 'make $goal PYTHON=python3.12'."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || refuse \
  "archetype needs Python 3.11 or later, and '$python' is $("$python" -V 2>&1): name a later one, as in 'make $goal PYTHON=python3.12'."
"$python" -c 'import ensurepip, venv' 2>/dev/null || refuse \
  "'$python' has no venv module: on Debian and Ubuntu, 'apt-get install python3-venv' brings it; then run 'make $goal' again."
"$python" -m venv "$dir"
