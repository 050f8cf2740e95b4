#!/usr/bin/env bash
# This runs three devices, each with its own texts, and one cloud with the frozen model, in four processes on this machine. The
# devices train through the cloud. They average their adapters directly with each other over TLS, not through the cloud. Then it
# trains the same in one process without links, and each device alone, to compare.
# Run scripts/setup once before. Arguments go to all devices: --set train.rounds=5
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v dlora >/dev/null || PATH="$here/../../.venv/bin:$PATH"
dlora=$(command -v dlora) || { echo "phones with neighbours: dlora is not installed; run scripts/setup first" >&2; exit 2; }
PATH="$(dirname "$dlora"):$PATH" # the python beside that dlora
folder=${FOLDER:-runs/phones-with-neighbours}
devices=(phone tablet laptop)
export DEMO_DATA="$folder/data" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
say() { echo "phones with neighbours: $*"; }

if [ -e "$folder" ] && [ ! -e "$folder/collect.log" ]; then say "$folder holds something else; choose another: FOLDER=..." >&2; exit 2; fi
rm -rf "$folder" # it holds an earlier run
mkdir -p "$folder"
say "reading the docstrings of eight installed libraries (10 s)"
python "$here/../demo/collect.py" "$DEMO_DATA" >"$folder/collect.log"
grep -E '"library": "(torch|transformers|sympy|pandas|numpy|networkx)"' "$DEMO_DATA/test.jsonl" >"$DEMO_DATA/six.jsonl"

say "making a key for each, which stays where it is, and a member file for the others"
read -r hub tablet laptop < <(python -c 'import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))')
dlora identity new hub --role cloud --address "127.0.0.1:$hub" --folder "$folder"
dlora identity new phone --role device --folder "$folder" # it has no address: it dials the cloud and its neighbours
dlora identity new tablet --role device --address "127.0.0.1:$tablet" --folder "$folder" # its neighbours may dial it
dlora identity new laptop --role device --address "127.0.0.1:$laptop" --folder "$folder"
dlora identity federation "$folder"/{hub,phone,tablet,laptop}.member.yaml >"$folder/federation.yaml"

. "$here/../processes.sh"

say "counting what the run will cost, with neighbours and with the cloud, before anything travels"
for name in "${devices[@]}"; do
    dlora plan "$here/run.yaml" --name "$name" "$@" --json >"$folder/$name.plan.json" 2>"$folder/$name.out" </dev/null &
    others+=($!)
done
finish

say "starting a process for the cloud and one for each device (a minute on two quiet cores); to watch: tail -f $folder/*/log.jsonl"
dlora cloud "$here/../phone-and-cloud/cloud.yaml" --set limits.max_devices=3 --name hub --key "$folder/hub.key" \
    --federation "$folder/federation.yaml" --listen "127.0.0.1:$hub" >"$folder/cloud.out" 2>&1 </dev/null &
cloud=$!
for name in "${devices[@]}"; do
    dlora device "$here/run.yaml" --name "$name" --key "$folder/$name.key" --federation "$folder/federation.yaml" \
        --set "output_dir=$folder/$name" "$@" >"$folder/$name.out" 2>&1 </dev/null &
    others+=($!)
done
finish
kill -INT "$cloud" && wait "$cloud"
cloud=''

say "training the same in one process without links, and each device alone (a minute)"
OMP_NUM_THREADS=2 dlora simulate "$here/run.yaml" "$@" --set split=null --set 'compare=[local]' --set "output_dir=$folder/simulation" \
    >"$folder/simulation.out" 2>&1 </dev/null &
others+=($!)
finish
python "$here/together.py" "$folder" "${devices[@]}"
echo
say "the cloud says what it did:"
sed -n '/^served/,$p' "$folder/cloud.out"
say "reports: $(printf '%s/report.html ' "${devices[@]/#/$folder/}")"
