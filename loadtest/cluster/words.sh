# Helper functions for the lines of lines.sh. Sourced.

# Runs a command in its own terminal and keeps its exit code. Its input stays open, because kubectl detaches at the end of input.
terminal() {
    python3 -c 'import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(["bash", "-c", sys.argv[1]])))' "$1" \
        < <(sleep 10) | tr -d '\r'
    return "${PIPESTATUS[0]}"
}

ready_soon() { # FILE PATTERN
    for _ in $(seq 200); do
        grep -q "$2" "$1" 2>/dev/null && return
        sleep 0.1
    done
    echo "no $2 in $1: $(cat "$1")"
    return 1
}
