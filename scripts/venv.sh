# Sourced by the other scripts. `make_venv .` or `make_venv ".[dev]"` makes or reuses .venv with eri
# and the pinned versions in it.

say() { echo "eri: $*" >&2; }

find_python() { # the first Python that is new enough and can make a virtual environment
    local name too_old="" no_venv=""
    for name in python3 python3.13 python3.12 python3.11 python; do
        "$name" -c '' 2>/dev/null || continue
        if ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            too_old="$name"
        elif ! "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            no_venv="$name"
        else
            command -v "$name"
            return
        fi
    done
    if [ -n "$no_venv" ]; then
        say "error: $("$no_venv" -V) has no venv module; on Debian and Ubuntu: apt install python3-venv"
    elif [ -n "$too_old" ]; then
        say "error: Python 3.11 or newer is needed, found $("$too_old" -V 2>&1)"
    else
        say "error: Python 3.11 or newer is needed, found none"
    fi
    return 1
}

make_venv() { # installs only when this folder, its Python or the pins changed since the last time
    local wanted=$1 python pins have
    if ! .venv/bin/python -c '' 2>/dev/null; then
        python=$(find_python)
        say "making .venv with $("$python" -V)"
        "$python" -m venv --clear .venv
    fi
    pins="$PWD $(cat pyproject.toml constraints.txt | cksum)"
    for have in "$wanted" ".[dev]"; do
        if grep -qxsF "$pins $have" .venv/installed; then return; fi
    done
    say "installing the pinned versions into .venv (the first time takes minutes)"
    .venv/bin/python -m pip install --disable-pip-version-check -q --no-compile \
        -c constraints.txt -e "$wanted"
    .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null || true # pip would, on one core
    echo "$pins $wanted" >.venv/installed
}
