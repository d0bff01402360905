#!/bin/sh
# Builds the stand-ins under the tags of the official images, for a machine without an image registry.
# usage: sh deploy/standins/build.sh BUILD_COMMAND...      for example: sh deploy/standins/build.sh docker build
set -eu
[ $# -gt 0 ] || { sed -n 2,3p "$0" >&2; exit 2; }
cd "$(dirname "$0")/../.."
"$@" -f deploy/standins/nats.Dockerfile -t docker.io/library/nats:2.15-alpine .
"$@" -f deploy/standins/valkey.Dockerfile -t docker.io/valkey/valkey:9.1-alpine .
