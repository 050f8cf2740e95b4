#!/usr/bin/env bash
# This runs three hospitals on this machine: three keys, one federation file, three processes that talk over TLS only.
# Run scripts/setup once before. Ctrl-C saves; `run.sh --resume` goes on. Other arguments go to all: --set train.rounds=5
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v dlora >/dev/null || PATH="$here/../../.venv/bin:$PATH"
dlora=$(command -v dlora) || { echo "three hospitals: dlora is not installed; run scripts/setup first" >&2; exit 2; }
PATH="$(dirname "$dlora"):$PATH" # the python beside that dlora
folder=${FOLDER:-runs/three-hospitals}
export DEMO_DATA="$folder/data" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
say() { echo "three hospitals: $*"; }

if [ "${1:-}" = --resume ]; then
    shift
else
    if [ -e "$folder" ] && [ ! -e "$folder/collect.log" ]; then say "$folder holds something else; choose another: FOLDER=..." >&2; exit 2; fi
    rm -rf "$folder" # it holds an earlier run
    mkdir -p "$folder"
    say "reading the docstrings of eight installed libraries (10 s)"
    python "$here/../demo/collect.py" "$DEMO_DATA" >"$folder/collect.log"
    cat "$DEMO_DATA"/organisation-[123].jsonl >"$DEMO_DATA/north.jsonl"
    cat "$DEMO_DATA"/organisation-[456].jsonl >"$DEMO_DATA/south.jsonl"
    cat "$DEMO_DATA"/organisation-[78].jsonl >"$DEMO_DATA/west.jsonl"

    say "making a key for each, which stays where it is, and a member file for the others"
    read -r north south < <(python -c 'import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))')
    dlora identity new north --address "127.0.0.1:$north" --folder "$folder"
    dlora identity new south --address "127.0.0.1:$south" --folder "$folder"
    dlora identity new west --folder "$folder" # it has no address: it only dials, as from behind a firewall
    dlora identity federation "$folder"/{north,south,west}.member.yaml >"$folder/federation.yaml"
fi

say "starting a process for each (2 minutes on two quiet cores); to watch: tail -f $folder/*/log.jsonl"
peers=() failed=0 stopping=
trap 'kill "${peers[@]}" 2>/dev/null || true' EXIT # no process is left when this script ends, for any reason
set -m # each peer gets a process group, so that only the trap below sends it Ctrl-C
for name in north south west; do
    resume=
    [ ! -e "$folder/$name/config.yaml" ] || resume=--resume # go on where the peer stopped, as a service does
    dlora peer "$here/run.yaml" --name "$name" --key "$folder/$name.key" --federation "$folder/federation.yaml" \
        --set "data.train=$DEMO_DATA/$name.jsonl" --set "output_dir=$folder/$name" ${resume:+"$resume"} "$@" \
        >"$folder/$name.out" 2>&1 </dev/null &
    peers+=($!)
done
set +m
trap 'stopping=yes; kill -INT "${peers[@]}" 2>/dev/null || true' INT

progress() { # print "north 12, south 12, west 11"
    for name in north south west; do
        printf '%s %s, ' "$name" "$(cat "$folder/$name/log.jsonl" 2>/dev/null | grep -c '"event": "round"')"
    done
}
while [ -n "$(jobs -pr)" ]; do
    [ ! -t 1 ] || printf '\rrounds done: %s' "$(progress | sed 's/, $//')"
    sleep 1 || true
    for peer in "${peers[@]}"; do
        if ! kill -0 "$peer" 2>/dev/null && ! wait "$peer" && [ "$failed" = 0 ]; then
            wait "$peer" || failed=$?
            # The other peers would go on without it. Here the user should see the mistake.
            [ "$stopping" ] || kill "${peers[@]}" 2>/dev/null || true
        fi
    done
done
[ ! -t 1 ] || echo

if [ "$stopping" ]; then
    say "stopped, and saved after the last round of each; go on with: $0 --resume${*:+ $*}"
    exit 4
elif [ "$failed" != 0 ]; then
    tail -n 3 "$folder"/{north,south,west}.out >&2
    exit "$failed"
fi
python "$here/compare.py" "$folder"
