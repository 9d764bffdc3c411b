#!/bin/sh
# Install qig-serve with its CPU server into a virtual environment, from the lock file.
#
#   docker/install_cpu.sh [VENV]        (default .venv)
#
# TORCH_INDEX: an extra package index that carries torch 2.13.0+cpu, for machines whose configured
# indexes do not. PIP_ARGS: further arguments for pip.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${1:-$root/.venv}
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null 2>&1 || python=python3

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
index=${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
# An old package (docopt) builds itself from a setup.py that imports its neighbour, which a safe path
# forbids.
# shellcheck disable=SC2086
PYTHONSAFEPATH="" "$venv/bin/pip" install --disable-pip-version-check --no-deps $index ${PIP_ARGS:-} \
  -r "$root/docker/requirements-cpu.lock"
"$venv/bin/pip" install --disable-pip-version-check --no-deps --no-build-isolation -e "$root"

# A CUDA build of torchvision does not import under CPU torch without this (see the file).
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp "$root/docker/torchvision_cpu.py" "$site/_torchvision_cpu.py"
echo 'import _torchvision_cpu' > "$site/_torchvision_cpu.pth"
"$venv/bin/python" -c 'import torchvision' ||
  { echo "install_cpu.sh: torchvision does not import; see docker/torchvision_cpu.py" >&2; exit 1; }
