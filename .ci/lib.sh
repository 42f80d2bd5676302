# What .ci/run is written in: environments, timed steps, the summary.

STEPS=()
FAILED=0
PASSED_TESTS=0
FAILED_TESTS=0

# Print the first Python that is new enough and can make environments.
find_python() {
    local name
    for name in ${AGENTCLUSTER_PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    echo "no Python 3.11 or newer with venv was found; set AGENTCLUSTER_PYTHON to one" >&2
    return 1
}

sshd_path() {
    command -v sshd || PATH="$PATH:/usr/sbin:/usr/local/sbin" command -v sshd
}

fresh_venv() {
    "$PYTHON" -m venv "$WORK/venv-$1"
    use_venv "$1"
    export PIP_QUIET=1
    python -m pip install --upgrade pip
}

use_venv() {
    [ -x "$WORK/venv-$1/bin/python" ] || fresh_venv "$1"
    export VIRTUAL_ENV="$WORK/venv-$1"
    export PATH="$VIRTUAL_ENV/bin:$PATH"
}

wanted() {
    local name=$1 asked
    shift
    [ $# -eq 0 ] && return 0
    for asked in "$@"; do
        [ "$asked" = "$name" ] && return 0
    done
    return 1
}

# run_step NAME SECONDS TITLE [ASKED…]: run step_NAME in a shell of its own, with a deadline, and note how it went.
run_step() {
    local name=$1 limit=$2 title=$3 rc=0 began=$SECONDS closing log="$WORK/$1.log" verdict=ok
    shift 3
    wanted "$name" "$@" || return 0
    printf '\n==> %s: %s (at most %s s)\n' "$name" "$title" "$limit"
    export WORK PYTHON
    timeout --kill-after=20 "$limit" bash -c "set -euo pipefail; $(declare -f); step_$name" 2>&1 | tee "$log" || rc=${PIPESTATUS[0]}
    closing=$(closing_line "$log")
    count_tests "$name" "$rc" "$closing"
    if [ "$name" = sshd ] && [ "$rc" -eq 0 ] && ! grep -q "passed" <<<"$closing"; then
        rc=5 closing="$closing (not one test ran over sshd)"
    fi
    if [ "$rc" -ne 0 ]; then
        verdict="FAILED (status $rc)"
        [ "$rc" -ge 124 ] && verdict="FAILED (stopped after $limit s)"
        FAILED=$((FAILED + 1))
    fi
    STEPS+=("$(printf '%-9s %4d s  %-24s %s' "$name" "$((SECONDS - began))" "$verdict" "$closing")")
    echo "==> $name: $verdict after $((SECONDS - began)) s"
}

# The last line in which pytest counts, without its frame of "=" and without colours.
closing_line() {
    { sed 's/\x1b\[[0-9;]*m//g' "$1" | grep -E '^(=+ )?[0-9]+ (passed|failed|error|errors|skipped|deselected)\b.* in [0-9.]+s' || true; } |
        tail -n 1 | sed -E 's/^=+ //; s/ =+$//'
}

# Add a closing line to the sums; a test step that has none, or that failed otherwise, counts as one failure.
count_tests() {
    local name=$1 rc=$2 line=$3 failed=0 number
    case $name in tests | sshd | deploy | browser | gpu | dist | coverage) ;; *) return 0 ;; esac
    number=$(grep -oE '[0-9]+ passed' <<<"$line" || true)
    number=${number% passed}
    PASSED_TESTS=$((PASSED_TESTS + ${number:-0}))
    while read -r number _; do
        failed=$((failed + number))
    done < <(grep -oE '[0-9]+ (failed|errors?)' <<<"$line" || true)
    if [ "$rc" -ne 0 ] && [ "$failed" -eq 0 ]; then
        failed=1
    fi
    FAILED_TESTS=$((FAILED_TESTS + failed))
}

summary() {
    printf '\n==> summary, %d s in all\n' "$SECONDS"
    printf '%s\n' "${STEPS[@]}"
    if [ "$FAILED" -eq 0 ]; then
        echo "every step is ok"
    else
        echo "$FAILED of ${#STEPS[@]} steps failed"
    fi
    echo "all test runs together: $PASSED_TESTS passed, $FAILED_TESTS failed"
    [ "$FAILED" -eq 0 ]
}
