#!/bin/sh
# Install the servers that tests start: Redis, and Prometheus with promtool. For Debian and its kin.
set -eu
if ! command -v apt-get > /dev/null || [ "$(id -u)" != 0 ]; then
    echo "install redis-server, prometheus and promtool; as root on Debian this does so by itself" >&2
    exit 1
fi
echo "installing redis-server and prometheus, which the tests start themselves"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends redis-server prometheus > /dev/null
