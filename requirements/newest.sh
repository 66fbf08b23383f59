#!/bin/sh
# newest.sh: prints the newest Python here of the releases that are tested and
# can make a virtual environment; python3, where none is.
for python in python3.13 python3.12 python3.11; do
  if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "$python"
    exit
  fi
done
echo python3
