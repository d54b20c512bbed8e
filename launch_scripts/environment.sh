# Sourced by the quickstarts and test.sh: a virtual environment with what each needs, pinned. Installs once.
#
# An active virtual environment (or conda environment) is used; otherwise .venv in the repository is made and used.

promoe_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# promoe_environment EXTRAS: of pyproject.toml, comma-separated.
promoe_environment() {
    local prefix="${VIRTUAL_ENV:-${CONDA_PREFIX:-$promoe_root/.venv}}"
    if [[ "$prefix" = *[[:space:]]* ]]; then
        echo "error: $prefix has a blank, and the first line of the command \`deepspeed\`, which pip writes, cannot name such a" \
            "Python: clone into a folder without a blank, or activate an environment in one" >&2
        return 2
    fi
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
        if [ ! -x "$promoe_root/.venv/bin/python" ]; then
            echo "creating $promoe_root/.venv"
            "${PYTHON:-python3}" -m venv "$promoe_root/.venv"
        fi
        # shellcheck disable=SC1091
        . "$promoe_root/.venv/bin/activate"
    fi
    python - <<'EOF' || return 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"promoe_ds needs Python 3.11 or newer, this is {sys.version.split()[0]}: set PYTHON to a newer one")
EOF
    local stamp wanted installed
    stamp="$(python -c 'import sys; print(sys.prefix)')/.promoe_ds_installed"
    wanted="$(cat "$promoe_root/launch_scripts/constraints.txt" "$promoe_root/pyproject.toml" | cksum) $promoe_root"
    installed="$(grep -sF "$wanted " "$stamp" || true)"  # of these versions; other versions are replaced
    if ! grep -qxF "$wanted $1" <<< "$installed"; then
        echo "installing into $(python -c 'import sys; print(sys.prefix)'), silently: 1 to 10 minutes"
        (cd "$promoe_root" && python -m pip install --quiet --disable-pip-version-check \
            --constraint launch_scripts/constraints.txt --editable ".[$1]") || return 1
        printf '%s\n' "$installed" "$wanted $1" > "$stamp"
    fi
    # One thread a rank: ranks share the cores of a laptop, and more threads add in another order.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}

# The folder of a quickstart's outputs, promoe_out: the one given, if empty, else runs/NAME, NAME-2, ...
promoe_output() {
    promoe_out="$1"
    if [ -n "$promoe_out" ] && [ -e "$promoe_out" ] && [ -n "$(ls -A "$promoe_out")" ]; then
        echo "error: $promoe_out is not empty: name another folder" >&2
        return 1
    fi
    if [ -z "$promoe_out" ]; then
        promoe_out="$promoe_root/runs/$2"
        local number=1
        while [ -e "$promoe_out" ]; do
            number=$((number + 1))
            promoe_out="$promoe_root/runs/$2-$number"
        done
    fi
    mkdir -p "$promoe_out"
    promoe_out="$(cd "$promoe_out" && pwd)"
}

promoe_free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
