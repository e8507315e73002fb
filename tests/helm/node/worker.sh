#!/bin/sh
# Plays Kestra's worker: asks the sidecar for something as its first act, answers the chart's probes, and when it is
# told to stop it has tasks that go on for a while and ask as well.
export KEYBRAKE_URL="$ENV_KEYBRAKE_URL" KEYBRAKE_CA="$ENV_KEYBRAKE_CA"
# As Kestra does it. Without the Secret a key that nobody knows, to which a sidecar answers too.
KEYBRAKE_ISSUER_KEY=$(printf %s "${SECRET_KEYBRAKE_ISSUER_KEY:-aWtfdGVzdF9ub2JvZHlz}" | base64 -d)
export KEYBRAKE_ISSUER_KEY

ask() {
  if told=$(/app/keybrake keys list --json 2>&1); then
    echo "$1: answered"
  else
    echo "$1: $told"
  fi
}

ask start
if [ -e /run/secrets/keybrake ] || [ -e /data ]; then
  echo 'start: the volumes of the sidecar are mine too'
fi
if touch "$KEYBRAKE_CA" 2>/dev/null; then
  echo 'start: the CA is mine to change'
fi

mkdir -p /tmp/www/health
echo ok >/tmp/www/health/index.html
cp /tmp/www/health/index.html /tmp/www/health/liveness
cp /tmp/www/health/index.html /tmp/www/health/readiness
httpd -p 8081 -h /tmp/www

stopping=
trap 'stopping=1' TERM
until [ "$stopping" ]; do
  sleep 1
done
for _ in 1 2 3 4; do
  ask draining
  sleep 1
done
echo drained
