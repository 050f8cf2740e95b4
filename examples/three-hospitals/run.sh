#!/usr/bin/env bash
# Three hospitals on this machine: three identities, one federation file, three processes that talk over TLS and nothing else.
# Needs a dlora that is installed (scripts/setup) and on the PATH. Other arguments go to every peer: --set train.rounds=5
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${FOLDER:-runs/three-hospitals}
export DATA="$folder/data" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
rm -rf "$folder"
mkdir -p "$folder"

echo "three hospitals: whose texts are whose (10 s)"
python "$here/../demo/collect.py" "$DATA" >"$folder/collect.log"
cat "$DATA"/organisation-[123].jsonl >"$DATA/north.jsonl"
cat "$DATA"/organisation-[456].jsonl >"$DATA/south.jsonl"
cat "$DATA"/organisation-[78].jsonl >"$DATA/west.jsonl"

echo "three hospitals: a key for each; what leaves the house is the member file"
# West can only dial out, as behind a firewall: it has no address.
read -r north south < <(python -c 'import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))')
dlora identity new north --address "127.0.0.1:$north" --folder "$folder"
dlora identity new south --address "127.0.0.1:$south" --folder "$folder"
dlora identity new west --folder "$folder"
dlora identity federation "$folder"/{north,south,west}.member.yaml >"$folder/federation.yaml"

echo "three hospitals: one process each (about 2 minutes on two quiet cores); their logs lie in $folder"
peers=()
trap 'for peer in "${peers[@]}"; do kill -INT "$peer" 2>/dev/null || true; done' EXIT
for name in north south west; do
    dlora peer "$here/run.yaml" --name "$name" --key "$folder/$name.key" --federation "$folder/federation.yaml" \
        --set "data.train=$DATA/$name.jsonl" --set "output_dir=$folder/$name" "$@" >"$folder/$name.out" 2>&1 &
    peers+=($!)
done
failed=0
for peer in "${peers[@]}"; do wait "$peer" || failed=$?; done
if [ "$failed" != 0 ]; then
    tail -n 3 "$folder"/{north,south,west}.out >&2
    exit "$failed"
fi
python "$here/compare.py" "$folder"
