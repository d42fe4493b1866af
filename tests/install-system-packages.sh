#!/usr/bin/env bash
# Installs the Debian packages that the tests use, when this is root on Debian; otherwise says what is missing.
set -euo pipefail
export PATH="$PATH:/usr/sbin"
missing=()
command -v mosquitto >/dev/null || missing+=(mosquitto)
command -v chromedriver >/dev/null || missing+=(chromium chromium-driver)
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || command -v initdb >/dev/null || missing+=(postgresql)
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "not installed: ${missing[*]}; their tests are skipped. On Debian: sudo apt-get install ${missing[*]}" >&2
fi
