#!/bin/sh
# Install the Debian packages that some tests need; where that cannot be, say which tests are skipped, and why.

PATH=$PATH:/usr/sbin:/sbin
has() { command -v "$1" > /dev/null; }

packages=
tests=
if ! has slurmctld || ! has slurmd || ! has munged; then
    packages="slurm-wlm munge"
    tests="those of slurm/"
fi
if ! has chromium || ! has chromedriver; then
    packages="$packages${packages:+ }chromium chromium-driver"
    tests="$tests${tests:+ and }those in a browser"
fi
[ -n "$packages" ] || exit 0

if [ "$(id -u)" != 0 ] || ! has apt-get; then
    why="installing takes root and apt-get"
else
    echo "installing $packages"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # a word a package
    apt-get update -qq && apt-get install -qq --yes --no-install-recommends $packages > /dev/null && exit 0
    why="apt-get failed"
fi
echo "tests skipped: $tests, for want of $packages; $why"
