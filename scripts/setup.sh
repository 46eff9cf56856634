#!/usr/bin/env bash
# Makes the development environment: a virtual environment with torch, verl and this project (editable).
# Repeating it costs nothing: a stamp keyed by constraints, pyproject and interpreter says whether it is current.
#
#   VENV              where to put it (default .venv)
#   PYTHON            which interpreter (default: the first of python3, python3.13, .12, .11 that fits)
#   PIP_FIND_LINKS    a folder or page with wheels of your own, e.g. a CPU build of torch; it is preferred
#   UV_TORCH_BACKEND  cpu, cu130, ...: which build of torch. Unset: cpu where that index answers and no
#                     NVIDIA driver is here, else PyPI's build (on Linux several GB of CUDA libraries,
#                     which work without a GPU too)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
fits='import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && "$candidate" -c "$fits" 2>/dev/null; then python=$candidate; break; fi
  done
fi
if [ -z "$python" ] || ! "$python" -c "$fits"; then
  echo "setup: no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python3.12 make setup" >&2
  exit 1
fi

key=$({ cat constraints.txt pyproject.toml scripts/setup.sh; "$python" -VV; pwd; } | sha256sum | cut -c1-16)
stamp=$venv/.setup-$key
[ -e "$stamp" ] && exit 0

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if command -v uv >/dev/null; then
  uv=uv
else
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv>=0.9"
  uv=$venv/bin/uv
fi

# uv has its own names for what pip's environment says.
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
export SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-}}
[ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS
[ -n "$SSL_CERT_FILE" ] || unset SSL_CERT_FILE

torch=$(grep -oE '^torch==[0-9.]+' constraints.txt)
own_wheel=$(ls "${UV_FIND_LINKS:-/nonexistent}"/torch-*.whl 2>/dev/null || true)
if [ -z "${UV_TORCH_BACKEND:-}" ] && [ -z "$own_wheel" ] && ! command -v nvidia-smi >/dev/null; then
  if echo "$torch" | UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=0 "$uv" pip compile --quiet --torch-backend cpu - >/dev/null 2>&1; then
    export UV_TORCH_BACKEND=cpu
  else
    echo "setup: torch's CPU index is out of reach: taking PyPI's build (several GB the first time)" >&2
  fi
fi

echo "setup: installing into $venv (the first time downloads up to 6 GB)" >&2
quiet=$([ -t 2 ] || echo --quiet)  # on a terminal uv's progress is worth its lines
VIRTUAL_ENV=$venv "$uv" pip install $quiet --python "$venv/bin/python" --constraint constraints.txt \
  --editable ".[trainer,wandb,store,dev]"
rm -f "$venv"/.setup-*
touch "$stamp"
echo "setup: done" >&2
