# Sourced by the scripts beside it: makes a virtual environment with the package in it, and only remakes what changed.
#   ensure_env EXTRAS [JAX_REQUIREMENT...]
# sets $python, the environment's interpreter. MEGAMOE_VENV names another folder than .venv.
#   ensure_venv
# makes the environment alone, empty: for tools that need neither the package nor a compiler.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="${MEGAMOE_VENV:-$root/.venv}"
python="$venv/bin/python"

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

# The first interpreter that is new enough; pyenv picks its own by .python-version.
find_python() {
  local candidate
  for candidate in python3.12 python3 python3.13 python3.14 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.12 or newer with venv: install python3.12 and python3.12-venv, or run 'pyenv install 3.12'" >&2
  return 1
}

# Everything that decides what gets installed and compiled.
env_fingerprint() {
  {
    echo "$@"
    find pyproject.toml build_backend jax_megamoe/cuda -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum
  } | sha256sum
}

ensure_venv() {
  local base
  if [[ -x "$python" ]]; then return; fi
  base="$(find_python)"
  "$base" -m venv "$venv"
  "$python" -m pip install --quiet --upgrade pip
}

ensure_env() {
  local extras="$1" stamp="$venv/.installed" wanted
  shift
  local requirements=("$@")
  if has_gpu; then extras="$extras,cuda13"; fi
  wanted="$(env_fingerprint "$extras" "${requirements[@]}")"
  if [[ -x "$python" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then return; fi
  echo "== setting up ${venv#"$root"/} (extras: $extras)" >&2
  ensure_venv
  rm -f "$stamp"
  "$python" -m pip install --quiet --editable ".[$extras]" "${requirements[@]}"
  echo "$wanted" >"$stamp"
}
