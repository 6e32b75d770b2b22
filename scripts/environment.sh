# shellcheck shell=bash
# Sourced by the other scripts: `environment EXTRA...` makes the virtual environment, installs this
# checkout into it with the extras and MLX's back end, and sets VENV. A second call with nothing
# new to install returns at once. The environment is .venv in the checkout; GENLIP_VENV names another.
# `pretrain RUN ARGUMENT...` starts or resumes a run there. Works with the bash 3.2 of macOS.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${GENLIP_VENV:-$ROOT/.venv}
case $VENV in
    /*) ;;
    *) VENV=$PWD/$VENV ;; # the scripts change folder later
esac

fail() {
    echo "$*" >&2
    exit 1
}

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# The extra that brings MLX's back end; on macOS mlx itself has one.
backend() {
    case $(uname -s) in
        Darwin) ;;
        Linux) if nvidia-smi >/dev/null 2>&1; then echo cuda; else echo cpu; fi ;;
        *) fail "MLX runs on macOS with Apple silicon and on Linux, not on $(uname -s)." ;;
    esac
}

make_venv() {
    local python clear=
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    python=$(find_python) || fail "No Python 3.10 or newer found; install one and run this again."
    # Rosetta: an Intel Python on an Apple silicon Mac would find no mlx.
    if [ "$(uname -s)" = Darwin ] && [ "$("$python" -c 'import platform; print(platform.machine())')" != arm64 ]; then
        fail "$python is not an Apple silicon Python, which MLX needs; install an arm64 Python."
    fi
    if [ -f "$VENV/pyvenv.cfg" ]; then
        clear=--clear # half made, or its Python is gone
    fi
    echo "Making $VENV with $("$python" --version)"
    # shellcheck disable=SC2086
    "$python" -m venv $clear "$VENV" ||
        fail "$python could not make $VENV; on Debian and Ubuntu install the package python3-venv and run this again."
}

environment() {
    local extra extras wanted stamp
    extras=$(backend) || exit 1
    for extra in "$@"; do
        extras=${extras:+$extras,}$extra
    done
    stamp=$VENV/.installed-${extras:-plain}
    wanted="$ROOT $(cksum <"$ROOT/pyproject.toml")"
    if [ -x "$VENV/bin/genlip-mlx" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    make_venv
    echo "Installing genlip-mlx${extras:+[$extras]}; the first time this takes some minutes"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$ROOT${extras:+[$extras]}" ||
        fail "Installing failed; pip's message is above."
    echo "$wanted" >"$stamp"
}

# pretrain RUN ARGUMENT...: start a run, or go on with it where it was stopped.
pretrain() {
    local run=$1
    shift
    if [ -f "$run/config.yaml" ]; then
        genlip-mlx pretrain --resume "$run"
    else
        genlip-mlx pretrain --run-dir "$run" "$@"
    fi
}
