# Sourced by the run.sh of an example, once $folder is there: its cloud, if any, and what runs beside it.
cloud='' others=()
trap 'kill $cloud "${others[@]}" 2>/dev/null || true; wait' EXIT # whatever happens, no process stays behind
finish() { # wait for what runs beside the cloud; if one fails, or the cloud does, say what it said and end
    local failed=0
    while [ "$(jobs -pr)" != "$cloud" ]; do
        if [ "$cloud" ] && ! kill -0 "$cloud" 2>/dev/null; then tail -n 3 "$folder/cloud.out" >&2; exit 1; fi
        sleep 0.5
    done
    for other in "${others[@]}"; do wait "$other" || failed=$?; done
    others=()
    if [ "$failed" != 0 ]; then tail -n 3 "$folder"/*.out >&2; exit "$failed"; fi
}
