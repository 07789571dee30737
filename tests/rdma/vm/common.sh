# Sourced by the other scripts: where things are, and an apt of our own, which neither needs root nor touches the host's.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # mke2fs, depmod and modprobe, for a caller who is not root
vm=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$vm/../../.." && pwd)
suite=trixie python=python3.13
cache=${RDMA_CACHE:-$repo/.rdma}/$suite
NO_NETWORK=75 # exit status of a step that could not fetch what it needs
mkdir -p "$cache"

say() { echo "[host $(date +%T)] $*"; }

no_network() {
  say "$*"
  exit $NO_NETWORK
}

apt_options=(-qq -o "Dir::State=$cache/apt" -o "Dir::State::status=$cache/apt/status" -o "Dir::Cache=$cache/apt"
  -o "Dir::Etc::sourcelist=$cache/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::preferences=/dev/null
  -o Dir::Etc::preferencesparts=/dev/null -o APT::Architecture=amd64 -o APT::Sandbox::User= -o Acquire::Retries=2
  -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20)

guest_apt() {
  local command=$1
  shift
  "$command" "${apt_options[@]}" "$@"
}

# The archive that this host's own apt uses, unless RDMA_MIRROR names another one.
prepare_apt() {
  [ ! -e "$cache/apt/ready" ] || return 0
  local mirror=${RDMA_MIRROR:-} keys=/usr/share/keyrings/debian-archive-keyring.gpg
  [ -n "$mirror" ] || mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | head -n 1)
  [ -n "$mirror" ] || no_network "this host's apt has no archive; name one by RDMA_MIRROR"
  [ -e "$keys" ] || no_network "no keys of the Debian archive (debian-archive-keyring)"
  mkdir -p "$cache"/apt/{lists,archives}/partial
  : >"$cache/apt/status"
  echo "deb [signed-by=$keys] $mirror $suite main" >"$cache/apt/sources.list"
  # An update that fetched nothing is a success to apt.
  guest_apt apt-get update && guest_apt apt-cache show python3-pyverbs >/dev/null 2>&1 ||
    no_network "no package index of $suite from $mirror"
  : >"$cache/apt/ready"
}

# download FOLDER PACKAGE...
download() {
  mkdir -p "$1"
  (cd "$1" && shift && guest_apt apt-get download "$@" 2>/dev/null) || no_network "can't fetch packages of $suite"
}

# The guest's interpreter, run here once its root file system is there.
guest_python() {
  local lib=$cache/rootfs/usr/lib/x86_64-linux-gnu
  PYTHONHOME=$cache/rootfs/usr "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$cache/rootfs/usr/bin/$python" "$@"
}
