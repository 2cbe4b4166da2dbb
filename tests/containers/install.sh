# Install what `make compose-test` runs containers with; where it cannot, the tests say what lacks.
set -eu
[ "$(id -u)" = 0 ] && [ -e /etc/debian_version ] || exit 0
missing=
for program in podman debootstrap runc catatonit; do
  command -v "$program" >/dev/null || missing=$program
done
if [ -n "$missing" ]; then
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      podman runc buildah catatonit debootstrap iptables containernetworking-plugins \
      golang-github-containernetworking-plugin-dnsname dnsmasq-base; } >/dev/null 2>&1 || true
fi
tools=.venv/containers/tools
[ -x "$tools/bin/podman-compose" ] || {
  "$1" -m venv "$tools"
  "$tools/bin/pip" install --quiet --disable-pip-version-check 'podman-compose>=1.5' || true
}
