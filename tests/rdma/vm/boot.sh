#!/bin/bash
# boot.sh [--site] COMMAND: boots the guest, runs the command in a copy of the repository and returns its exit status; 99 if the
# guest dies. With --site there are packages at /site, and a second processor.
# RDMA_UNTIL: when it must be over, in seconds of the clock. The folder $cache/out is /mnt in the guest.
. "$(dirname "$0")/common.sh"
site='' processors=1
[ "$1" != --site ] || { site=$cache/site.ext4 processors=2; shift; }
out=$cache/out
limit=${RDMA_UNTIL:-$(($(date +%s) + 270))}
mkdir -p "$out"
rm -f "$out/status" "$out/started"
cp "$vm/guest.sh" "$out/"
printf '%s\n' "$1" >"$out/command.sh"

disk() { echo "if=virtio,format=raw,readonly=on,file=$1"; }
share() { echo "local,path=$1,mount_tag=$2,security_model=none,multidevs=remap${3:-}"; }

# Never KVM: /dev/kvm may be there and hang. One processor, where it will do: the emulator costs less, and two have been
# seen to stop a kernel from booting. The emulated time stamp counter can't be trusted under load.
boot() {
  local left=$((limit - $(date +%s)))
  [ $left -gt 0 ] || return 0
  nice timeout -k 5 $left qemu-system-x86_64 -accel tcg,tb-size=256 -cpu max -smp $processors -m 2048 -M q35 \
    -nodefaults -no-user-config -display none -no-reboot -serial stdio -kernel "$cache/vmlinux" \
    -initrd "$cache/initramfs.img" -device virtio-rng-pci -drive "$(disk "$cache/rootfs.ext4")" \
    ${site:+-drive "$(disk "$site")"} \
    -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr clocksource=hpet random.trust_cpu=on" \
    -virtfs "$(share "$repo" repo ,readonly=on)" -virtfs "$(share "$out" out)" </dev/null 2>&1 || true
}

boot
if [ ! -e "$out/started" ]; then
  say "the guest died before its user space was there; once more"
  boot
fi
[ -e "$out/status" ] || { say "the guest died, or was stopped since it took too long"; exit 99; }
exit "$(cat "$out/status")"
