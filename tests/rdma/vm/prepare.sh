#!/bin/bash
# Makes the guest, once: installs what that needs if it may. Exit status 75 if something can't be had here.
. "$(dirname "$0")/common.sh"

missing() {
  local tool
  for tool in qemu-system-x86_64 busybox modprobe cpio strip mke2fs xz dpkg apt-get; do
    command -v "$tool" >/dev/null || echo "$tool"
  done
}

if [ -n "$(missing)" ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  say "installing" $(missing)
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends qemu-system-x86 \
    busybox-static kmod cpio binutils e2fsprogs xz-utils; } >"$cache/install.log" 2>&1 || tail -n 3 "$cache/install.log"
fi
[ -z "$(missing)" ] || no_network "not installed, and not to be had:" $(missing)

want=$(cat "$vm"/{common,kernel,rootfs,init}.sh "$vm/extract_kernel.py" | sha256sum)
if [ "$want" != "$(cat "$cache/made" 2>/dev/null)" ]; then
  say "making the guest, once"
  rm -f "$cache/apt/ready" # the archive drops what an old index names
  "$vm/kernel.sh"
  "$vm/rootfs.sh"
  echo "$want" >"$cache/made"
fi
