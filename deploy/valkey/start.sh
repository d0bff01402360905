#!/bin/sh
# Becomes the server; the password reaches it by standard input, beside the file.
set -eu
exec valkey-server /etc/pressroom/valkey.conf - <<CONFIG
requirepass ${VALKEY_PASSWORD:?set VALKEY_PASSWORD}
CONFIG
