#!/usr/bin/env bash
# Make VENV with this project in it, editable, and all that `make demo` and `make test` need. Says a line per step and
# may be run again at any time: what is there already stays.
#
#     bash tools/setup.sh [PYTHON [VENV]]
#
# TORCH says which torch, as pip understands it (default torch==2.13.0); pip's own settings say where from. On Linux,
# PyPI's torch brings some gigabytes of CUDA. Where there is no GPU, this gets the CPU build instead:
#
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup
#
# A CUDA build of torch >= 2.10 that PYTHON can import already is used and not installed again, unless TORCH is set;
# with TORCH= (empty), so is any build. Beside such a torch no network is needed either, only what PYTHON has.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
base=${1:-python3}
venv=${2:-$root/.venv}
supported_triton='triton>=3.6,<3.7' # what the kernels were tuned with; tools/triton_matrix.sh brings the others
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { echo "setup: $*"; }
fail() {
    echo "setup: error: $*" >&2
    exit 1
}

# has_torch PYTHON any|cuda: a torch that the project can use
has_torch() {
    "$1" - "$2" 2>/dev/null <<'EOF'
import sys

import torch

new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
sys.exit(not (new and (sys.argv[1] == "any" or torch.version.cuda)))
EOF
}

make_venv() {
    local options=() version
    version=$("$base" -c 'import platform; print(platform.python_version())')
    if "$python" -c 'import pip' 2>/dev/null; then
        say "keeping $venv (Python $("$python" -c 'import platform; print(platform.python_version())'))"
        return
    fi
    if [ "$borrow" = yes ]; then
        options=(--system-site-packages)
        say "making $venv with Python $version and the torch that it has"
    else
        say "making $venv with Python $version"
    fi
    "$base" -m venv --clear ${options[@]+"${options[@]}"} "$venv" ||
        fail "$base cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)"
    if [ "$borrow" = yes ] && ! has_torch "$python" any; then
        # PYTHON is in a virtual environment itself, whose packages a new one does not see
        "$base" -c 'import site; print("\n".join(site.getsitepackages()))' >"$(site_packages)/setup_base.pth"
    fi
}

site_packages() { "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# Whether pip finds the first thing that it would need; it reports an index out of reach as success otherwise
can_download() {
    "$python" -m pip download -qq --no-deps --retries 0 --timeout 15 --dest "$scratch" 'setuptools>=77' 2>/dev/null
}

# Without a network: pip if setuptools is there, else by hand
install_project_alone() {
    if ! "$python" -m pip install -qq --no-build-isolation --no-deps --no-index --editable "$root" 2>/dev/null; then
        echo "$root/src" >"$(site_packages)/tandem_attn_src.pth"
        printf '#!/bin/sh\nexec "%s" -m tandem_attn "$@"\n' "$(cd "$venv" && pwd)/bin/python" >"$venv/bin/tandem-attn"
        chmod +x "$venv/bin/tandem-attn"
    fi
    local missing=()
    for name in triton rich matplotlib numpy pytest hypothesis; do
        "$python" -c "import $name" 2>/dev/null || missing+=("$name")
    done
    [ -x "$venv/bin/ruff" ] || missing+=(ruff)
    [ ${#missing[@]} = 0 ] || say "going without ${missing[*]}: $base has none and pip cannot download"
}

"$base" -c '' 2>/dev/null || fail "$base is no Python that runs; make PYTHON=/path/to/python3 names one"
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$base" -V 2>&1) is too old, 3.10 is needed; make PYTHON=python3.12 uses another"
python=$venv/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -z "${TORCH-unset}" ]; then
    borrow=yes
    has_torch "$base" any || has_torch "$python" any || fail "TORCH is empty, but $base has no torch >= 2.10"
elif [ -z "${TORCH+set}" ] && has_torch "$base" cuda; then
    borrow=yes
else
    borrow=no
fi
make_venv

"$python" -m pip install -qq --upgrade --retries 0 --timeout 15 pip 2>/dev/null || true # an old pip may do as well
if [ -z "${TORCH+set}" ] && has_torch "$python" any; then
    : # this one will do
elif [ -n "${TORCH-unset}" ]; then
    say "installing ${TORCH:=torch==2.13.0}"
    "$python" -m pip install -qq "$TORCH" || fail "pip cannot install $TORCH"
fi
has_torch "$python" any || fail "torch in $venv is older than 2.10 or cannot be imported: $python -c 'import torch'"

if [ "$borrow" = yes ] && ! can_download; then
    say "installing tandem-attn alone: pip cannot reach an index"
    install_project_alone
else
    say "installing tandem-attn and what its commands and tests use"
    constraints=$scratch/constraints.txt
    {
        "$python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))'
        echo "$supported_triton"
    } >"$constraints"
    "$python" -m pip install -qq --constraint "$constraints" --editable "$root[triton,cli,plot,test,dev]" ||
        fail "pip cannot install tandem-attn (above is why)"
fi
"$python" - <<'EOF'
import tandem_attn, torch

print(f"setup: ready: tandem-attn {tandem_attn.__version__}, torch {torch.__version__}")
EOF
