#!/usr/bin/env bash
# Bring every supported Triton into VENV/triton-X.Y.Z, for tests/test_compile.py: 700 MB to 1 GB each on disk, downloaded
# once. tools/tritons.txt lists them, each with the oldest Python it has wheels for. What VENV itself has is not fetched again.
# TANDEM_TRITON_MATRIX=0 skips all of it. A version that cannot be had leaves its reason in VENV/triton-X.Y.Z.failed:
# the tests name it when they skip, and with CI=true it is an error.
#
#     bash tools/triton_matrix.sh [VENV]
set -u
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-$here/../.venv}
python=$venv/bin/python
[ "${TANDEM_TRITON_MATRIX:-1}" = 0 ] && exit 0

installed=$("$python" -c 'import importlib.metadata as m; print(m.version("triton"))' 2>/dev/null || echo none)
missing=0
while read -r version oldest; do
    target=$venv/triton-$version
    if [ "$version" = "${installed%%+*}" ] || [ -d "$target" ]; then
        continue
    fi
    if ! "$python" -c "import sys; sys.exit(sys.version_info[:2] < tuple(map(int, '$oldest'.split('.'))))"; then
        continue
    fi
    echo "triton $version for the compile tests: downloading into $target"
    rm -rf "$target.partial" "$target.failed"
    if "$python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --target "$target.partial" "triton==$version" 2>"$target.failed"; then
        mv "$target.partial" "$target"
        rm -f "$target.failed"
    else
        rm -rf "$target.partial"
        echo "triton $version cannot be had: $(tail -n 1 "$target.failed")"
        missing=1
    fi
done <"$here/tritons.txt"
[ "$missing" = 1 ] && [ "${CI:-}" = true ] && exit 1
exit 0
