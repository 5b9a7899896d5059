#!/bin/sh
# Three hosts with a device each, as `describe --host` tells of them, and where each device can go: one host by three names.
work=$(mktemp -d) && cd "$work" || exit 1
trap 'kill $servers; rm -rf "$work"' EXIT
for host in 'h1 1.2.0 8' 'h2 1.3.0 8' 'h3 1.2.0 4'; do
    set -- $host
    mkdir "$1"
    vfio-migrate device --socket "$1/net0.sock" --model example.org/nic --model-version "$2" --param "queues=$3" 2>/dev/null &
    servers="$servers $!"
    until [ -S "$1/net0.sock" ]; do sleep 0.1; done
    vfio-migrate describe --host "$1/net0.sock" --name "$1" -o "$1.json" || exit 1
done
echo '$ vfio-migrate check --matrix h1.json h2.json h3.json'
vfio-migrate check --matrix h1.json h2.json h3.json
echo '$ vfio-migrate explain device-parameter'
vfio-migrate explain device-parameter
