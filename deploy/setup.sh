#!/bin/sh
# What `cargo xtask` needs before it can be built: a C linker. Everything else
# is the work of `cargo xtask setup`. Does nothing when the linker is there.
set -eu

command -v cc >/dev/null 2>&1 && exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "setup: no C linker (cc), which cargo links with: install gcc and the C library's headers" >&2
    exit 1
fi
as_root=
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then
        echo "setup: no C linker (cc), and no sudo to install it with: as root, run 'apt-get install gcc libc6-dev'" >&2
        exit 1
    fi
    as_root=sudo
fi
echo "setup: installing gcc and libc6-dev with apt-get: cargo links with cc"
$as_root apt-get update -qq >/dev/null
$as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends gcc libc6-dev >/dev/null
