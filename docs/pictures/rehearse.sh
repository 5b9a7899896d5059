#!/bin/sh
# What a rehearsal says of the downtime, part by part.
work=$(mktemp -d) && cd "$work" || exit 1
trap 'kill $started; rm -rf "$work"' EXIT
start() { vfio-migrate "$@" 2>/dev/null & started="$started $!"; }
start device --socket a.sock --state-size 8M
start device --socket b.sock --state-size 8M
start vm --device vfio-user:b.sock,id=net0 --incoming unix:b.mig --control b.ctl
start vm --memory 128M --dirty-rate 8M --device vfio-user:a.sock,id=net0 --control a.ctl
until vfio-migrate status --control a.ctl && vfio-migrate status --control b.ctl; do sleep 0.2; done >/dev/null 2>&1
sleep 3
echo '$ vfio-migrate rehearse --control a.ctl --to unix:b.mig --pause --downtime-limit 10s'
vfio-migrate rehearse --control a.ctl --to unix:b.mig --pause --downtime-limit 10s 2>/dev/null
