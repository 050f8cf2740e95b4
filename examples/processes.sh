# An example's run.sh sources this file once $folder exists. It starts no process; it waits for those that run.sh started
# (the cloud, if there is one, and the others) and ends them.
cloud='' others=()
trap 'kill $cloud "${others[@]}" 2>/dev/null || true; wait' EXIT # no process is left when run.sh ends, for any reason
finish() { # wait for all processes but the cloud; if one of them or the cloud fails, print its last lines and end
    local failed=0
    while [ "$(jobs -pr)" != "$cloud" ]; do
        if [ "$cloud" ] && ! kill -0 "$cloud" 2>/dev/null; then tail -n 3 "$folder/cloud.out" >&2; exit 1; fi
        sleep 0.5
    done
    for other in "${others[@]}"; do wait "$other" || failed=$?; done
    others=()
    if [ "$failed" != 0 ]; then tail -n 3 "$folder"/*.out >&2; exit "$failed"; fi
}
