#!/bin/bash
# Makes vmlinux and initramfs.img of Debian's generic kernel (its cloud kernel has no soft-RoCE): the kernel itself,
# uncompressed, and busybox with the modules for soft-RoCE, disks and shared folders.
. "$(dirname "$0")/common.sh"
prepare_apt
version=$(guest_apt apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: linux-image-\(.*-amd64\)$/\1/p' | head -n 1)
unpacked=$cache/kernel files=$cache/initramfs
rm -rf "$unpacked" "$files"
mkdir -p "$unpacked/usr/lib" "$files/bin" "$files/modules"
ln -s usr/lib "$unpacked/lib"
download "$unpacked" "linux-image-$version"
dpkg --fsys-tarfile "$unpacked"/linux-image-*.deb | tar -x -C "$unpacked" --keep-directory-symlink --wildcards \
  --exclude='*/drivers/gpu' --exclude='*/drivers/media' --exclude='*/net/wireless' --exclude='*/kernel/sound' \
  './boot/vmlinuz-*' '*/lib/modules'
python3 "$vm/extract_kernel.py" "$unpacked/boot/vmlinuz-$version" "$cache/vmlinux"
depmod -b "$unpacked" "$version" 2>/dev/null

# crc32_generic: the guest has no modprobe that the kernel could ask for it when a soft-RoCE device is made.
wanted="virtio_pci virtio_rng virtio_blk ext4 9p 9pnet_virtio overlay veth crc32c_generic crc32_generic rdma_rxe rdma_ucm"
for module in $wanted; do
  modprobe -d "$unpacked" -S "$version" --show-depends "$module" | awk '$1 == "insmod" { print $2 }'
done | awk '!seen[$0]++' | while read -r file; do
  [ -e "$file" ] || file=$unpacked/$file
  name=$(basename "$file" .xz)
  case $file in *.xz) xz -dc "$file" ;; *) cat "$file" ;; esac >"$files/modules/$name"
  strip --strip-debug "$files/modules/$name"
  echo "$name" >>"$files/modules.order"
done
cp "$(command -v busybox)" "$files/bin/busybox"
install -m 755 "$vm/init.sh" "$files/init"
(cd "$files" && find . | cpio -o -H newc --quiet | gzip -1 >"$cache/initramfs.new")
mv "$cache/initramfs.new" "$cache/initramfs.img"
rm -rf "$unpacked" "$files"
say "kernel $version"
