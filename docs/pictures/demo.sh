#!/bin/sh
# The demo, with a guest and a limit that also a busy machine without optimised code is up to.
echo '$ vfio-migrate demo --memory 128M --device-state 8M --dirty-rate 8M --downtime-limit 5s'
vfio-migrate demo --memory 128M --device-state 8M --dirty-rate 8M --downtime-limit 5s 2>&1
