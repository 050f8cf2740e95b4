#!/usr/bin/env bash
# This runs a cloud and two devices on this machine. The frozen model runs in one process. Texts, labels and adapters stay in
# the two others; the processes talk over TLS only. Then it trains each adapter again without a cloud, to compare.
# Run scripts/setup once before. Arguments go to both devices: --set train.rounds=5
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v dlora >/dev/null || PATH="$here/../../.venv/bin:$PATH"
dlora=$(command -v dlora) || { echo "phone and cloud: dlora is not installed; run scripts/setup first" >&2; exit 2; }
PATH="$(dirname "$dlora"):$PATH" # the python beside that dlora
folder=${FOLDER:-runs/phone-and-cloud}
export DEMO_DATA="$folder/data" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
say() { echo "phone and cloud: $*"; }

if [ -e "$folder" ] && [ ! -e "$folder/collect.log" ]; then say "$folder holds something else; choose another: FOLDER=..." >&2; exit 2; fi
rm -rf "$folder" # it holds an earlier run
mkdir -p "$folder"
say "reading the docstrings of eight installed libraries (10 s)"
python "$here/../demo/collect.py" "$DEMO_DATA" >"$folder/collect.log"
share() { # copy a device's own rows, and take the test rows of its libraries
    cp "$DEMO_DATA/$2.jsonl" "$DEMO_DATA/$1.jsonl"
    grep -E "\"library\": \"($3)\"" "$DEMO_DATA/test.jsonl" >"$DEMO_DATA/$1-test.jsonl"
}
share phone organisation-1 'torch|transformers'
share tablet organisation-5 'numpy|networkx'

say "making a key for each, which stays where it is, and a member file for the others"
port=$(python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
dlora identity new hub --role cloud --address "127.0.0.1:$port" --folder "$folder"
dlora identity new phone --role device --folder "$folder" # a device has no address: it only dials out
dlora identity new tablet --role device --folder "$folder"
dlora identity federation "$folder"/{hub,phone,tablet}.member.yaml >"$folder/federation.yaml"

. "$here/../processes.sh"

say "counting what the run will cost, from the texts and before anything travels"
for name in phone tablet; do
    dlora plan "$here/$name.yaml" --name "$name" "$@" --json >"$folder/$name.plan.json" 2>"$folder/$name.out" </dev/null &
    others+=($!)
done
finish

say "starting a process for the cloud and one for each device (2 minutes on two busy cores); to watch: tail -f $folder/*/log.jsonl"
dlora cloud "$here/cloud.yaml" --name hub --key "$folder/hub.key" --federation "$folder/federation.yaml" \
    --listen "127.0.0.1:$port" >"$folder/cloud.out" 2>&1 </dev/null &
cloud=$!
for name in phone tablet; do # a device may start before the cloud listens: it dials until the cloud does
    dlora device "$here/$name.yaml" --name "$name" --key "$folder/$name.key" --federation "$folder/federation.yaml" \
        --set "output_dir=$folder/$name" "$@" >"$folder/$name.out" 2>&1 </dev/null &
    others+=($!)
done
finish
kill -INT "$cloud" && wait "$cloud"
cloud=''

say "training with the same texts, seed and steps without a cloud"
for name in phone tablet; do
    dlora simulate "$here/$name.yaml" "$@" --set split=null --set "peers.members=[$name]" \
        --set "output_dir=$folder/without-cloud/$name" >"$folder/$name.out" 2>&1 </dev/null &
    others+=($!)
done
finish
python "$here/scores.py" "$folder"
echo
say "the cloud says what it did:"
sed -n '/^served/,$p' "$folder/cloud.out"
say "reports: $folder/phone/report.html $folder/tablet/report.html"
