#!/usr/bin/env bash
# One entry for everything a developer or CI does with this project. `./build.sh help` lists it.
set -euo pipefail
cd "$(dirname "$0")"

SUPPORTED="3.11 3.12 3.13"
BOTOCORE_VERSION=1.44.5
# The existing tool, for benchmarks only; it runs on Python 3.12 alone.
PEER_VERSION=0.8.3

say() { printf '%s\n' "build.sh: $*" >&2; }
die() { say "$*"; exit 1; }

# Print the path of an interpreter of version $1, or nothing. A version manager's shim may exist
# on PATH without an interpreter behind it, so every candidate is run.
find_python() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python3 python3; do
    if "$candidate" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
}

# Print the interpreters to use, one a line: $PYTHON alone when it is set, else every supported one
# that is present when $1 is "all", else the first.
interpreters() {
  if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" || die "PYTHON=$PYTHON is no command"
    return
  fi
  local version found count=0
  for version in $SUPPORTED; do
    found=$(find_python "$version")
    [ -n "$found" ] || continue
    printf '%s\n' "$found"
    count=$((count + 1))
    [ "$1" = all ] || return 0
  done
  [ "$count" -gt 0 ] && return
  if [ -z "${VENV_ENSURED:-}" ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    ensure_debian python3 python3-venv
    VENV_ENSURED=1 interpreters "$1"
    return
  fi
  die "needs Python ${SUPPORTED// / or } with venv; on Debian and Ubuntu: apt-get install python3-venv"
}

# Install the Debian packages named, where that can be done; tests skip with a reason otherwise.
ensure_debian() {
  command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || return 0
  local package missing=()
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ "${#missing[@]}" -gt 0 ] || return 0
  say "installing Debian packages: ${missing[*]}"
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
      apt-get install -q -y --no-install-recommends "${missing[@]}"; } >/dev/null \
    || say "could not install ${missing[*]}: what needs them is skipped"
}

# Make or reuse the environment of interpreter $1 with the extras $2, in one of its own if $3 names
# that; print its directory.
ensure_environment() {
  local python=$1 extras=$2 version directory stamp
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  directory=".venv/${3:+$3-}$version"
  stamp="$extras $(sha256sum setup.cfg | cut -d' ' -f1)"
  if [ "$(cat "$directory/.stamp-$extras" 2>/dev/null)" != "$stamp" ]; then
    say "preparing $directory ($extras)"
    { [ -x "$directory/bin/python" ] || "$python" -m venv "$directory"; } \
      && "$directory/bin/pip" install -q --disable-pip-version-check -e ".[$extras]" >&2 \
      || die "could not install the extras [$extras] of setup.cfg in $directory"
    printf '%s\n' "$stamp" > "$directory/.stamp-$extras"
  fi
  printf '%s\n' "$directory"
}

# Botocore's own test cases come with its source distribution only.
ensure_oracles() {
  local archive=".venv/oracles/botocore-$BOTOCORE_VERSION.tar.gz"
  [ -f "$archive" ] && return
  mkdir -p .venv/oracles
  "$1/bin/pip" download -q --disable-pip-version-check --no-deps --no-binary botocore \
    -d .venv/oracles "botocore==$BOTOCORE_VERSION" >&2 || say "no botocore sdist: its endpoint cases are skipped"
}

# Run the tests on each interpreter: every one that is present in CI, the first one elsewhere.
run_tests() {
  local pythons python environment once=()
  pythons=$(interpreters "${CI:+all}")
  ensure_debian openssl util-linux e2fsprogs mount procps busybox-static gcc libc6-dev musl-tools podman runc skopeo umoci docker-registry
  for python in $pythons; do
    environment=$(ensure_environment "$python" test)
    ensure_oracles "$environment"
    say "testing with $("$environment/bin/python" --version)"
    "$environment/bin/python" -m pytest -n "${WORKERS:-4}" --dist loadfile "${once[@]}" "$@"
    # The binary is the same for all; from end to end the zipapp is run by the last of them.
    once=(--ignore tests/test_binary.py --ignore tests/test_containers.py --ignore tests/e2e)
  done
  [ $# -gt 0 ] || test_frozen "$environment"
}

# Run the end-to-end tests against the binary and against the zipapp; in CI both must be there.
test_frozen() {
  local binary zipapp pytest=("$1/bin/python" -m pytest -n "${WORKERS:-4}" --dist loadfile)
  if ! { binary=$(run_freeze binary | tail -n 1) && zipapp=$(run_freeze zipapp | tail -n 1); }; then
    [ -z "${CI:-}" ] || die "the frozen forms could not be built"
    say "the frozen forms could not be built: they are not tested"
    return
  fi
  say "testing ${binary##*/}"
  SHIM_COMMAND=$binary "${pytest[@]}" tests/e2e
  say "testing ${zipapp##*/}"
  SHIM_COMMAND="$PWD/$1/bin/python $zipapp" "${pytest[@]}" tests/e2e
}

# Print the interpreter to freeze: the distribution's, with its shared library and no RUNPATH.
frozen_interpreter() {
  if [ -z "${PYTHON:-}" ] && /usr/bin/python3 -c \
      'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    printf '%s\n' /usr/bin/python3
  else
    interpreters first
  fi
}

# Make the form $1 of the shim in dist/; the last line printed is its path.
run_freeze() {
  local python environment
  ensure_debian python3-venv binutils patchelf gcc musl-tools zlib1g-dev
  python=$(frozen_interpreter)
  ensure_debian "$("$python" -c 'import sys; print("libpython%d.%d" % sys.version_info[:2])')"
  mkdir -p .venv
  # Tests that run side by side may ask for it at once.
  exec 9> .venv/.freeze.lock && flock 9
  environment=$(ensure_environment "$python" freeze freeze)
  "$environment/bin/python" .ci/freeze.py "$@" 9>&-
  exec 9>&-
}

run_check() {
  local environment
  environment=$(ensure_environment "$(interpreters first)" check)
  "$environment/bin/flake8" shim tests
  "$environment/bin/ruff" format --isolated --line-length 100 --check -q shim tests \
    || die "not formatted: run ./build.sh format"
  "$environment/bin/mypy"
  say "lint, format and types are clean"
}

run_format() {
  local environment
  environment=$(ensure_environment "$(interpreters first)" check)
  "$environment/bin/ruff" format --isolated --line-length 100 shim tests
}

run_bench() {
  local environment peer=.venv/peer python
  environment=$(ensure_environment "$(interpreters first)" test)
  environment=$(ensure_environment "$(interpreters first)" bench)
  ensure_debian nginx-light openssl
  python=$(find_python 3.12)
  if [ -n "$python" ] && [ ! -x "$peer/bin/sagemaker-shim" ]; then
    "$python" -m venv "$peer"
    "$peer/bin/pip" install -q --disable-pip-version-check "sagemaker-shim==$PEER_VERSION" >&2
  fi
  [ -x "$peer/bin/sagemaker-shim" ] || say "no Python 3.12: sagemaker-shim $PEER_VERSION is left out of the comparison"
  local bench
  for bench in tests/bench/bench_*.py; do
    say "$bench"
    "$environment/bin/python" -m "tests.bench.$(basename "$bench" .py)" ${peer:+--peer "$peer/bin/python"} "$@"
  done
}

usage() {
  cat <<'HELP'
usage: ./build.sh COMMAND [ARGUMENTS]

  test [PYTEST ARGUMENTS]   make an environment below .venv, install what the tests need, run them
  check                     lint, formatting and types (flake8, ruff format, mypy --strict)
  format                    format the sources
  binary                    make the static binary in dist/, with its .tar.gz and checksums.txt
  zipapp                    make dist/*.pyz, for images that have Python 3.11 or newer
  bench [ARGUMENTS]         measure against the existing tools; prints ratios of the same run
  help                      this text

PYTHON=/path/to/python3 chooses the interpreter (3.11 or newer; default: the first one found;
with CI set, tests run on every supported one that is present). WORKERS=N sets the number of
test processes.
HELP
}

command=${1:-help}
[ $# -eq 0 ] || shift
case "$command" in
  test) run_tests "$@" ;;
  check) run_check ;;
  format) run_format ;;
  binary | zipapp) run_freeze "$command" "$@" ;;
  bench) run_bench "$@" ;;
  help | -h | --help) usage ;;
  *) usage >&2; die "no command $command" ;;
esac
